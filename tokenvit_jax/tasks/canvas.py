"""Canvases of evaluation: images keep their proportions and lie at the top left of an array."""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image

from tokenvit_jax.data.box_transforms import View, fitted_size, view_pixels
from tokenvit_jax.data.dense_transforms import Pixel, pad, scaled_size
from tokenvit_jax.errors import UserError
from tokenvit_jax.tasks.grouping import Batch, Size, group_by_size


class Canvas(NamedTuple):
    """A canvas for images that are not higher than wide, and, turned, for the others.

    Attributes:
      low: shorter side [pixels].
      high: longer side [pixels].
      short_side: largest shorter side of the resized image [pixels].
      long_side: its largest longer side [pixels].
      fill: colour of the padding.
    """

    low: int
    high: int
    short_side: int
    long_side: int
    fill: Pixel

    def check(self, where: str) -> None:
        """Raises UserError if the sides of a resized image do not fit the canvas.

        Args:
          where: what determines the canvas, for the message.
        """
        sides = {
            "eval_short_side": (self.short_side, self.low),
            "long_side": (self.long_side, self.high),
        }
        for key, (side, room) in sides.items():
            if side > room:
                raise UserError(
                    f"config.data.{key}: {side} pixels do not fit {where}; valid: at most {room}"
                )

    @property
    def square(self) -> Size:
        """Height and width of a canvas for both orientations [pixels]."""
        return self.high, self.high

    def shape(self, size: Size) -> Size:
        """Returns height and width of the canvas of an image from its height and width [pixels]."""
        return (self.high, self.low) if size[0] > size[1] else (self.low, self.high)

    def place(self, image: Image.Image, shape: Size) -> tuple[np.ndarray, np.ndarray]:
        """Returns a resized image on a canvas (*shape, C) uint8, and its height and width (2,).

        Args:
          image: image of any size.
          shape: height and width of the canvas [pixels]; on one of the other orientation than its
            own, the image is smaller.
        """
        size = fitted_size(image.size, self.short_side, self.long_side)
        scale = min(room / side for room, side in zip(shape[::-1], size, strict=True))
        size = scaled_size(*size, scale) if scale < 1 else size
        pixels = view_pixels(image, View((0, 0, *image.size), size))
        padded = pad(pixels, (*shape, pixels.shape[-1]), self.fill)
        return padded, np.array(pixels.shape[:2], np.int32)

    def grouped(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        """Returns batches whose square canvases are cut to those of one orientation each.

        Args:
          batches: as for :func:`~tokenvit_jax.tasks.grouping.group_by_size`, with "image".
        """
        if jax.process_count() > 1 or self.low == self.high:
            return batches  # processes must have equal shapes: the square

        def cut(name, record):
            return self.shape(tuple(record[f"{name}_size"].tolist()))

        return group_by_size(batches, ["image"], cut)
