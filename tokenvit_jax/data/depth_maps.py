"""Decodes depth maps: grey PNG files of 16 bits whose values are fractions of a metre."""

from pathlib import Path

import numpy as np

from tokenvit_jax.data.decoding import opened
from tokenvit_jax.errors import UserError


def decode_depth(file: bytes | Path, steps: int, image_size: tuple[int, int]) -> np.ndarray:
    """Decodes a depth map.

    Args:
      file: contents or path of a PNG file with 16 bits per pixel; 0 is unknown.
      steps: values per metre, such as 256.
      image_size: width and height of its image [pixels].

    Returns:
      (H, W) float32 [metres], 0 where unknown.

    Raises:
      UserError: the file is no such file, its size differs from the image's, or all its pixels are
        unknown.
    """
    with opened(file, "a depth map") as image:
        # Older versions of Pillow open 16 bits as mode I, which PNG files have for nothing else.
        if image.format != "PNG" or not (image.mode == "I" or image.mode.startswith("I;16")):
            raise UserError(
                f"depth map is a {image.format} of mode {image.mode}; valid: PNG, grey levels of "
                "16 bits"
            )
        values = np.asarray(image)
    if values.shape[::-1] != tuple(image_size):
        found, wanted = (" x ".join(map(str, size)) for size in (values.shape[::-1], image_size))
        raise UserError(f"depth map has {found} pixels, its image {wanted} (width x height)")
    if not values.any():
        raise UserError("depth map has no known pixel: all values are 0")
    return values.astype(np.float32) / np.float32(steps)
