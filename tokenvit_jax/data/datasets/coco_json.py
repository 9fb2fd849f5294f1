"""Reads files of annotations in COCO's format, and says what is wrong with them."""

import functools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenvit_jax.data.decoding import opened
from tokenvit_jax.data.files import read_text
from tokenvit_jax.data.record import DatasetInfo
from tokenvit_jax.errors import UserError
from tokenvit_jax.progress import note

Entries = dict[str, Any]  # images, annotations and categories of a file, or one of them
Rule = tuple[Callable[[Any], bool], str]  # whether a value is right, and which ones are


def is_whole(value: Any, low: int = 0, high: int = 2**63 - 1) -> bool:
    """Returns whether a value is an integer from `low` to `high`."""
    return type(value) is int and low <= value <= high


def is_finite(value: Any) -> bool:
    """Returns whether a value is a number below 1e9, which nan is not."""
    return type(value) in (int, float) and abs(value) < 1e9


def are_finite(value: Any, count: int) -> bool:
    """Returns whether a value is a list of so many numbers below 1e9."""
    return type(value) is list and len(value) == count and all(map(is_finite, value))


TEXT: Rule = lambda value: type(value) is str and bool(value), "a text"
ID: Rule = is_whole, "a whole number"
_SIDE: Rule = functools.partial(is_whole, low=1), "a number of pixels"
IMAGE_FIELDS = {"id": ID, "width": _SIDE, "height": _SIDE, "file_name": TEXT}
BOX: Rule = functools.partial(are_finite, count=4), "x, y, width and height"
AREA: Rule = is_finite, "a number of pixels"
CATEGORY_FIELDS = {"id": ID, "name": TEXT}


def read_entries(
    path: Path, manual_dir: Path, how_to_get: str, fields: Mapping[str, Mapping[str, Rule]]
) -> Entries:
    """Reads lists of entries whose values are right.

    Args:
      path: the file.
      manual_dir: the user's folder that holds it.
      how_to_get: instructions for the user.
      fields: kind of an entry, such as "images" -> a field -> its rule.

    Returns:
      The entries of every kind.

    Raises:
      UserError: the file is missing, or has another format, or a value is wrong.
    """
    if not path.is_file():
        where = path.relative_to(manual_dir)
        raise UserError(f"{where} not found in --manual_dir={manual_dir}; {how_to_get}")
    try:
        content = json.loads(read_text(path))
        content = {kind: [*map(dict, content[kind])] for kind in fields}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is not in COCO's format ({type(error).__name__}: {error}); valid: JSON with "
            f"lists of {', '.join(fields)}"
        ) from error
    for kind, rules in fields.items():
        check_values(f"{path}: {kind}", content[kind], rules)
    return content


def check_values(where: str, entries: Sequence[Entries], rules: Mapping[str, Rule]) -> None:
    """Raises UserError for the first value that is wrong.

    Args:
      where: file and kind of the entries, for the message.
      entries: the entries.
      rules: name of a field -> its rule.
    """
    for place, entry in enumerate(entries):
        for name, (is_right, valid) in rules.items():
            if not is_right(entry.get(name)):
                found = f"{name}={entry[name]!r:.60}" if name in entry else f"no {name}"
                who = entry.get("id", f"at place {place}")
                raise UserError(f"{where}: entry {who} has {found}; valid: {valid}")


def check_unique(path: Path, kind: str, entries: Iterable[Entries], field: str = "id") -> None:
    """Raises UserError if two entries of a kind have the same identifier in a field."""
    counts = Counter(entry[field] for entry in entries)
    twice = [key for key, count in counts.items() if count > 1]
    if twice:
        raise UserError(f"{path}: {kind} have the {field} {twice[0]} twice; valid: one each")


def check_identifiers(path: Path, content: Entries) -> None:
    """Raises UserError for identifiers that occur twice or do not exist.

    Args:
      path: the file.
      content: its "images", "annotations" and "categories".
    """
    for kind in ("images", "annotations", "categories"):
        check_unique(path, kind, content[kind])
    images = {entry["id"] for entry in content["images"]}
    categories = {entry["id"] for entry in content["categories"]}
    for entry in content["annotations"]:
        for name, known in {"image_id": images, "category_id": categories}.items():
            if entry[name] not in known:
                raise UserError(
                    f"{path}: annotation {entry['id']} has {name} {entry[name]}, which the file "
                    "does not list"
                )


def box_fault(entry: Entries, image: Entries) -> str:
    """Returns why an annotation is left out; "": it is not."""
    left, top, width, height = entry["bbox"]
    inside = [
        max(0, min(low + side, limit) - max(low, 0))
        for low, side, limit in (
            (left, width, image["width"]),
            (top, height, image["height"]),
        )
    ]
    if not inside[0] * inside[1]:
        return "has a box outside of its image"
    if entry["area"] <= 0:
        return "has no area"
    return "has a box thinner than a pixel" if width < 1 or height < 1 else ""


def note_faults(path: Path, faults: Sequence[tuple[int, str]]) -> None:
    """Writes a line for every reason for which annotations are left out.

    Args:
      path: the file.
      faults: identifiers of the annotations, and the reasons.
    """
    counts = Counter(fault for _, fault in faults)
    for fault, count in counts.items():
        number = next(number for number, other in faults if other == fault)
        note(f"{path}: annotation {number} {fault}: left out (the first of {count})")


def category_labels(path: Path, categories: Sequence[Entries], info: DatasetInfo) -> dict[int, int]:
    """Returns identifier of a category -> class, in the order of the identifiers.

    Raises:
      UserError: the names of the categories are not those of the dataset's classes.
    """
    found = sorted((entry["id"], entry["name"]) for entry in categories)
    names = tuple(name for _, name in found)
    if names != info.classes:
        other = next(
            (f"{a!r}, not {b!r}" for a, b in zip(names, info.classes, strict=False) if a != b),
            f"{len(names)} of {len(info.classes)}",
        )
        raise UserError(f"{path}: the categories are not those of {info.name}: {other}")
    return {key: i for i, (key, _) in enumerate(found)}


def check_files(folder: Path, listed_in: Path, images: Sequence[Entries]) -> None:
    """Raises UserError if files are missing, before anything is written.

    Args:
      folder: folder of the files.
      listed_in: the file that lists them.
      images: entries with "id" of the image and "file_name".
    """
    missing = [image for image in images if not (folder / image["file_name"]).is_file()]
    if missing:
        raise UserError(
            f"{folder / missing[0]['file_name']} not found, image {missing[0]['id']} of "
            f"{listed_in} (the first of {len(missing)})"
        )


def check_size(path: Path, content: bytes, image: Entries) -> None:
    """Raises UserError if an image file has another size than the annotations say.

    Args:
      path: the file.
      content: its contents.
      image: entry of the image.
    """
    try:
        with opened(content, "an image") as stored:
            size = stored.size
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if size != (image["width"], image["height"]):
        raise UserError(
            f"{path} has {size[0]} x {size[1]} pixels; image {image['id']} of the annotations has "
            f"{image['width']} x {image['height']} (width x height)"
        )
