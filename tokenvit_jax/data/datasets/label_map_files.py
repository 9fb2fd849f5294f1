"""Prepares datasets with a label map per image from their unpacked archives.

Image files are stored unchanged. Label maps are stored as PNG files with the training labels: 0
upwards, and 255 for pixels that do not count. Nothing is downloaded, and TensorFlow is not needed.
"""

import dataclasses
import io
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from tokenvit_jax.data.decoding import opened
from tokenvit_jax.data.files import is_hidden, read_file, read_text
from tokenvit_jax.data.label_maps import decode_label_map, label_table
from tokenvit_jax.data.record import IGNORED, DatasetInfo, Record
from tokenvit_jax.data.tfds_files import Pairs, TfdsSource, is_prepared, open_records, write_splits
from tokenvit_jax.errors import UserError

# The datasets share this folder, as tensorflow_datasets has other datasets with their names.
FOLDER = "segmentation"
VERSION = "1.0.0"


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the files of a dataset are in `manual_dir`, and what the values of its label maps mean.

    Attributes:
      images: split -> pattern of its image files.
      lists: split -> file that lists the strings to put in place of the pattern's star; None: all
        images that match the pattern.
      replace: substitutions that turn the path of an image into the path of its label map.
      labels: value in the label maps -> label in training.
      how_to_get: instructions for the user.
    """

    images: dict[str, str]
    lists: dict[str, str] | None
    replace: tuple[tuple[str, str], ...]
    labels: dict[int, int]
    how_to_get: str

    def label_path(self, image_path: str) -> str:
        """Returns the path of an image's label map; accepts a pattern, too."""
        for image_part, label_part in self.replace:
            image_path = image_path.replace(image_part, label_part)
        return image_path


class LabelMapSource(TfdsSource):
    """Images with a label map each."""

    def __init__(self, info: DatasetInfo, split: str, data_dir: str):
        folder, undecoded = f"{FOLDER}/{info.name}", ("image", "label")
        records = open_records(info.name, split, data_dir, folder, undecoded)
        super().__init__(info.name, split, records)
        labels = (*range(info.num_classes), IGNORED)
        self._table = label_table({label: label for label in labels})

    def ground_truth(self, features: dict[str, Any], image: Image.Image) -> Record:
        """See :class:`tokenvit_jax.data.tfds_files.TfdsSource`."""
        return Record(label_map=decode_label_map(features["label"], self._table, image.size))


def parse_names(text: str) -> tuple[str, ...]:
    """Returns the names of classes from a text that separates them by commas."""
    return tuple(" ".join(text.split()).split(", "))


def prepare(name: str, layout: Layout, manual_dir: Path, data_dir: Path) -> Path:
    """Writes a dataset as ArrayRecord files; does nothing if they exist.

    Args:
      name: name of the dataset.
      layout: files that `manual_dir` must hold.
      manual_dir: folder with the unpacked archives.
      data_dir: receives the folder `segmentation/NAME/1.0.0`.

    Returns:
      The folder with the files.

    Raises:
      UserError: a file is missing, or a label map has a wrong size or an unknown value; the message
        names the file.
    """
    folder = data_dir / FOLDER / name / VERSION
    if is_prepared(folder):
        return folder
    images = {split: find_images(layout, manual_dir, split) for split in layout.images}
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Image(),
        "label": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
        "file_name": tfds.features.Text(),
    }
    splits = {split: _examples(layout, manual_dir, paths) for split, paths in images.items()}
    write_splits(data_dir, f"{FOLDER}/{name}", VERSION, features, splits)
    return folder


def _examples(layout: Layout, manual_dir: Path, files: list[tuple[Path, Path]]) -> Pairs:
    table = label_table(layout.labels)
    for image, label in files:
        name = image.relative_to(manual_dir).as_posix()
        stored = {"image": io.BytesIO(read_file(image)), "file_name": name}
        labels = encode_labels(read_label_map(image, label, table))
        yield name, stored | {"label": io.BytesIO(labels)}


def find_images(layout: Layout, manual_dir: Path, split: str) -> list[tuple[Path, Path]]:
    """Returns the images of a split and their label maps, sorted.

    Raises:
      UserError: there are no images, an image has no label map, or a label map has no image.
    """
    pattern = layout.images[split]
    found, labels = _glob(manual_dir, pattern), _glob(manual_dir, layout.label_path(pattern))
    if layout.lists is None:
        where, images = pattern, set(found)
        others = labels.keys() - set(map(layout.label_path, images))
        _check_none(others, "is a label map without an image", manual_dir)
    else:
        where, images = layout.lists[split], _listed(manual_dir / layout.lists[split], pattern)
        _check_none(images - found.keys(), f"is missing, but listed in {where}", manual_dir)
    if not images:
        raise UserError(f"{where} not found in --manual_dir={manual_dir}; {layout.how_to_get}")
    without = {image for image in images if layout.label_path(image) not in labels}
    _check_none(without, "is an image without a label map", manual_dir)
    return [(found[image], labels[layout.label_path(image)]) for image in sorted(images)]


def _glob(folder: Path, pattern: str) -> dict[str, Path]:
    """Returns the visible files that match a pattern, by their paths with the pattern's suffix.

    Suffixes may be in upper case, and .jpeg stands for .jpg.
    """
    suffix, found = PurePosixPath(pattern).suffix, {}
    for file in folder.glob(f"{pattern.removesuffix(suffix)}.*"):
        path = file.relative_to(folder)
        same = file.suffix.lower().replace(".jpeg", ".jpg") == suffix
        if same and not any(map(is_hidden, path.parts)):
            other = found.setdefault(path.with_suffix(suffix).as_posix(), file)
            if other != file:
                raise UserError(f"{other} and {file.name} are the same image; delete one of them")
    return found


def _listed(file: Path, pattern: str) -> set[str]:
    stems = read_text(file).split() if file.is_file() else ()
    return {pattern.replace("*", stem) for stem in stems}


def _check_none(paths: set[str], what: str, folder: Path) -> None:
    if paths:
        more = f" (the first of {len(paths)})" if len(paths) > 1 else ""
        raise UserError(f"{folder / min(paths)} {what}{more}")


def read_label_map(image: Path, label: Path, table: np.ndarray) -> np.ndarray:
    """Returns the labels of an image, uint8 (H, W).

    Args:
      image: the image file.
      label: its label map.
      table: value -> label, from :func:`tokenvit_jax.data.label_maps.label_table`.

    Raises:
      UserError: a file cannot be read, or they do not fit; the message names the file.
    """
    size = read_size(image)
    try:
        return decode_label_map(label, table, size)
    except UserError as error:
        raise UserError(f"{label}: {error}") from error


def read_size(path: Path) -> tuple[int, int]:
    """Returns width and height of an image file [pixels].

    Raises:
      UserError: the file cannot be read; the message names it.
    """
    try:
        with opened(path, "an image") as image:
            return image.size
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def encode_labels(labels: np.ndarray) -> bytes:
    """Returns a PNG file with labels, uint8 (H, W)."""
    buffer = io.BytesIO()
    Image.fromarray(labels).save(buffer, "PNG")
    return buffer.getvalue()
