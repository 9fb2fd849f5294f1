"""ImageNet-1K (ILSVRC 2012) from its original archives, without TensorFlow.

The result has the name, version and features of tensorflow_datasets' own `imagenet2012`, so either
can be read where the other was prepared (in the array_record format). Image files are stored as
they are, and decoded when they are read.

Source: Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge" (2015).
"""

import contextlib
import io
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from tokenvit_jax.errors import UserError

NAME = "imagenet2012"
TRAIN_ARCHIVE = "ILSVRC2012_img_train.tar"  # one tar per class, named by WordNet id: 138 GB
VALIDATION_ARCHIVE = "ILSVRC2012_img_val.tar"  # 50,000 images: 6.3 GB

# WordNet ids of the classes in order, and of the validation images in order of their numbers.
_CLASSES = "datasets/imagenet2012/labels.txt"
_VALIDATION_LABELS = "datasets/imagenet2012/validation_labels.txt"
_HOW_TO_GET = (
    "register at https://image-net.org/download-images and download the training and validation "
    "images of ILSVRC 2012 (task 1 & 2) into that folder"
)


# Not registered with tensorflow_datasets: the name belongs to its own builder.
class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes the train and validation splits; see :func:`prepare`."""

    name = NAME
    VERSION = tfds.core.Version("5.1.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = _HOW_TO_GET
    # Nothing is downloaded. tensorflow_datasets' own lookup of checksums imports a package,
    # importlib_resources, that it does not require.
    url_infos = None

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names_file=tfds.core.tfds_path(_CLASSES)),
            "file_name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            homepage="https://image-net.org/",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        manual_dir = Path(dl_manager.manual_dir)
        return {
            "train": self._generate_examples(_train_examples, manual_dir / TRAIN_ARCHIVE),
            "validation": self._generate_examples(
                _validation_examples, manual_dir / VALIDATION_ARCHIVE
            ),
        }

    def _generate_examples(self, read: Callable[[Path], Iterator], archive: Path) -> Iterator:
        return read(archive)


def prepare(manual_dir: Path, data_dir: Path) -> Path:
    """Writes ImageNet-1K as ArrayRecord files; does nothing if they are there.

    Needs about 300 GB besides the archives while it runs, half of that afterwards.

    Args:
        manual_dir: where the two archives lie.
        data_dir: receives the folder `imagenet2012/5.1.0`.

    Returns:
        The folder with the files.

    Raises:
        UserError: if an archive is missing, cut short or of another content.
    """
    folder = data_dir / NAME / str(Builder.VERSION)
    if (folder / "dataset_info.json").is_file():
        return folder
    archives = (TRAIN_ARCHIVE, VALIDATION_ARCHIVE)
    missing = [name for name in archives if not (manual_dir / name).is_file()]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} not found in --manual_dir={manual_dir}; {_HOW_TO_GET}"
        )
    builder = Builder(data_dir=str(data_dir), file_format="array_record")
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(manual_dir=str(manual_dir))
    )
    return folder


def _read_lines(resource: str) -> list[str]:
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
            # Reads on in the outer file: no class is held in memory.
            with tarfile.open(fileobj=tar.extractfile(member)) as class_tar:
                for image in class_tar:
                    yield _example(image.name, class_tar.extractfile(image).read(), wordnet_id)


def _validation_examples(archive: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    labels = _read_lines(_VALIDATION_LABELS)
    with _open(archive) as tar:
        for member in filter(tarfile.TarInfo.isfile, tar):
            file_name = Path(member.name).name
            # ILSVRC2012_val_00000001.JPEG is the first.
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
