"""Decodes label maps: image files with a class for every pixel."""

import io
from collections.abc import Mapping

import numpy as np
from PIL import Image

from tokenvit_jax.errors import UserError


def decode_label_map(encoded: bytes, table: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """Decodes a label map and translates its values to labels.

    Args:
      encoded: contents of an image file with one byte per pixel: grey levels or palette indices.
      table: value -> label, from :func:`label_table`.
      image_size: width and height of its image [pixels].

    Returns:
      Labels, uint8 (height, width).

    Raises:
      UserError: the bytes are not such a file, a value is unknown, or the size differs from the
        image's.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            mode, values = image.mode, np.asarray(image)
    except Exception as error:  # Pillow raises all kinds of errors on malformed files
        raise UserError(f"cannot decode {len(encoded)} bytes as a label map: {error}") from error
    if mode not in ("L", "P"):
        raise UserError(f"label map has mode {mode}; valid: L or P, one byte per pixel")
    if values.shape[::-1] != image_size:
        found, wanted = (" x ".join(map(str, size)) for size in (values.shape[::-1], image_size))
        raise UserError(f"label map has {found} pixels, its image {wanted} (width x height)")
    labels = table[values]
    if labels.min() < 0:
        unknown = np.unique(values[labels < 0])[0]
        raise UserError(
            f"label map has the value {unknown}; valid: {_ranges(np.flatnonzero(table >= 0))}"
        )
    return labels.astype(np.uint8)


def label_table(labels: Mapping[int, int]) -> np.ndarray:
    """Returns the label of every value of a byte, int16 (256,); -1 where it is unknown."""
    table = np.full(256, -1, np.int16)
    table[list(labels)] = list(labels.values())
    return table


def _ranges(values: np.ndarray) -> str:
    """Describes sorted integers: "0 to 18, 255"."""
    parts = np.split(values, np.flatnonzero(np.diff(values) > 1) + 1)
    return ", ".join(f"{part[0]} to {part[-1]}" if len(part) > 1 else str(*part) for part in parts)
