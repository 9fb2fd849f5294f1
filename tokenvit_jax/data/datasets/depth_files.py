"""Prepares datasets with a depth map per image from their unpacked archives and lists of files.

The files are stored unchanged. Nothing is downloaded, and TensorFlow is not needed.
"""

import dataclasses
import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from tokenvit_jax.data.decoding import opened
from tokenvit_jax.data.depth_maps import decode_depth
from tokenvit_jax.data.files import read_file, read_text
from tokenvit_jax.data.record import DatasetInfo, Record
from tokenvit_jax.data.tfds_files import Pairs, TfdsSource, is_prepared, open_records, write_splits
from tokenvit_jax.errors import UserError
from tokenvit_jax.progress import note

# The datasets share this folder, as tensorflow_datasets has other datasets with their names.
FOLDER = "depth"
VERSION = "1.0.0"
_WITHOUT = "None"  # stands in a list for a depth map that the dataset does not have


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the files of a dataset are in `manual_dir`, and what its depth maps mean.

    Attributes:
      lists: split -> file of BTS with a line "image depth focal_length" for each record.
      folders: folders in which the listed files may lie, relative to `manual_dir`.
      steps: values of the depth maps per metre.
      how_to_get: instructions for the user.
    """

    lists: dict[str, str]
    folders: tuple[str, ...]
    steps: int
    how_to_get: str


class Files(NamedTuple):
    """Paths of an image and its depth map, and their name in the dataset."""

    image: Path
    depth: Path
    name: str


class DepthSource(TfdsSource):
    """Images with a depth map each."""

    def __init__(self, info: DatasetInfo, layout: Layout, split: str, data_dir: str):
        records = open_records(
            info.name, split, data_dir, f"{FOLDER}/{info.name}", ("image", "depth")
        )
        super().__init__(info.name, split, records)
        self._steps = layout.steps

    def ground_truth(self, features: dict[str, Any], image: Image.Image) -> Record:
        """See :class:`tokenvit_jax.data.tfds_files.TfdsSource`."""
        return Record(depth=decode_depth(features["depth"], self._steps, image.size))


def prepare(name: str, layout: Layout, manual_dir: Path, data_dir: Path) -> Path:
    """Writes a dataset as ArrayRecord files; does nothing if they exist.

    Args:
      name: name of the dataset.
      layout: files that `manual_dir` must hold.
      manual_dir: folder with the unpacked archives and the lists.
      data_dir: receives the folder `depth/NAME/1.0.0`.

    Returns:
      The folder with the files.

    Raises:
      UserError: a file is missing or unreadable, a depth map has another bit depth or size than it
        should, or no known pixel; the message names the file.
    """
    folder = data_dir / FOLDER / name / VERSION
    if is_prepared(folder):
        return folder
    listed = {split: find_files(layout, manual_dir, split) for split in layout.lists}
    write(name, {split: _examples(layout, files) for split, files in listed.items()}, data_dir)
    return folder


def write(name: str, splits: dict[str, Pairs], data_dir: Path) -> None:
    """Writes the encoded images, depth maps and file names of a dataset."""
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Image(),
        "depth": tfds.features.Image(shape=(None, None, 1), dtype=np.uint16, encoding_format="png"),
        "file_name": tfds.features.Text(),
    }
    write_splits(data_dir, f"{FOLDER}/{name}", VERSION, features, splits)


def find_files(layout: Layout, manual_dir: Path, split: str) -> list[Files]:
    """Returns the files of a split in the order of its list.

    Raises:
      UserError: the list is missing or malformed, or a listed file is missing.
    """
    path = manual_dir / layout.lists[split]
    if not path.is_file():
        raise UserError(
            f"{layout.lists[split]} not found in --manual_dir={manual_dir}; {layout.how_to_get}"
        )
    found, missing, without = [], [], 0
    for number, line in enumerate(read_text(path).splitlines(), 1):
        names = [part.lstrip("/") for part in line.split()[:2]]
        if not names:
            continue
        if len(names) < 2:
            raise UserError(f"{path}, line {number}: {line.strip()!r}; valid: image depth focal")
        if names[1] == _WITHOUT:
            without += 1
            continue
        paths = [_place(manual_dir, layout.folders, name) for name in names]
        missing += [name for name, file in zip(names, paths, strict=True) if file is None]
        found.append(Files(*paths, names[0]))
    if missing:
        more = f" (the first of {len(missing):,})" if len(missing) > 1 else ""
        places = ", ".join(folder or "." for folder in layout.folders)
        raise UserError(
            f"{missing[0]} is missing, but listed in {path}{more}; looked in {places} of "
            f"--manual_dir={manual_dir}; {layout.how_to_get}"
        )
    if without:
        note(f"{split}: {without:,} images of the list have no depth map and are left out")
    return found


def _place(manual_dir: Path, folders: tuple[str, ...], name: str) -> Path | None:
    paths = (manual_dir / folder / name for folder in folders)
    return next((path for path in paths if path.is_file()), None)


def _examples(layout: Layout, files: list[Files]) -> Pairs:
    for image, depth, name in files:
        file = image
        try:
            with opened(image, "an image") as stored:
                size = stored.size
            file = depth
            decode_depth(depth, layout.steps, size)
        except UserError as error:
            raise UserError(f"{file}: {error}") from error
        contents = {"image": read_file(image), "depth": read_file(depth)}
        yield (
            name,
            {key: io.BytesIO(content) for key, content in contents.items()} | {"file_name": name},
        )
