"""Panoptic label maps: from masks and label maps, as COCO's PNG files and entries, and as objects.

References:
  Kirillov et al. 2019, "Panoptic Segmentation", and the format of COCO's panoptic task.
"""

import io
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tokenvit_jax.data.decoding import opened
from tokenvit_jax.data.instances import instances_of
from tokenvit_jax.data.label_maps import check_format, check_label_size
from tokenvit_jax.data.record import IGNORED, Instances, Record, Segments
from tokenvit_jax.errors import UserError

MAX_ID = 2**24 - 1  # a pixel of a PNG has 24 bits


def segments_of(masks: Sequence[np.ndarray], classes: Sequence[int]) -> Segments:
    """Returns segments with the identifiers 1, 2, ..., from their masks.

    Args:
      masks: n masks (H, W) bool, n > 0; none has pixels of another.
      classes: their classes.
    """
    ids = np.zeros(masks[0].shape, np.int32)
    for number, mask in enumerate(masks, 1):
        ids[mask] = number
    return numbered_segments(ids, classes)


def numbered_segments(ids: np.ndarray, classes: Sequence[int]) -> Segments:
    """Returns segments with the identifiers 1, 2, ..., from their map.

    Args:
      ids: (H, W) integers, the identifier of every pixel; 0: none.
      classes: classes of the n segments.
    """
    count = len(classes)
    return Segments(
        ids=ids,
        numbers=np.arange(1, count + 1, dtype=np.int32),
        classes=np.array(classes, np.int32),
        crowd=np.zeros(count, bool),
        areas=np.bincount(ids.ravel(), minlength=count + 1)[1:],
    )


def class_segments(label_map: np.ndarray) -> Segments:
    """Returns one segment for every class of a label map (H, W) uint8; IGNORED is void."""
    counts = np.bincount(label_map.ravel(), minlength=IGNORED + 1)[:IGNORED]
    classes = np.flatnonzero(counts).astype(np.int32)
    return Segments(
        ids=np.where(label_map == IGNORED, 0, label_map.astype(np.int32) + 1),
        numbers=classes + 1,
        classes=classes,
        crowd=np.zeros(len(classes), bool),
        areas=counts[classes],
    )


def label_map_of(record: Record) -> np.ndarray:
    """Returns the class of every pixel of a record (H, W) uint8, or IGNORED.

    Args:
      record: has a label map or segments.
    """
    if "label_map" in record:
        return record["label_map"]
    segments = record["segments"]
    table = np.full(segments.numbers.max(initial=0) + 1, IGNORED, np.uint8)
    table[segments.numbers] = segments.classes
    return table[segments.ids]


def thing_instances(segments: Segments, things: Collection[int]) -> Instances:
    """Returns the segments of some classes as objects; those without pixels are left out.

    Args:
      segments: the segments.
      things: the classes of objects.
    """
    masks = [segments.ids == number for number in segments.numbers]
    kept = [i for i, c in enumerate(segments.classes) if int(c) in things and masks[i].any()]
    found = instances_of([masks[i] for i in kept], segments.classes[kept])
    return found._replace(crowd=segments.crowd[kept])


# ------------------------------------------------------------------------------------------------
# COCO's format
# ------------------------------------------------------------------------------------------------


def encode_ids(ids: np.ndarray) -> bytes:
    """Returns a PNG file whose pixels are identifiers: R + 256 G + 65,536 B.

    Args:
      ids: (H, W) integers from 0 to MAX_ID.

    Raises:
      ValueError: an identifier is negative or too large.
    """
    if ids.min() < 0 or ids.max() > MAX_ID:
        raise ValueError(f"ids are from {ids.min()} to {ids.max()}; valid: 0 to {MAX_ID:,}")
    buffer = io.BytesIO()
    Image.fromarray(id_pixels(ids)).save(buffer, "PNG")
    return buffer.getvalue()


def id_pixels(ids: np.ndarray) -> np.ndarray:
    """Returns identifiers (H, W) as pixels (H, W, 3) uint8: R + 256 G + 65,536 B."""
    ids = ids.astype(np.int32)
    return np.stack([ids >> shift & 255 for shift in (0, 8, 16)], -1).astype(np.uint8)


def decode_ids(file: bytes | Path, image_size: tuple[int, int]) -> np.ndarray:
    """Undoes :func:`encode_ids`.

    Args:
      file: contents or path of the file.
      image_size: width and height of its image [pixels].

    Returns:
      (H, W) int32.

    Raises:
      UserError: the file is no such file, or its size differs from the image's.
    """
    pixels = decode_pixels(file, image_size).astype(np.int32)
    return pixels[..., 0] + 256 * pixels[..., 1] + 65_536 * pixels[..., 2]


def decode_pixels(file: bytes | Path, image_size: tuple[int, int]) -> np.ndarray:
    """Decodes a file whose pixels are three numbers, not a colour.

    Args:
      file: contents or path of the file.
      image_size: width and height of its image [pixels].

    Returns:
      (H, W, 3) uint8.

    Raises:
      UserError: the file is no such file, or its size differs from the image's.
    """
    with opened(file, "a PNG of segments") as image:
        check_format(image, "PNG of segments is")
        if image.mode != "RGB":
            raise UserError(
                f"PNG of segments has mode {image.mode}; valid: RGB, three bytes per pixel"
            )
        check_label_size(image.size, image_size, "PNG of segments has")
        return np.asarray(image)


def segment_entries(segments: Segments) -> list[dict[str, int]]:
    """Returns the `segments_info` of an image in COCO's format, with `category_id` class + 1."""
    values = (array.tolist() for array in segments[1:])
    return [
        {"id": number, "category_id": label + 1, "area": area, "iscrowd": int(crowd)}
        for number, label, crowd, area in zip(*values, strict=True)
    ]


def read_segments(ids: np.ndarray, entries: Sequence[dict[str, int]]) -> Segments:
    """Undoes :func:`segment_entries`.

    Args:
      ids: (H, W) int32, the identifier of every pixel.
      entries: as segment_entries returns them.
    """
    columns = {name: [entry[name] for entry in entries]
               for name in ("id", "category_id", "iscrowd", "area")}  # fmt: skip
    return Segments(
        ids=ids,
        numbers=np.array(columns["id"], np.int32),
        classes=np.array(columns["category_id"], np.int32) - 1,
        crowd=np.array(columns["iscrowd"], bool),
        areas=np.array(columns["area"], np.int64),
    )


def panoptic_annotations(
    images: Iterable[tuple[int, Segments]], classes: Sequence[str], things: Collection[int]
) -> dict[str, Any]:
    """Returns segments in COCO's format; `category_id` is class + 1.

    Args:
      images: identifier and segments of every image; :func:`encode_ids` makes its PNG file,
        IDENTIFIER.png.
      classes: names of the classes.
      things: the classes that are things.
    """
    found: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [
            {"id": i + 1, "name": name, "isthing": int(i in things)}
            for i, name in enumerate(classes)
        ],
    }
    for identifier, segments in images:
        height, width = segments.ids.shape
        name = f"{identifier}.png"
        found["images"].append(
            {"id": identifier, "height": height, "width": width, "file_name": name}
        )
        entries = segment_entries(segments)
        found["annotations"].append(
            {"image_id": identifier, "file_name": name, "segments_info": entries}
        )
    return found
