"""Prepares datasets of objects from image files and annotations in COCO's format.

Image files are stored unchanged, with their objects; masks become run-length encodings. What
evaluation compares with, all objects of the evaluation split as they are in the file, and the sizes
of the training images are in the metadata. Nothing is downloaded, and TensorFlow is not needed.
"""

import dataclasses
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tokenvit_jax.data.datasets.coco_json import (
    AREA,
    BOX,
    CATEGORY_FIELDS,
    ID,
    IMAGE_FIELDS,
    Entries,
    Rule,
    box_fault,
    category_labels,
    check_files,
    check_identifiers,
    check_size,
    is_finite,
    note_faults,
    read_entries,
)
from tokenvit_jax.data.files import read_file
from tokenvit_jax.data.label_maps import decode_label_map, label_table
from tokenvit_jax.data.record import IGNORED, DatasetInfo, Instances, Record
from tokenvit_jax.data.stuff_maps import FIELD
from tokenvit_jax.data.tfds_files import (
    Pairs,
    SizedSource,
    is_prepared,
    list_versions,
    read_metadata,
    write_splits,
)
from tokenvit_jax.errors import UserError

# The datasets share this folder, as tensorflow_datasets has other datasets with their names.
FOLDER = "detection"
VERSION = "1.0.0"
MIN_SIDE = 32  # of a training image [pixels]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the files of a dataset are in `manual_dir`.

    Attributes:
      images: split -> folder of its images.
      annotations: split -> file with its annotations.
      how_to_get: instructions for the user.
      stuff: split -> folder of its maps of stuff, PNG files named like the images. They are
        optional: without all of these folders, no record has a map.
      num_stuff: classes of these maps; 255: none.
    """

    images: dict[str, str]
    annotations: dict[str, str]
    how_to_get: str
    stuff: dict[str, str] = dataclasses.field(default_factory=dict)
    num_stuff: int = 0


class CocoSource(SizedSource):
    """Images with their objects; training images also with maps of stuff, if they were prepared."""

    def __init__(self, info: DatasetInfo, split: str, data_dir: str):
        folder = f"{FOLDER}/{info.name}"
        has_stuff = split in _splits_with_stuff(folder, data_dir)
        undecoded = ("image", FIELD) if has_stuff else ("image",)
        super().__init__(info.name, split, data_dir, folder, undecoded)
        self._has_stuff = has_stuff and split == info.train_split

    def ground_truth(self, features: Entries, image: Image.Image) -> Record:
        """See :class:`tokenvit_jax.data.tfds_files.TfdsSource`."""
        objects = json.loads(features["objects"])
        instances = Instances(
            boxes=np.array([entry["box"] for entry in objects], np.float32).reshape(-1, 4),
            classes=np.array([entry["class"] for entry in objects], np.int32),
            crowd=np.array([entry["crowd"] for entry in objects], bool),
            masks=[entry["mask"] for entry in objects],
        )
        record = Record(id=int(features["image_id"]), instances=instances)
        if self._has_stuff:
            record["stuff_map"] = decode_label_map(features[FIELD], _ALL_VALUES, image.size)
        return record


_ALL_VALUES = label_table({value: value for value in range(256)})  # `prepare` checks them


def _splits_with_stuff(folder: str, data_dir: str) -> Sequence[str]:
    """Returns the splits whose records have maps of stuff; none if nothing was prepared."""
    if not list_versions(Path(os.path.expanduser(data_dir)) / folder):
        return ()
    return read_metadata(folder, data_dir).get("stuff", ())


def read_annotations(name: str, data_dir: str, split: str) -> Entries:
    """Returns all objects of a prepared evaluation split in COCO's format.

    Args:
      name: name of the dataset.
      data_dir: the folder that `prepare` wrote into.
      split: name of the split.
    """
    return read_metadata(f"{FOLDER}/{name}", data_dir)["ground_truth"][split]


def prepare(info: DatasetInfo, layout: Layout, manual_dir: Path, data_dir: Path) -> Path:
    """Writes a dataset as ArrayRecord files; does nothing if they exist.

    Training images are those with an annotation and sides from 32 pixels on. Annotations without
    area, thinner than a pixel, or outside of their image are left out, as MMDetection does.

    Args:
      info: facts about the dataset.
      layout: files that `manual_dir` must hold.
      manual_dir: folder with the unpacked archives.
      data_dir: receives the folder `detection/NAME/1.0.0`.

    Returns:
      The folder with the files.

    Raises:
      UserError: a file is missing or malformed, an identifier occurs twice, a category is unknown,
        or an image, a mask or a map of stuff has another size than the annotations say; the message
        names the file and the identifier.
    """
    folder = data_dir / FOLDER / info.name / VERSION
    if is_prepared(folder):
        return folder
    files = {split: _read(layout, manual_dir, split, info) for split in layout.images}
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Image(),
        "image_id": np.int64,
        "objects": tfds.features.Text(),
        "file_name": tfds.features.Text(),
    }
    kept = {
        split: _kept(file.content, train=split == info.train_split) for split, file in files.items()
    }
    stuff = _stuff_folders(layout, manual_dir)
    if stuff:
        features[FIELD] = tfds.features.Image(shape=(None, None, 1), encoding_format="png")
    for split, images in kept.items():
        check_files(manual_dir / layout.images[split], files[split].path, images)
        if stuff:
            check_files(stuff[split], files[split].path, [_with_map(image) for image in images])
    metadata = {
        "stuff": list(stuff),
        "sizes": {
            split: [[image["width"], image["height"]] for image in images]
            for split, images in kept.items()
        },
        "ground_truth": {info.eval_split: files[info.eval_split].content},
    }
    splits = {
        split: _with_stuff(
            _examples(manual_dir / layout.images[split], files[split], images),
            stuff.get(split),
            images,
            layout.num_stuff,
        )
        for split, images in kept.items()
    }
    write_splits(
        data_dir, f"{FOLDER}/{info.name}", VERSION, features, splits,
        metadata=tfds.core.MetadataDict(metadata), disable_shuffling=True,
    )  # fmt: skip
    return folder


def _stuff_folders(layout: Layout, manual_dir: Path) -> dict[str, Path]:
    """Returns split -> folder with maps of stuff; {} if there are none.

    Raises:
      UserError: some splits have maps, and others have not.
    """
    folders = {split: manual_dir / folder for split, folder in layout.stuff.items()}
    missing = [folder for folder in folders.values() if not folder.is_dir()]
    if 0 < len(missing) < len(folders):
        raise UserError(
            f"{missing[0]} is missing; valid: maps of stuff for all splits, or for none"
        )
    return {} if missing else folders


def _with_map(image: Entries) -> Entries:
    """Returns the entry of an image with the name of its map of stuff."""
    return image | {"file_name": f"{Path(image['file_name']).stem}.png"}


def _with_stuff(
    pairs: Pairs, folder: Path | None, images: list[Entries], num_classes: int
) -> Pairs:
    """Yields examples with the maps of stuff in a folder; None: there are none."""
    table = label_table({value: value for value in (*range(num_classes), IGNORED)})
    for (number, example), image in zip(pairs, images, strict=True):
        if folder is not None:
            path = folder / _with_map(image)["file_name"]
            content = read_file(path)
            try:
                decode_label_map(content, table, (image["width"], image["height"]))
            except UserError as error:
                raise UserError(f"{path}: {error}") from error
            example[FIELD] = io.BytesIO(content)
        yield number, example


@dataclasses.dataclass(frozen=True)
class AnnotationFile:
    """A file of annotations that has been checked.

    Attributes:
      path: the file.
      content: "images", "annotations" and "categories".
      labels: identifier of a category -> class.
    """

    path: Path
    content: Entries
    labels: dict[int, int]


def _read(layout: Layout, manual_dir: Path, split: str, info: DatasetInfo) -> AnnotationFile:
    path = manual_dir / layout.annotations[split]
    content = read_entries(path, manual_dir, layout.how_to_get, _FIELDS)
    check_identifiers(path, content)
    return AnnotationFile(path, content, category_labels(path, content["categories"], info))


# Kind of an entry -> a field -> whether a value is right, and which ones are.
_FIELDS: dict[str, dict[str, Rule]] = {
    "images": IMAGE_FIELDS,
    "annotations": {
        "id": ID,
        "image_id": ID,
        "category_id": ID,
        "bbox": BOX,
        "area": AREA,
        "segmentation": (
            lambda mask: (
                type(mask) is list or (type(mask) is dict and {*mask} >= {"size", "counts"})
            ),
            "a list of polygons, or size and counts of run lengths",
        ),
    },
    "categories": CATEGORY_FIELDS,
}


def _kept(content: Entries, *, train: bool) -> list[Entries]:
    """Returns the images of a split in their order, in training those with annotations."""
    if not train:
        return content["images"]
    annotated = {entry["image_id"] for entry in content["annotations"]}
    return [
        image
        for image in content["images"]
        if image["id"] in annotated and min(image["width"], image["height"]) >= MIN_SIDE
    ]


def _examples(folder: Path, file: AnnotationFile, images: list[Entries]) -> Pairs:
    by_image: dict[int, list[Entries]] = {}
    for entry in file.content["annotations"]:
        by_image.setdefault(entry["image_id"], []).append(entry)
    faults: list[tuple[int, str]] = []
    for number, image in enumerate(images):
        path, objects = folder / image["file_name"], []
        content = read_file(path)
        check_size(path, content, image)
        for entry in by_image.get(image["id"], ()):
            fault = box_fault(entry, image)
            if fault:
                faults.append((entry["id"], fault))
                continue
            objects.append(_object(file, entry, image))
        yield (
            number,
            {
                "image": io.BytesIO(content),
                "image_id": image["id"],
                "objects": json.dumps(objects),
                "file_name": image["file_name"],
            },
        )
    note_faults(file.path, faults)


def _object(file: AnnotationFile, entry: Entries, image: Entries) -> Entries:
    left, top, width, height = entry["bbox"]
    return {
        "box": [left, top, left + width, top + height],
        "class": file.labels[entry["category_id"]],
        "crowd": bool(entry.get("iscrowd")),
        "mask": _mask(file, entry, (image["height"], image["width"])),
    }


def _mask(file: AnnotationFile, entry: Entries, size: tuple[int, int]) -> str:
    """Returns the run-length encoding of an annotation's mask, the union of its polygons."""
    from pycocotools import mask as rle

    where = f"{file.path}: annotation {entry['id']}"
    segmentation = entry["segmentation"]
    try:
        if isinstance(segmentation, list):
            for polygon in segmentation:  # pycocotools would crash
                if not all(map(is_finite, polygon)) or max(map(abs, polygon)) > 2 * max(size):
                    raise ValueError("a polygon lies far outside of the image")
            encoded = rle.merge(rle.frPyObjects(segmentation, *size))
        elif tuple(segmentation["size"]) != size:
            raise UserError(
                f"{where} has a mask of {segmentation['size'][0]} x {segmentation['size'][1]} "
                f"pixels; its image has {size[0]} x {size[1]} (height x width)"
            )
        elif isinstance(segmentation["counts"], list):
            encoded = rle.frPyObjects(segmentation, *size)
        else:
            encoded = {**segmentation, "counts": segmentation["counts"].encode()}
        if sum(_runs(encoded["counts"])) != size[0] * size[1]:
            raise ValueError("its runs have another number of pixels than the image")
    except UserError:
        raise
    except Exception as error:  # pycocotools raises many types
        raise UserError(f"{where}: its mask cannot be read ({error})") from error
    return encoded["counts"].decode()


def _runs(counts: bytes) -> Iterator[int]:
    """Yields the lengths of the runs of an encoding: pycocotools does not check them.

    A number is stored in groups of five bits, low ones first, the sixth bit telling whether more
    follow; from the fourth number on it is the difference from the one before the last.
    """
    lengths: list[int] = []
    value = shift = 0
    for byte in counts:
        bits = byte - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        if len(lengths) > 2:
            value += lengths[-2]
        lengths.append(value)
        yield value
        value = shift = 0
