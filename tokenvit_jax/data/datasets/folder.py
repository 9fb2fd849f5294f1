"""A folder of images, `config.data.data_dir`: a folder per class, or label maps beside the images.

    train/CLASS/**  val/CLASS/**                         classification
    train/images/** train/labels/** val/... classes.txt  segmentation (or images/train/** and so on)

With `config.data.split` above 0, one folder holds all images, without the level train and val: this
share of them, drawn by `config.seed`, is kept for evaluation (classification: of every class).

Label maps are image files with one byte per pixel, at the path of their image except for the
suffix. `classes.txt` names one class per line, for the values 0, 1, ...; 255 does not count.
Everything that Pillow reads is an image; hidden files and folders are passed over.
"""

import abc
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from ml_collections import ConfigDict

from tokenvit_jax.data.class_names import different_names, labels_by_value
from tokenvit_jax.data.datasets import none
from tokenvit_jax.data.decoding import open_image
from tokenvit_jax.data.files import list_folders, list_images, read_text
from tokenvit_jax.data.held_out import held_out
from tokenvit_jax.data.label_maps import decode_label_map, label_table
from tokenvit_jax.data.record import IGNORED, DatasetInfo, Record, Source, label_field
from tokenvit_jax.errors import UserError

CLASSES_FILE = "classes.txt"

# ------------------------------------------------------------------------------------------------
# The dataset
# ------------------------------------------------------------------------------------------------


def read_info(config: ConfigDict) -> DatasetInfo:
    """Returns the facts about a folder; its files are not read if the configuration has classes.

    Args:
      config: reads `task`, `data.data_dir`, `data.split` and `data.classes`.

    Raises:
      UserError: the folder has no classes, or its splits have different ones.
    """
    label_field(config)  # refuses tasks that cannot use it, before any file is read
    info = dataclasses.replace(none.read_info(config), name="folder")
    if info.classes:
        return info
    classes = _read_classes(config)
    if len(classes) == 1:
        raise UserError(f"{_root(config)} has one class, {classes[0]!r}; valid: two or more")
    return dataclasses.replace(info, classes=classes, num_classes=len(classes))


def open_split(config: ConfigDict, split: str) -> Source:
    """Lists the images of a split, "train" or "val".

    Args:
      config: as for :func:`read_info`, and `seed`.
      split: name of the split.

    Raises:
      UserError: there are no images, or they do not fit the classes of the configuration.
    """
    classes = read_info(config).classes
    open_files = _open_label_maps if _has_label_maps(config) else _open_classes
    return open_files(config, split, classes)


def _has_label_maps(config: ConfigDict) -> bool:
    return label_field(config) == "label_map"


def _read_classes(config: ConfigDict) -> tuple[str, ...]:
    root = _root(config)
    if _has_label_maps(config):
        return _names_in(root / CLASSES_FILE)
    if config.data.split:
        return _class_folders(_split_folder(config, "train"))
    splits = [split for split in ("train", "val") if (root / split).is_dir()] or ["train"]
    found = [_class_folders(_split_folder(config, split)) for split in splits]
    if found[0] != found[-1]:  # a folder for evaluation need not have both
        raise UserError(f"the classes of {root / 'val'} differ: {different_names(*found)}")
    return found[0]


def _root(config: ConfigDict) -> Path:
    root = Path(os.path.expanduser(config.data.data_dir))
    if not root.is_dir():
        raise UserError(f"config.data.data_dir={config.data.data_dir} is no folder")
    return root


# ------------------------------------------------------------------------------------------------
# A folder per class
# ------------------------------------------------------------------------------------------------


def _open_classes(config: ConfigDict, split: str, classes: Sequence[str]) -> "ClassFiles":
    folder = _split_folder(config, split)
    found = _class_folders(folder)
    if set(found) != set(classes):
        raise UserError(
            f"the classes of {folder} differ from config.data.classes: "
            f"{different_names(classes, found)}"
        )
    files = []
    for label, name in enumerate(classes):
        paths = [f"{name}/{path}" for path in list_images(folder / name)]
        if not paths:
            raise UserError(f"{folder / name} holds no image that Pillow reads, such as a .jpg")
        files += [(path, label) for path in _part(paths, split, config)]
    _check_not_empty(files, split, config)
    return ClassFiles(folder, split, files)


def _split_folder(config: ConfigDict, split: str) -> Path:
    """Returns the folder with the classes of a split."""
    root, share = _root(config), config.data.split
    if not share and not (root / split).is_dir():
        raise UserError(
            f"{root} has no folder {split!r}, it has {_listed(list_folders(root))}; valid: "
            "train/CLASS/* and val/CLASS/*, or CLASS/* with --config.data.split=0.1"
        )
    if share and {"train", "val"} <= set(list_folders(root)):
        raise UserError(
            f"config.data.split={share} is for one folder of classes, {root} has train and val; "
            f"valid: 0, or --config.data.data_dir={root / 'train'}"
        )
    return root if share else root / split


def _class_folders(folder: Path) -> tuple[str, ...]:
    names = list_folders(folder)
    if not names:
        raise UserError(f"{folder} has no classes; valid: one folder per class, with its images")
    for name in names:
        if not name.isprintable():  # bytes that are not UTF-8, or line breaks
            raise UserError(f"{folder} has the folder {name!r}; valid: names that can be printed")
    return names


class _Files(abc.ABC):
    """The image files of a split."""

    def __init__(self, folder: Path, split: str, paths: Sequence[str]):
        self._folder = folder
        self._split = split
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, index: int) -> str:
        """See :class:`tokenvit_jax.data.record.Source`."""
        path = self._folder / self._paths[index]
        return f"folder split {self._split!r}, record {index} ({path})"

    def read(self, index: int) -> Record:
        """See :class:`tokenvit_jax.data.record.Source`."""
        try:
            return Record(id=index) | self._fields(index)
        except UserError as error:
            raise UserError(f"{self.name(index)}: {error}") from error

    @abc.abstractmethod
    def _fields(self, index: int) -> Record:
        """Returns the fields of a record besides "id"."""


class ClassFiles(_Files):
    """Images with one class each; a rotation noted in EXIF is applied.

    Args:
      folder: folder of the paths.
      split: name of the split.
      files: (path, label) pairs.
    """

    def __init__(self, folder: Path, split: str, files: Sequence[tuple[str, int]]):
        super().__init__(folder, split, [path for path, _ in files])
        self._labels = [label for _, label in files]

    def _fields(self, index: int) -> Record:
        image = open_image(self._folder / self._paths[index], upright=True)
        return Record(image=image, label=self._labels[index])


# ------------------------------------------------------------------------------------------------
# Label maps
# ------------------------------------------------------------------------------------------------


def _open_label_maps(config: ConfigDict, split: str, classes: Sequence[str]) -> "LabelMapFiles":
    table = _label_table(_root(config) / CLASSES_FILE, classes)
    images, labels = _image_folders(config, split)
    by_stem = {}
    for path in list_images(labels):
        other = by_stem.setdefault(_stem(path), path)
        if other != path:
            raise UserError(f"{labels} has two label maps for one image: {other} and {path}")
    paths = list_images(images)
    missing = [path for path in paths if _stem(path) not in by_stem]
    if missing:
        raise UserError(
            f"{images / missing[0]} has no label map in {labels} ({len(missing)} of {len(paths)})"
        )
    unused = sorted(by_stem.keys() - set(map(_stem, paths)))
    if unused:
        raise UserError(f"{labels / by_stem[unused[0]]} has no image in {images} ({len(unused)})")
    files = [(path, by_stem[_stem(path)]) for path in _part(paths, split, config)]
    _check_not_empty(files, split, config)
    return LabelMapFiles(images, labels, split, files, table)


def _image_folders(config: ConfigDict, split: str) -> tuple[Path, Path]:
    """Returns the folders with the images and with the label maps of a split."""
    root = _root(config)
    if config.data.split:
        pairs = [(root / "images", root / "labels")]
        valid = "images/* and labels/*"
    else:
        pairs = [
            (root / split / "images", root / split / "labels"),
            (root / "images" / split, root / "labels" / split),
        ]
        valid = (
            f"{split}/images/* and {split}/labels/*, or images/* and labels/* with "
            "--config.data.split=0.1"
        )
    for images, labels in pairs:
        if images.is_dir() and labels.is_dir():
            return images, labels
    raise UserError(f"{root} has the folders {_listed(list_folders(root))}; valid: {valid}")


def _label_table(file: Path, classes: Sequence[str]) -> np.ndarray:
    """Returns the label of every value in the maps; the labels follow the names of the run."""
    names = _names_in(file) if file.is_file() else classes
    if set(names) != set(classes):
        raise UserError(
            f"{file} differs from config.data.classes: {different_names(classes, names)}"
        )
    if len(names) > IGNORED:
        raise UserError(f"{file} has {len(names)} classes; valid: up to {IGNORED}")
    return label_table(labels_by_value(names, classes) | {IGNORED: IGNORED})


def _names_in(file: Path) -> tuple[str, ...]:
    if not file.is_file():
        raise UserError(f"{file} not found; valid: one class per line, for the values 0, 1, ...")
    names = tuple(line.strip() for line in read_text(file).strip().splitlines())
    if not all(names) or len(set(names)) != len(names):
        raise UserError(f"{file} has an empty line, a name twice or no name; valid: one per line")
    return names


def _stem(path: str) -> str:
    return str(PurePosixPath(path).with_suffix(""))


class LabelMapFiles(_Files):
    """Images with a label map each, as they are stored: a rotation noted in EXIF is not applied.

    Args:
      images: folder with the images.
      labels: folder with the label maps.
      split: name of the split.
      files: (path of the image, path of the label map) pairs.
      table: label of every value in the label maps.
    """

    def __init__(
        self,
        images: Path,
        labels: Path,
        split: str,
        files: Sequence[tuple[str, str]],
        table: np.ndarray,
    ):
        super().__init__(images, split, [path for path, _ in files])
        self._maps = [labels / path for _, path in files]
        self._table = table

    def _fields(self, index: int) -> Record:
        image = open_image(self._folder / self._paths[index])
        try:
            labels = decode_label_map(self._maps[index], self._table, image.size)
        except UserError as error:
            raise UserError(f"{self._maps[index]}: {error}") from error
        return Record(image=image, label_map=labels)


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------


def _part(paths: Sequence[str], split: str, config: ConfigDict) -> list[str]:
    """Returns the paths that belong to a split; all of them if the split has its own folder."""
    if not config.data.split:
        return list(paths)
    kept = held_out(paths, config.data.split, config.seed)
    return [path for path in paths if (path in kept) == (split == "val")]


def _check_not_empty(files: Sequence[object], split: str, config: ConfigDict) -> None:
    if not files:
        message = f"{_root(config)} has no image for the split {split!r}"
        if config.data.split:
            message += f"; config.data.split={config.data.split} needs at least one for each part"
        raise UserError(message)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "") if names else "no folder"
