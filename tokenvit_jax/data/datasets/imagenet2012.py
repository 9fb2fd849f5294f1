"""ImageNet-1K (ILSVRC 2012) from its original archives or unpacked, without TensorFlow.

The result has the name, version and features of tensorflow_datasets' own `imagenet2012`, so each
project can read what the other prepared (in the array_record format). Image files are stored
unchanged and decoded when they are read.

References:
  Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge" (2015).
"""

import io
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ml_collections import ConfigDict

from tokenvit_jax.data.files import image_suffixes, is_hidden, list_folders, list_images, read_file
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
    classes=tuple(
        Path(__file__).with_name("imagenet2012_classes.txt").read_text("utf-8").splitlines()
    ),
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
_AGAIN = "download it again"


def open_split(config: ConfigDict, split: str) -> LabelSource:
    """Opens a split for reading.

    Raises:
      UserError: the dataset has not been prepared in `config.data.data_dir`.
    """
    records = open_records(INFO.name, split, config.data.data_dir, folder=INFO.name)
    return LabelSource(INFO, split, records)


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
        # Compressed archives, for example.
        similar = {f.name for name in missing for f in manual_dir.glob(f"{Path(name).stem}*")}
        others = sorted(similar - set(missing))
        found = f", only {', '.join(others)}" if others else ""
        raise UserError(
            f"{' and '.join(missing)} not found in --manual_dir={manual_dir}{found}; {_HOW_TO_GET}"
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


def _archived_classes(archive: Path) -> Pairs:
    """Yields the training images of an archive of one archive per class."""
    classes, names = set(_read_lines(_CLASSES)), set()
    for file, class_archive in _members(archive, unread=True):
        wordnet_id = Path(file).stem.lower()
        if wordnet_id not in classes:
            raise UserError(
                f"{archive} contains {file!r}; expected one archive per class, such as "
                "'n01440764.tar'"
            )
        # Reads straight from the outer file: no class is held in memory.
        for name, content in _members(archive, class_archive, f" in {file}"):
            if Path(name).suffix.lower() not in image_suffixes():
                continue  # a note, which every class may have
            if name in names:
                raise UserError(f"{archive} contains {name!r} twice, again in {file}; {_AGAIN}")
            names.add(name)
            yield _example(name, content, wordnet_id, archive)


def _archived(archive: Path) -> Pairs:
    """Yields the validation images of an archive."""
    labels = _read_lines(_VALIDATION_LABELS)
    for name, content in _members(archive):
        yield _example(name, content, _label_of(name, labels, archive), archive)


def _members(
    archive: Path, stream: IO[bytes] | None = None, where: str = "", unread: bool = False
) -> Iterator[tuple[str, Any]]:
    """Yields the name, without its folders, and the contents of each visible file of an archive.

    Args:
      archive: the file, for messages.
      stream: an archive inside it that is read instead.
      where: place of the stream in the archive, for messages.
      unread: whether streams are returned in place of contents.

    Raises:
      UserError: the archive is damaged, holds a name twice, or something that is no file.
    """
    seen = set()
    try:
        # Not compressed: the archives are not, and going back in a compressed one takes hours.
        with tarfile.open(archive, "r:", fileobj=stream) as tar:
            for member in tar:
                name = _visible_name(member)
                if not name:
                    continue
                if not member.isreg():
                    what = "is a link or a device"
                elif name in seen:
                    what = "is there twice"
                elif not member.size:
                    what = "is empty"
                else:
                    seen.add(name)
                    content = tar.extractfile(member)
                    yield name, content if unread else content.read()
                    continue
                raise UserError(f"{archive} contains {name!r}{where}, which {what}; {_AGAIN}")
            # A damaged header looks like the end to tarfile.
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise tarfile.ReadError(f"no end at byte {tar.offset:,}")
    except UserError:
        raise
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise UserError(
            f"{archive} is damaged or not downloaded completely ({error}{where}); {_AGAIN}, or "
            "unpack it if it is compressed"
        ) from error


def _visible_name(member: tarfile.TarInfo) -> str:
    """Returns the name of a file without its folders; "" for folders and hidden files."""
    parts = [part for part in member.name.split("/") if part not in ("", ".", "..")]
    hidden = member.isdir() or any(map(is_hidden, parts))
    return "" if hidden or not parts else parts[-1]


def _class_folders(folder: Path) -> Pairs:
    """Yields the images of one folder per class."""
    classes, seen = set(_read_lines(_CLASSES)), set()
    for wordnet_id in list_folders(folder):
        if wordnet_id not in classes:
            raise UserError(
                f"{folder} contains the folder {wordnet_id!r}; expected one per class, such as "
                "'n01440764'"
            )
        for path in map(Path, list_images(folder / wordnet_id)):
            if path.name in seen:
                raise UserError(f"{folder} contains {path.name!r} twice, again in {wordnet_id}")
            seen.add(path.name)
            content = read_file(folder / wordnet_id / path)
            yield _example(path.name, content, wordnet_id, folder)


def _unpacked(folder: Path) -> Pairs:
    """Yields the validation images of a folder, which may have a folder per class."""
    if list_folders(folder):
        yield from _class_folders(folder)
        return
    labels = _read_lines(_VALIDATION_LABELS)
    for name in list_images(folder):
        content = read_file(folder / name)
        yield _example(name, content, _label_of(name, labels, folder), folder)


def _label_of(name: str, labels: list[str], source: Path) -> str:
    """Returns the WordNet id of a validation image; the first is ILSVRC2012_val_00000001.JPEG."""
    match = re.fullmatch(r"ILSVRC2012_val_([0-9]{8})\.jpe?g", name, re.IGNORECASE)
    number = int(match[1]) if match else 0
    if not 1 <= number <= len(labels):
        raise UserError(
            f"{source} contains {name!r}; expected ILSVRC2012_val_00000001.JPEG to "
            f"ILSVRC2012_val_{len(labels):08d}.JPEG"
        )
    return labels[number - 1]


def _example(
    file_name: str, encoded: bytes, wordnet_id: str, source: Path
) -> tuple[str, dict[str, Any]]:
    if not encoded:
        raise UserError(f"{source} contains {file_name!r}, which is empty; {_AGAIN}")
    return file_name, {
        "image": io.BytesIO(encoded),
        "label": wordnet_id,
        "file_name": file_name,
    }
