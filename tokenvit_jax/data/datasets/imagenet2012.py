"""ImageNet-1K (ILSVRC 2012) from its original archives or unpacked, without TensorFlow.

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

from tokenvit_jax.data.files import is_hidden, list_folders, list_images
from tokenvit_jax.data.record import DatasetInfo
from tokenvit_jax.data.tfds_files import (
    LabelSource,
    Pairs,
    is_prepared,
    open_records,
    write_splits,
)
from tokenvit_jax.errors import UserError

INFO = DatasetInfo(
    name="imagenet2012",
    splits={"train": 1_281_167, "validation": 50_000},
    train_split="train",
    eval_split="validation",
    fields=frozenset({"image", "label"}),
    num_classes=1000,
    classes=tuple(Path(__file__).with_name("imagenet2012_classes.txt").read_text().splitlines()),
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
    "images of ILSVRC 2012 (task 1 & 2) into that folder, or unpack them there into train/ and val/"
)


def open_split(config: ConfigDict, split: str) -> LabelSource:
    """Opens a split for reading.

    Raises:
      UserError: the dataset has not been prepared in `config.data.data_dir`.
    """
    records = open_records(INFO.name, split, config.data.data_dir, folder=INFO.name)
    return LabelSource(INFO.name, split, records)


def prepare(manual_dir: Path, data_dir: Path) -> Path:
    """Writes ImageNet-1K as ArrayRecord files; does nothing if they exist.

    Needs about 300 GB besides the archives while it runs, and half as much afterwards.

    Args:
      manual_dir: folder with the two archives, or with unpacked images in their place: train/ with
        a folder per class, named by WordNet id, and val/ with the same or with all images.
      data_dir: receives the folder `imagenet2012/5.1.0`.

    Returns:
      The folder with the files.

    Raises:
      UserError: an archive is missing, truncated or has other contents, or a file is there twice.
    """
    folder = data_dir / INFO.name / VERSION
    if is_prepared(folder):
        return folder
    sources = {TRAIN_ARCHIVE: manual_dir / "train", VALIDATION_ARCHIVE: manual_dir / "val"}
    archives = {name: manual_dir / name for name in sources if (manual_dir / name).is_file()}
    missing = [name for name in sources if name not in archives and not sources[name].is_dir()]
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
    train, validation = (archives.get(name, folder) for name, folder in sources.items())
    splits = {
        "train": _archived_classes(train) if train.is_file() else _class_folders(train),
        "validation": _archived(validation) if validation.is_file() else _unpacked(validation),
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


def _archived_classes(archive: Path) -> Pairs:
    """Yields the training images of an archive of one archive per class."""
    classes, seen = set(_read_lines(_CLASSES)), set()
    with _open(archive) as tar:
        for member in _files(tar):
            wordnet_id = Path(member.name).stem
            if wordnet_id not in classes:
                raise UserError(
                    f"{archive} contains {member.name!r}; expected one archive per class, such as "
                    "'n01440764.tar'"
                )
            _check_new(wordnet_id, seen, archive)
            # Reads straight from the outer file: no class is held in memory.
            with tarfile.open(fileobj=tar.extractfile(member)) as class_tar:
                names = set()
                for image in _files(class_tar):
                    name = Path(image.name).name
                    _check_new(name, names, archive)
                    yield _example(name, class_tar.extractfile(image).read(), wordnet_id)


def _archived(archive: Path) -> Pairs:
    """Yields the validation images of an archive."""
    labels, seen = _read_lines(_VALIDATION_LABELS), set()
    with _open(archive) as tar:
        for member in _files(tar):
            name = Path(member.name).name
            _check_new(name, seen, archive)
            label = _label_of(name, labels, archive)
            yield _example(name, tar.extractfile(member).read(), label)


def _class_folders(folder: Path) -> Pairs:
    """Yields the images of one folder per class."""
    classes = set(_read_lines(_CLASSES))
    for wordnet_id in list_folders(folder):
        if wordnet_id not in classes:
            raise UserError(
                f"{folder} contains the folder {wordnet_id!r}; expected one per class, such as "
                "'n01440764'"
            )
        for path in list_images(folder / wordnet_id):
            content = (folder / wordnet_id / path).read_bytes()
            yield _example(Path(path).name, content, wordnet_id)


def _unpacked(folder: Path) -> Pairs:
    """Yields the validation images of a folder, which may have a folder per class."""
    if list_folders(folder):
        yield from _class_folders(folder)
        return
    labels = _read_lines(_VALIDATION_LABELS)
    for name in list_images(folder):
        label = _label_of(name, labels, folder)
        yield _example(name, (folder / name).read_bytes(), label)


def _files(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yields the visible files of an archive."""
    for member in tar:
        if member.isfile() and not is_hidden(Path(member.name).name):
            yield member


def _check_new(name: str, seen: set[str], archive: Path) -> None:
    if name in seen:
        raise UserError(f"{archive} contains {name!r} twice; download it again")
    seen.add(name)


def _label_of(name: str, labels: list[str], source: Path) -> str:
    """Returns the WordNet id of a validation image; the first is ILSVRC2012_val_00000001.JPEG."""
    number = name.removeprefix("ILSVRC2012_val_").removesuffix(".JPEG")
    if not (number.isdecimal() and 1 <= int(number) <= len(labels)):
        raise UserError(
            f"{source} contains {name!r}; expected ILSVRC2012_val_00000001.JPEG to "
            f"ILSVRC2012_val_{len(labels):08d}.JPEG"
        )
    return labels[int(number) - 1]


def _example(file_name: str, encoded: bytes, wordnet_id: str) -> tuple[str, dict[str, Any]]:
    return file_name, {
        "image": io.BytesIO(encoded),
        "label": wordnet_id,
        "file_name": file_name,
    }
