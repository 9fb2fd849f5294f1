"""Boxes [x1 y1 x2 y2, pixels]: areas, overlap, and the coding of one box relative to another.

A box from x1 to x2 is x2 - x1 pixels wide. Everything is computed in float32.

References:
  Girshick et al. 2014, "Rich feature hierarchies for accurate object detection and semantic
  segmentation", Appendix C; MMDetection Contributors, "MMDetection" (2018), whose rules for
  degenerate boxes these are.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Num

# Largest |dw| and |dh| that are decoded: a factor of 62.5 on a side.
MAX_LOG_FACTOR = abs(math.log(16 / 1000))


def box_areas(boxes: Float[Array, "*n 4"]) -> Float[Array, "*n"]:
    """Returns the areas of boxes (..., 4) [pixels^2], which are negative for no real box."""
    return _rounded((boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1]))


def box_iou(a: Float[Array, "*#n 4"], b: Float[Array, "*#n 4"]) -> Float[Array, "*n"]:
    """Returns the intersection over union of pairs of boxes (..., 4) that broadcast.

    It is 0 where both boxes are empty.
    """
    width, height = (
        jnp.maximum(
            jnp.minimum(a[..., i + 2], b[..., i + 2]) - jnp.maximum(a[..., i], b[..., i]), 0
        )
        for i in (0, 1)
    )
    shared = _rounded(width * height)
    union = box_areas(a) + box_areas(b) - shared
    return shared / jnp.maximum(union, 1e-6)


def encode_boxes(
    anchors: Float[Array, "*n 4"], boxes: Float[Array, "*n 4"], deviations: Sequence[float]
) -> Float[Array, "*n 4"]:
    """Returns the deltas from anchors to boxes: dx, dy, dw, dh over their deviations.

    dx and dy are the distances of the centres in sides of the anchor, dw and dh the logarithms of
    the ratios of the sides.

    Args:
      anchors: (..., 4) with positive sides.
      boxes: (..., 4) with positive sides.
      deviations: the four numbers by which the deltas are divided.
    """
    sides, centres = _sides_and_centres(anchors)
    box_sides, box_centres = _sides_and_centres(boxes)
    deltas = jnp.concatenate([(box_centres - centres) / sides, jnp.log(box_sides / sides)], -1)
    return deltas / jnp.array(deviations, jnp.float32)


def decode_boxes(
    anchors: Float[Array, "*#n 4"],
    deltas: Float[Array, "*n 4"],
    deviations: Sequence[float],
    size: Num[Array, "2"] | None = None,
) -> Float[Array, "*n 4"]:
    """Undoes :func:`encode_boxes`; dw and dh are clamped to +-:data:`MAX_LOG_FACTOR`.

    Args:
      anchors: (..., 4), broadcast against the deltas.
      deltas: (..., 4).
      deviations: as in :func:`encode_boxes`.
      size: height and width of the image [pixels], to which boxes are clipped; None: they are not.
    """
    deltas = deltas.astype(jnp.float32) * jnp.array(deviations, jnp.float32)
    sides, centres = _sides_and_centres(anchors)
    centres = centres + deltas[..., :2] * sides
    sides = sides * jnp.exp(jnp.clip(deltas[..., 2:], -MAX_LOG_FACTOR, MAX_LOG_FACTOR))
    boxes = jnp.concatenate([centres - sides / 2, centres + sides / 2], -1)
    return boxes if size is None else clip_boxes(boxes, size)


def clip_boxes(boxes: Float[Array, "*n 4"], size: Num[Array, "2"]) -> Float[Array, "*n 4"]:
    """Clips boxes (..., 4) to an image of height and width ``size`` [pixels]."""
    height, width = size[0], size[1]
    limits = jnp.stack([width, height, width, height]).astype(boxes.dtype)
    return jnp.clip(boxes, 0, limits)


def _rounded(product):
    """Returns a product as float32 has it, wherever it is added.

    Compilers join a product and a sum without rounding between them, in some programs and not in
    others. Then boxes of equal IoU with an object, whose equality matters, would differ.
    """
    return jnp.maximum(product, jnp.finfo(jnp.float32).min)


def _sides_and_centres(boxes):
    """Returns widths and heights (..., 2), and centres (..., 2)."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return high - low, (low + high) * 0.5
