"""Prepares datasets of segments from image files and COCO's panoptic files.

A file of annotations lists the segments of every image, and a PNG file of each image holds the
segment of every pixel. Both kinds of image files are stored unchanged, with the list of segments.
Nothing is downloaded, and TensorFlow is not needed.
"""

import dataclasses
import functools
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tokenvit_jax.data.datasets.coco_json import (
    CATEGORY_FIELDS,
    ID,
    IMAGE_FIELDS,
    TEXT,
    Entries,
    Rule,
    category_labels,
    check_files,
    check_size,
    check_unique,
    check_values,
    is_whole,
    read_entries,
)
from tokenvit_jax.data.files import read_file
from tokenvit_jax.data.record import DatasetInfo, Record
from tokenvit_jax.data.segments import MAX_ID, decode_ids, read_segments
from tokenvit_jax.data.tfds_files import Pairs, SizedSource, is_prepared, write_splits
from tokenvit_jax.errors import UserError

# The datasets share this folder, as tensorflow_datasets has other datasets with their names.
FOLDER = "panoptic"
VERSION = "1.0.0"

_IS_FLAG: Rule = lambda value: value in (0, 1), "0 or 1"
_FIELDS = {
    "images": IMAGE_FIELDS,
    "annotations": {
        "image_id": ID,
        "file_name": TEXT,
        "segments_info": (
            lambda value: type(value) is list and all(type(entry) is dict for entry in value),
            "a list of segments",
        ),
    },
    "categories": CATEGORY_FIELDS | {"isthing": _IS_FLAG},
}
_SEGMENT_FIELDS: dict[str, Rule] = {
    "id": (functools.partial(is_whole, low=1, high=MAX_ID), f"1 to {MAX_ID:,}"),
    "category_id": ID,
    "area": (is_whole, "a number of pixels"),
    "iscrowd": _IS_FLAG,
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the files of a dataset are in `manual_dir`.

    Attributes:
      images: split -> folder of its images.
      annotations: split -> file with its annotations.
      segments: split -> folders that may hold its PNG files, the first one that exists.
      how_to_get: instructions for the user.
    """

    images: dict[str, str]
    annotations: dict[str, str]
    segments: dict[str, tuple[str, ...]]
    how_to_get: str


class PanopticSource(SizedSource):
    """Images with their segments.

    Args:
      info: facts about the dataset.
      split: one of its splits.
      data_dir: the folder that `prepare` wrote into.
      labels: other features with PNG files, which a subclass decodes.
    """

    def __init__(self, info: DatasetInfo, split: str, data_dir: str, labels: tuple[str, ...] = ()):
        undecoded = ("image", "segments", *labels)
        super().__init__(info.name, split, data_dir, f"{FOLDER}/{info.name}", undecoded)

    def ground_truth(self, features: Entries, image: Image.Image) -> Record:
        """See :class:`tokenvit_jax.data.tfds_files.TfdsSource`."""
        ids = decode_ids(features["segments"], image.size)
        segments = read_segments(ids, json.loads(features["entries"]))
        return Record(id=int(features["image_id"]), segments=segments)


def prepare(info: DatasetInfo, layout: Layout, manual_dir: Path, data_dir: Path) -> Path:
    """Writes a dataset as ArrayRecord files; does nothing if they exist.

    Args:
      info: facts about the dataset.
      layout: files that `manual_dir` must hold.
      manual_dir: folder with the unpacked archives.
      data_dir: receives the folder `panoptic/NAME/1.0.0`.

    Returns:
      The folder with the files.

    Raises:
      UserError: a file is missing or malformed, an identifier occurs twice, a category is unknown,
        the PNG file of an image has other segments than the annotations say, or a file has another
        size; the message names the file and the identifier.
    """
    folder = data_dir / FOLDER / info.name / VERSION
    if is_prepared(folder):
        return folder
    files = {split: _read(layout, manual_dir, split, info) for split in layout.images}
    sizes = {
        split: [(image["width"], image["height"]) for image in file.content["images"]]
        for split, file in files.items()
    }
    splits = {split: _examples(file) for split, file in files.items()}
    write(info.name, data_dir, splits, sizes)
    return folder


def write(
    name: str,
    data_dir: Path,
    splits: Mapping[str, Pairs],
    sizes: dict[str, list[tuple[int, int]]],
    labels: Iterable[str] = (),
    **metadata: Any,
) -> None:
    """Writes a dataset of images with segments.

    Args:
      name: name of the dataset.
      data_dir: receives the folder `panoptic/NAME/1.0.0`.
      splits: name of a split -> its records in their order, as `stored` makes them.
      sizes: name of a split -> width and height of its images [pixels].
      labels: names of other features with label maps.
      **metadata: what :func:`tokenvit_jax.data.tfds_files.read_metadata` returns beside "sizes".
    """
    import tensorflow_datasets as tfds

    png = functools.partial(tfds.features.Image, encoding_format="png")
    features = {
        "image": tfds.features.Image(),
        "segments": png(shape=(None, None, 3)),
        "entries": tfds.features.Text(),
        "image_id": np.int64,
        "file_name": tfds.features.Text(),
        **{label: png(shape=(None, None, 1)) for label in labels},
    }
    write_splits(
        data_dir, f"{FOLDER}/{name}", VERSION, features, dict(splits),
        metadata=tfds.core.MetadataDict(metadata, sizes=sizes), disable_shuffling=True,
    )  # fmt: skip


def stored(
    image: bytes, ids: bytes, entries: list[dict[str, int]], image_id: int, file_name: str
) -> dict[str, Any]:
    """Returns a record as it is written.

    Args:
      image: contents of the image file.
      ids: contents of the PNG file with the segment of every pixel.
      entries: its segments, as :func:`tokenvit_jax.data.segments.segment_entries` returns them.
      image_id: identifier of the image.
      file_name: name of the image file in messages.
    """
    return {
        "image": io.BytesIO(image),
        "segments": io.BytesIO(ids),
        "entries": json.dumps(entries),
        "image_id": image_id,
        "file_name": file_name,
    }


@dataclasses.dataclass(frozen=True)
class AnnotationFile:
    """A file of annotations that has been checked, with the folders of its image files.

    Attributes:
      path: the file.
      content: "images", "annotations" and "categories".
      labels: identifier of a category -> class.
      images: folder of the images.
      segments: folder of the PNG files.
    """

    path: Path
    content: Entries
    labels: dict[int, int]
    images: Path
    segments: Path


def _read(layout: Layout, manual_dir: Path, split: str, info: DatasetInfo) -> AnnotationFile:
    path = manual_dir / layout.annotations[split]
    content = read_entries(path, manual_dir, layout.how_to_get, _FIELDS)
    labels = category_labels(path, content["categories"], info)
    for category in content["categories"]:
        is_thing = labels[category["id"]] in info.things
        if category["isthing"] != is_thing:
            raise UserError(
                f"{path}: category {category['id']} ({category['name']}) has isthing="
                f"{category['isthing']}; in {info.name} it is {int(is_thing)}"
            )
    folders = [manual_dir / folder for folder in layout.segments[split]]
    segments = next((folder for folder in folders if folder.is_dir()), folders[0])
    file = AnnotationFile(path, content, labels, manual_dir / layout.images[split], segments)
    _check(file)
    return file


def _check(file: AnnotationFile) -> None:
    """Raises UserError for identifiers that do not fit together, and missing files."""
    path, (images, annotations, categories) = file.path, map(file.content.get, _FIELDS)
    check_unique(path, "images", images)
    check_unique(path, "categories", categories)
    check_unique(path, "annotations", annotations, "image_id")
    known = {image["id"] for image in images}
    annotated = {annotation["image_id"] for annotation in annotations}
    for identifier in sorted(annotated - known):
        raise UserError(
            f"{path}: an annotation has image_id {identifier}, which the file does not list"
        )
    for identifier in sorted(known - annotated):
        raise UserError(f"{path}: image {identifier} has no annotation; valid: one for each image")
    for annotation in annotations:
        where = f"{path}: segments of image {annotation['image_id']}"
        entries = [{"iscrowd": 0} | entry for entry in annotation["segments_info"]]
        check_values(where, entries, _SEGMENT_FIELDS)
        for entry in entries:
            if entry["category_id"] not in file.labels:
                raise UserError(
                    f"{where}: segment {entry['id']} has category_id {entry['category_id']}, which "
                    "the file does not list"
                )
        check_unique(path, f"segments of image {annotation['image_id']}", entries)
        annotation["segments_info"] = entries
    check_files(file.images, path, images)
    check_files(file.segments, path, [entry | {"id": entry["image_id"]} for entry in annotations])


def _examples(file: AnnotationFile) -> Pairs:
    annotations = {entry["image_id"]: entry for entry in file.content["annotations"]}
    for number, image in enumerate(file.content["images"]):
        annotation = annotations[image["id"]]
        content = read_file(file.images / image["file_name"])
        check_size(file.images / image["file_name"], content, image)
        png = file.segments / annotation["file_name"]
        ids = read_file(png)
        _check_ids(png, ids, image, annotation["segments_info"])
        entries = [
            entry | {"category_id": file.labels[entry["category_id"]] + 1}
            for entry in annotation["segments_info"]
        ]
        yield number, stored(content, ids, entries, image["id"], image["file_name"])


def _check_ids(path: Path, content: bytes, image: Entries, entries: list[Entries]) -> None:
    """Raises UserError if a PNG file and the list of its segments do not fit."""
    try:
        found = decode_ids(content, (image["width"], image["height"]))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    drawn = set(np.unique(found).tolist()) - {0}
    listed = {entry["id"] for entry in entries}
    for identifier in sorted(drawn - listed):
        raise UserError(
            f"{path}: pixels have the id {identifier}, which is no segment of image {image['id']} "
            "in the annotations"
        )
    for identifier in sorted(listed - drawn):
        raise UserError(f"{path}: no pixel has segment {identifier} of image {image['id']}")
