"""Classes of all pixels, things and stuff, of images with objects."""

import numpy as np

from tokenvit_jax.data.box_transforms import View, source_pixels
from tokenvit_jax.data.record import IGNORED
from tokenvit_jax.errors import UserError

STRIDE = 8  # between the pixels of a view whose classes count [pixels]
FIELD = "stuff_map"


def map_shape(canvas: tuple[int, int]) -> tuple[int, int]:
    """Returns rows and columns of the classes of a canvas of height and width ``canvas``."""
    return -(-canvas[0] // STRIDE), -(-canvas[1] // STRIDE)


def view_stuff(
    labels: np.ndarray, view: View, canvas: tuple[int, int], num_classes: int
) -> np.ndarray:
    """Returns the classes of every eighth pixel of a canvas with a view at its top left.

    Args:
      labels: (H, W) uint8, of the image.
      view: the view.
      canvas: height and width of the canvas [pixels].
      num_classes: number of classes.

    Returns:
      (ceil(height / 8), ceil(width / 8)) uint8, `IGNORED` outside of the view.

    Raises:
      UserError: a class is unknown.
    """
    unknown = labels[(labels >= num_classes) & (labels != IGNORED)]
    if unknown.size:
        raise UserError(
            f"stuff_map has the class {unknown[0]}; valid: 0 to {num_classes - 1}, {IGNORED} "
            f"(config.head_overrides.num_stuff={num_classes})"
        )
    rows, columns = source_pixels(labels.shape[::-1], view)
    found = labels[rows[::STRIDE, None], columns[::STRIDE]]
    stuff = np.full(map_shape(canvas), IGNORED, np.uint8)
    stuff[: found.shape[0], : found.shape[1]] = found
    return stuff
