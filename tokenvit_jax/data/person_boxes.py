"""Boxes of persons that a detector found: files in COCO's format of results."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tokenvit_jax.data.files import read_text
from tokenvit_jax.data.record import Person
from tokenvit_jax.errors import UserError

PERSON = 1  # COCO's identifier of the category
_MAX = 1e9  # largest number that is taken for a place or a score; nan is not below it


class PersonBox(NamedTuple):
    """A box of a detector.

    Attributes:
      image: identifier of the image: a whole number, or a text.
      box: (4,) float32, x1 y1 x2 y2 [pixels].
      score: of the detector.
    """

    image: int | str
    box: np.ndarray
    score: float

    def person(self, num_keypoints: int) -> Person:
        """Returns a person without labels."""
        return Person(self.box, np.zeros((num_keypoints, 3), np.float32), self.score)


def read_boxes(file: str | Path) -> list[PersonBox]:
    """Reads the boxes of persons in their order; those of other categories are passed over.

    Args:
      file: JSON, a list of results: "image_id", "bbox" (x, y, width and height), "score", and
        "category_id", 1 for persons, which may be missing.

    Raises:
      UserError: the file cannot be read, has another format, or has no person; or a box has no
        area.
    """
    path = Path(os.path.expanduser(file))
    try:
        entries = [*map(dict, json.loads(read_text(path)))]
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{path} is not in COCO's format of results ({type(error).__name__}: {error}); valid: "
            "a JSON list of boxes with image_id, bbox and score"
        ) from error
    boxes = []
    for place, entry in enumerate(entries):
        if entry.get("category_id", PERSON) != PERSON:
            continue
        for name, (is_right, valid) in _RULES.items():
            if not is_right(entry.get(name)):
                found = f"{name}={entry[name]!r:.60}" if name in entry else f"no {name}"
                raise UserError(f"{path}: box {place} has {found}; valid: {valid}")
        left, top, width, height = entry["bbox"]
        box = np.array([left, top, left + width, top + height], np.float32)
        boxes.append(PersonBox(entry["image_id"], box, float(entry["score"])))
    if not boxes:
        raise UserError(f"{path} has no box of a person; valid: at least one")
    return boxes


def check_images(file: str | Path, boxes: Iterable[PersonBox], known: Iterable[int | str]) -> None:
    """Raises UserError if a box belongs to an image that is not there."""
    unknown = next(iter({box.image for box in boxes} - {*known}), None)
    if unknown is not None:
        raise UserError(
            f"{file}: boxes belong to image {unknown!r}, which the evaluation split does not have"
        )


def _is_number(value) -> bool:
    return type(value) in (int, float) and abs(value) < _MAX


def _is_box(value) -> bool:
    numbers = type(value) is list and len(value) == 4 and all(map(_is_number, value))
    return numbers and value[2] > 0 and value[3] > 0


_RULES = {
    "image_id": (lambda value: type(value) in (int, str), "a whole number or a text"),
    "bbox": (_is_box, "x, y, width and height, the last two above 0"),
    "score": (_is_number, "a number"),
}
