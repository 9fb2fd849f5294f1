"""Decodes label maps: image files with a class for every pixel."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from tokenvit_jax.data.decoding import opened
from tokenvit_jax.errors import UserError

# Formats that change the values of pixels when an image is saved.
_LOSSY = ("JPEG", "MPO", "WEBP", "AVIF")


def decode_label_map(
    file: bytes | Path, table: np.ndarray, image_size: tuple[int, int]
) -> np.ndarray:
    """Decodes a label map and translates its values to labels.

    Args:
      file: contents or path of an image file with one byte per pixel: grey levels or palette
        indices.
      table: value -> label, from :func:`label_table`.
      image_size: width and height of its image [pixels].

    Returns:
      Labels, uint8 (height, width).

    Raises:
      UserError: the file is no such file, a value is unknown, or the size differs from the image's.
    """
    with opened(file, "a label map") as image:
        _check_values_are_kept(image)  # before the pixels are read: afterwards nothing tells
        values = np.asarray(image)
    check_label_size(values.shape[::-1], image_size)
    labels = table[values]
    if labels.min() < 0:
        unknown = np.unique(values[labels < 0])[0]
        raise UserError(
            f"label map has the value {unknown}; valid: {_ranges(np.flatnonzero(table >= 0))}"
        )
    return labels.astype(np.uint8)


def check_label_size(
    size: tuple[int, int], image_size: tuple[int, int], what: str = "label map has"
) -> None:
    """Raises UserError if a file has another width and height than its image [pixels].

    Args:
      size: width and height of the file.
      image_size: width and height of its image.
      what: begins the message.
    """
    if size != image_size:
        found, wanted = (" x ".join(map(str, sides)) for sides in (size, image_size))
        raise UserError(f"{what} {found} pixels, its image {wanted} (width x height)")


def check_format(image: Image.Image, what: str = "label map is") -> None:
    """Raises UserError if the format of an opened image changes values; `what` begins it."""
    if image.format in _LOSSY:
        raise UserError(f"{what} a {image.format}, which changes values; valid: PNG")


def _check_values_are_kept(image: Image.Image) -> None:
    check_format(image)
    if image.mode not in ("L", "P"):
        raise UserError(f"label map has mode {image.mode}; valid: L or P, one byte per pixel")
    # Pillow stretches grey levels of 1, 2 or 4 bits to 255 ("L;4"), and inverts others ("L;I").
    args = image.tile[0][3] if image.tile else None
    for raw in args if isinstance(args, tuple) else (args,):
        if isinstance(raw, str) and raw.startswith("L;"):
            raise UserError(f"label map has grey levels of mode {raw}; valid: one byte per pixel")


def label_table(labels: Mapping[int, int]) -> np.ndarray:
    """Returns the label of every value of a byte, int16 (256,); -1 where it is unknown."""
    table = np.full(256, -1, np.int16)
    table[list(labels)] = list(labels.values())
    return table


def _ranges(values: np.ndarray) -> str:
    """Describes sorted integers: "0 to 18, 255"."""
    parts = np.split(values, np.flatnonzero(np.diff(values) > 1) + 1)
    return ", ".join(f"{part[0]} to {part[-1]}" if len(part) > 1 else str(*part) for part in parts)
