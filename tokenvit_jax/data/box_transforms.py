"""Views of an image with objects: crop, resize and flip, of pixels, boxes and masks alike.

References:
  MMDetection Contributors, "MMDetection" (2018); Carion et al. 2020, "End-to-End Object Detection
  with Transformers", whose random crop many recipes take.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from tokenvit_jax.data.dense_transforms import scaled_size
from tokenvit_jax.data.images import resize_pixels
from tokenvit_jax.run_lengths import decode_mask

MASK_SIDE = 112  # rows and columns of the mask of an object in the frame of its box
_CROP_SHORT_SIDES = 400, 500, 600  # of the image from which DETR's crop is cut [pixels]
_CROP_SIDES = 384, 600  # shortest and longest side of this crop [pixels]


class View(NamedTuple):
    """A part of an image, resized and perhaps mirrored.

    Attributes:
      part: left, top, right, bottom in the image [pixels], also between pixels.
      size: width and height of the view [pixels].
      flip: whether it is mirrored horizontally.
    """

    part: tuple[float, float, float, float]
    size: tuple[int, int]
    flip: bool = False


def fitted_size(size: tuple[float, float], short_side: int, long_side: int) -> tuple[int, int]:
    """Returns width and height of an image that is resized as far as both sides allow [pixels].

    Args:
      size: width and height of the image [pixels].
      short_side: largest shorter side of the result [pixels].
      long_side: largest longer side.
    """
    return scaled_size(*size, min(long_side / max(size), short_side / min(size)))


def random_view(
    size: tuple[int, int],
    short_sides: Sequence[int],
    long_side: int,
    *,
    room: tuple[int, int],
    crop: bool,
    flip: float,
    rng: np.random.Generator,
) -> View:
    """Draws a view for training.

    Args:
      size: width and height of the image [pixels].
      short_sides: largest shorter sides of the view, one of which is drawn [pixels].
      long_side: largest longer side.
      room: largest width and height, which limit crops of another orientation than the image's.
      crop: whether every second view is of a part of the image: DETR's crop.
      flip: probability that the view is mirrored.
      rng: source of all random numbers.
    """
    mirrored = bool(flip and rng.random() < flip)
    part = (0, 0, *size)
    if crop and rng.random() < 0.5:
        part = _draw_part(size, long_side, rng)
    sides = part[2] - part[0], part[3] - part[1]
    short_side = short_sides[rng.integers(len(short_sides))]
    found = fitted_size(sides, short_side, long_side)
    if any(side > most for side, most in zip(found, room, strict=True)):
        found = scaled_size(*sides, min(room[0] / sides[0], room[1] / sides[1]))
    return View(part, found, mirrored)


def _draw_part(size, long_side, rng):
    """Draws a crop of an image that is first resized, and returns it in the original's pixels."""
    short_side = _CROP_SHORT_SIDES[rng.integers(len(_CROP_SHORT_SIDES))]
    resized = fitted_size(size, short_side, long_side)
    low, high = _CROP_SIDES
    sides = [int(rng.integers(min(s, low), min(s, high), endpoint=True)) for s in resized]
    corner = [
        int(rng.integers(whole - side, endpoint=True))
        for whole, side in zip(resized, sides, strict=True)
    ]
    x, y = size[0] / resized[0], size[1] / resized[1]
    (left, top), (width, height) = corner, sides
    return left * x, top * y, min((left + width) * x, size[0]), min((top + height) * y, size[1])


def view_pixels(image: Image.Image, view: View) -> np.ndarray:
    """Returns the pixels of a view (h, w, C) uint8, bilinear with an antialiasing filter."""
    return resize_pixels(image, view.size, Image.Resampling.BILINEAR, box=view.part, flip=view.flip)


def view_boxes(boxes: np.ndarray, view: View) -> np.ndarray:
    """Returns boxes in a view, clipped to it.

    Args:
      boxes: (n, 4) [x1 y1 x2 y2, pixels of the image].
      view: the view.

    Returns:
      (n, 4) float32; boxes outside of the view have no area.
    """
    corner, scale = _mapping(view)
    moved = ((boxes.reshape(-1, 2, 2) - corner) * scale).clip(0, view.size)
    if view.flip:
        moved[:, :, 0] = view.size[0] - moved[:, ::-1, 0]
    return moved.reshape(-1, 4).astype(np.float32)


def view_masks(
    masks: Sequence[str], size: tuple[int, int], boxes: np.ndarray, view: View
) -> np.ndarray:
    """Returns the masks of objects in the frames of their boxes in a view.

    Every cell takes the nearest pixel of the image.

    Args:
      masks: n run-length encodings.
      size: width and height of the image [pixels].
      boxes: (n, 4) with areas, in the view.
      view: the view.

    Returns:
      (n, MASK_SIDE, MASK_SIDE / 8) uint8, rows packed by `numpy.packbits`.
    """
    packed = np.zeros((len(masks), MASK_SIDE, MASK_SIDE // 8), np.uint8)
    corner, scale = _mapping(view)
    cells = (np.arange(MASK_SIDE) + 0.5) / MASK_SIDE
    for i, (counts, box) in enumerate(zip(masks, boxes.astype(np.float64), strict=True)):
        mask = decode_mask(counts, size[::-1])
        x, y = (box[a] + cells * (box[a + 2] - box[a]) for a in (0, 1))
        if view.flip:
            x = view.size[0] - x
        columns = (corner[0] + x / scale[0]).astype(int).clip(0, size[0] - 1)
        rows = (corner[1] + y / scale[1]).astype(int).clip(0, size[1] - 1)
        packed[i] = np.packbits(mask[rows[:, None], columns], axis=1)
    return packed


def source_pixels(size: tuple[int, int], view: View) -> tuple[np.ndarray, np.ndarray]:
    """Returns the nearest pixels of an image for the pixels of a view: rows (h,), columns (w,).

    Args:
      size: width and height of the image [pixels].
      view: the view.
    """
    corner, scale = _mapping(view)
    columns, rows = (
        (corner[i] + (np.arange(view.size[i]) + 0.5) / scale[i]).astype(int).clip(0, size[i] - 1)
        for i in (0, 1)
    )
    return rows, columns[::-1] if view.flip else columns


def _mapping(view):
    """Returns the corner of a view in its image, and the factors of its sides."""
    part = np.array(view.part, np.float64)
    return part[:2], np.array(view.size) / (part[2:] - part[:2])
