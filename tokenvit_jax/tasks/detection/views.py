"""Views of an image in the evaluation of detectors: several sizes, also mirrored.

Every view contributes the boxes whose size in the original image suits it; the boxes of all views
compete in one suppression, and a mask is the mean over the views.

References:
  Singh & Davis 2018, "An Analysis of Scale Invariance in Object Detection - SNIP", whose limits of
  sizes these are; MMDetection Contributors, "MMDetection" (2018).
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from tokenvit_jax.data.images import mean_pixel
from tokenvit_jax.data.record import Spec
from tokenvit_jax.errors import UserError
from tokenvit_jax.heads.two_stage import Candidates
from tokenvit_jax.tasks.canvas import Canvas
from tokenvit_jax.tasks.detection.settings import eval_canvas, long_side
from tokenvit_jax.tasks.grouping import Batch, group_by_size

MULTIPLE = 32  # of the sides of canvases [pixels]


class EvalView(NamedTuple):
    """A size at which images are evaluated.

    Attributes:
      name: name of its pixels in a batch; NAME_size is height and width of the image in them.
      canvas: where the image lies.
      limits: lowest and highest square root of the area of boxes, in the original image [pixels].
    """

    name: str
    canvas: Canvas
    limits: tuple[float, float]


def has_views(config: ConfigDict) -> bool:
    """Returns whether a configuration asks for views: several sizes, or mirrored ones."""
    inference = config.inference
    return bool(inference.short_sides) or inference.flip


def eval_views(config: ConfigDict) -> list[EvalView]:
    """Returns the views of a configuration."""
    inference = config.inference
    if not inference.short_sides:
        return [EvalView("image", eval_canvas(config), (0.0, np.inf))]
    high = inference.long_side or long_side(config)
    fill = mean_pixel(config.data.normalization, config.in_channels)
    count = len(inference.short_sides)
    lows, highs = inference.min_sides or (0,) * count, inference.max_sides or (0,) * count
    views = []
    for i, (side, *limits) in enumerate(zip(inference.short_sides, lows, highs, strict=True)):
        low = min(side, high)
        room = (-(-x // MULTIPLE) * MULTIPLE for x in (low, high))
        name = f"image_{i}" if i else "image"
        limits = float(limits[0]), float(limits[1]) or np.inf
        views.append(EvalView(name, Canvas(*room, low, high, fill), limits))
    return views


def check_views(config: ConfigDict) -> None:
    """Raises UserError if the limits of the views are not as many as the views."""
    inference = config.inference
    for name in ("min_sides", "max_sides"):
        found = len(inference[name])
        if inference.short_sides and found not in (0, len(inference.short_sides)):
            raise UserError(
                f"config.inference.{name} has {found} numbers; valid: one for each of the "
                f"{len(inference.short_sides)} config.inference.short_sides, or ()"
            )


def view_specs(views: Sequence[EvalView], channels: int) -> dict[str, Spec]:
    """Returns the arrays of an example by name."""
    specs = {}
    for view in views:
        specs[view.name] = Spec((*view.canvas.square, channels), np.uint8)
        specs[f"{view.name}_size"] = Spec((2,), np.int32)
    return specs


def place_views(
    views: Sequence[EvalView], image: Image.Image, *, square: bool
) -> dict[str, np.ndarray]:
    """Returns the pixels of all views of an image, and their sizes.

    Args:
      views: the views.
      image: the image.
      square: whether a canvas has room for both orientations.
    """
    found = {}
    for view in views:
        canvas = view.canvas
        shape = canvas.square if square else canvas.shape(image.size[::-1])
        found[view.name], found[f"{view.name}_size"] = canvas.place(image, shape)
    return found


def group_views(views: Sequence[EvalView], batches: Iterable[Batch]) -> Iterable[Batch]:
    """Returns evaluation batches whose square canvases are cut to those of one orientation each."""
    if jax.process_count() > 1 or all(view.canvas.low == view.canvas.high for view in views):
        return batches  # processes must have equal shapes: the square
    canvases = {view.name: view.canvas for view in views}

    def cut(name, record):
        return canvases[name].shape(tuple(record["original_size"].tolist()))

    return group_by_size(batches, list(canvases), cut)


def mirror(images: jax.Array, sizes: jax.Array) -> jax.Array:
    """Returns images (B, H, W, C) mirrored within their sizes (B, 2) at the top left."""

    @jax.vmap
    def one(image, size):
        columns = jnp.arange(image.shape[1])
        return image[:, jnp.where(columns < size[1], size[1] - 1 - columns, columns)]

    return one(images, sizes)


def to_original(
    boxes: jax.Array, sizes: jax.Array, original_size: jax.Array, mirrored: bool
) -> jax.Array:
    """Returns boxes of views in pixels of the original images.

    Args:
      boxes: (B, ..., 4) [x1 y1 x2 y2, pixels of the view].
      sizes: heights and widths of the images in the view (B, 2) [pixels].
      original_size: those of the original images (B, 2).
      mirrored: whether the view is mirrored.
    """

    @jax.vmap
    def one(boxes, size, original):
        boxes = _mirrored(boxes, size) if mirrored else boxes
        return boxes * _factors(original, size)

    return one(boxes, sizes, original_size)


def to_view(
    boxes: jax.Array, sizes: jax.Array, original_size: jax.Array, mirrored: bool
) -> jax.Array:
    """Undoes :func:`to_original`."""

    @jax.vmap
    def one(boxes, size, original):
        boxes = boxes * _factors(size, original)
        return _mirrored(boxes, size) if mirrored else boxes

    return one(boxes, sizes, original_size)


def _mirrored(boxes, size):
    """Returns boxes mirrored in an image of a size (2,)."""
    width = size[1].astype(boxes.dtype)
    x1, y1, x2, y2 = jnp.moveaxis(boxes, -1, 0)
    return jnp.stack([width - x2, y1, width - x1, y2], -1)


def _factors(to, of):
    """Returns the factors of boxes from an image of the size ``of`` to one of the size ``to``."""
    return jnp.tile((to / of)[::-1], 2).astype(jnp.float32)


def limited(candidates: Candidates, limits: tuple[float, float]) -> Candidates:
    """Takes the scores of boxes outside of the limits of their view.

    Args:
      candidates: boxes in pixels of the original images.
      limits: lowest, and first too high, square root of the area [pixels].
    """
    sides = candidates.boxes[..., 2:] - candidates.boxes[..., :2]
    areas = sides.prod(-1)
    inside = (areas >= limits[0] ** 2) & (areas < limits[1] ** 2)
    return candidates._replace(scores=jnp.where(inside, candidates.scores, -1.0))


def joined(parts: Sequence[Candidates]) -> Candidates:
    """Returns the boxes of all views."""
    return Candidates(*(jnp.concatenate(x, 1) for x in zip(*parts, strict=True)))
