"""ImageNet-1K (ILSVRC 2012) from its original archives, without TensorFlow.

The result has the name, version and features of tensorflow_datasets' own `imagenet2012`, so each
project can read what the other prepared (in the array_record format). Image files are stored
unchanged and decoded when they are read.

References:
  Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge" (2015).
"""

import contextlib
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from PIL import Image

from tokenvit_jax.data.record import DatasetInfo, Record
from tokenvit_jax.data.tfds_files import TfdsSource, is_prepared, write_splits
from tokenvit_jax.errors import UserError

INFO = DatasetInfo(
    name="imagenet2012",
    splits={"train": 1_281_167, "validation": 50_000},
    train_split="train",
    eval_split="validation",
    fields=frozenset({"image", "label"}),
    num_classes=1000,
    classes=None,
    center_crop=True,
)
VERSION = "5.1.0"
TRAIN_ARCHIVE = "ILSVRC2012_img_train.tar"  # one tar per class, named by WordNet id: 138 GB
VALIDATION_ARCHIVE = "ILSVRC2012_img_val.tar"  # 50,000 images: 6.3 GB

# WordNet ids of the classes, in order, and of the validation images, in the order of their numbers.
_CLASSES = "datasets/imagenet2012/labels.txt"
_VALIDATION_LABELS = "datasets/imagenet2012/validation_labels.txt"
_HOW_TO_GET = (
    "register at https://image-net.org/download-images and download the training and validation "
    "images of ILSVRC 2012 (task 1 & 2) into that folder"
)


class ImageNetSource(TfdsSource):
    """Images with one class each."""

    def ground_truth(self, features: dict[str, Any], image: Image.Image) -> Record:
        """See :class:`tokenvit_jax.data.tfds_files.TfdsSource`."""
        return Record(label=int(features["label"]))


def open_split(config: ConfigDict, split: str) -> ImageNetSource:
    """Opens a split for reading.

    Raises:
      UserError: the dataset has not been prepared in `config.data.data_dir`.
    """
    return ImageNetSource(INFO.name, split, config.data.data_dir, folder=INFO.name)


def prepare(manual_dir: Path, data_dir: Path) -> Path:
    """Writes ImageNet-1K as ArrayRecord files; does nothing if they exist.

    Needs about 300 GB besides the archives while it runs, and half as much afterwards.

    Args:
      manual_dir: folder with the two archives.
      data_dir: receives the folder `imagenet2012/5.1.0`.

    Returns:
      The folder with the files.

    Raises:
      UserError: an archive is missing, truncated or has other contents.
    """
    folder = data_dir / INFO.name / VERSION
    if is_prepared(folder):
        return folder
    archives = (TRAIN_ARCHIVE, VALIDATION_ARCHIVE)
    missing = [name for name in archives if not (manual_dir / name).is_file()]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} not found in --manual_dir={manual_dir}; {_HOW_TO_GET}"
        )
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(names_file=tfds.core.tfds_path(_CLASSES)),
        "file_name": tfds.features.Text(),
    }
    splits = {
        "train": _train_examples(manual_dir / TRAIN_ARCHIVE),
        "validation": _validation_examples(manual_dir / VALIDATION_ARCHIVE),
    }
    info = {"supervised_keys": ("image", "label"), "homepage": "https://image-net.org/"}
    write_splits(data_dir, INFO.name, VERSION, features, splits, **info)
    return folder


def _read_lines(resource: str) -> list[str]:
    import tensorflow_datasets as tfds

    return tfds.core.tfds_path(resource).read_text().split()


@contextlib.contextmanager
def _open(archive: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(archive) as tar:
            yield tar
    except (tarfile.TarError, EOFError) as error:
        raise UserError(
            f"{archive} is damaged or not downloaded completely ({error}); download it again"
        ) from error


def _train_examples(archive: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    classes = set(_read_lines(_CLASSES))
    with _open(archive) as tar:
        for member in tar:
            wordnet_id = Path(member.name).stem
            if wordnet_id not in classes:
                raise UserError(
                    f"{archive} contains {member.name!r}; expected one archive per class, such as "
                    "'n01440764.tar'"
                )
            # Reads straight from the outer file: no class is held in memory.
            with tarfile.open(fileobj=tar.extractfile(member)) as class_tar:
                for image in class_tar:
                    yield _example(image.name, class_tar.extractfile(image).read(), wordnet_id)


def _validation_examples(archive: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    labels = _read_lines(_VALIDATION_LABELS)
    with _open(archive) as tar:
        for member in filter(tarfile.TarInfo.isfile, tar):
            file_name = Path(member.name).name
            # The first image is ILSVRC2012_val_00000001.JPEG.
            number = file_name.removeprefix("ILSVRC2012_val_").removesuffix(".JPEG")
            if not (number.isdecimal() and 1 <= int(number) <= len(labels)):
                raise UserError(
                    f"{archive} contains {member.name!r}; expected ILSVRC2012_val_00000001.JPEG "
                    f"to ILSVRC2012_val_{len(labels):08d}.JPEG"
                )
            yield _example(file_name, tar.extractfile(member).read(), labels[int(number) - 1])


def _example(file_name: str, encoded: bytes, wordnet_id: str) -> tuple[str, dict[str, Any]]:
    return file_name, {
        "image": io.BytesIO(encoded),
        "label": wordnet_id,
        "file_name": file_name,
    }
