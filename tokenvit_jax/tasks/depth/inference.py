"""Predicts the depth of images of any size, and brings predictions to the size of the truth."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from tokenvit_jax.ops.resize import cubic_kernel
from tokenvit_jax.tasks.depth.losses import align

# Pixels of the image that the model sees / pixels of the size that it was configured for.
MOST_PIXELS = 4


def fitted_size(size: tuple[int, int], wanted: tuple[int, int], multiple: int) -> tuple[int, int]:
    """Returns height and width to which an image is resized for the model [pixels].

    The image keeps its aspect ratio up to rounding. Its height or its width becomes the wanted one,
    whichever changes it less; the other side follows, unless there would be more than `MOST_PIXELS`
    times the wanted pixels. Both are rounded to multiples.

    Args:
      size: height and width of the image [pixels].
      wanted: height and width for which the model was configured [pixels].
      multiple: number of pixels that sides are multiples of.

    References:
      Ranftl et al. 2021, the authors' code, with the resize method "minimal".
    """
    scales = [new / old for new, old in zip(wanted, size, strict=True)]
    scale = min(scales, key=lambda scale: abs(1 - scale))
    scale = min(scale, math.sqrt(MOST_PIXELS * math.prod(wanted) / math.prod(size)))
    most = MOST_PIXELS * math.prod(wanted) / multiple  # of a side, the other one being the least
    height, width = (
        max(multiple, min(round(side * scale / multiple), int(most / multiple)) * multiple)
        for side in size
    )
    return height, width


def place(depth: jax.Array, frame: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Resizes a prediction to its frame in a depth map.

    The filter is that of :func:`tokenvit_jax.ops.resize.resize_bicubic`. Shapes are static; the
    frame is not.

    Args:
      depth: (H, W), prediction for the frame.
      frame: (4,) int, left, top, right and bottom of the frame in the depth map [pixels].
      shape: height h and width w of the depth map.

    Returns:
      (h, w) float32; 0 outside the frame.
    """
    left, top, right, bottom = frame
    rows = _cubic_weights(depth.shape[0], top, bottom, shape[0])
    columns = _cubic_weights(depth.shape[1], left, right, shape[1])
    dtype = rows.dtype
    return jnp.einsum(
        "hH,wW,HW->hw", rows, columns, depth.astype(dtype), precision=lax.Precision.HIGHEST
    )


def _cubic_weights(old: int, start: jax.Array, end: jax.Array, length: int) -> jax.Array:
    """Returns the weights (length, old) with which a line becomes the part from start to end."""
    index = jnp.arange(length)
    step = old / (end - start).astype(jnp.float32)
    at = (index - start + 0.5) * step - 0.5
    first = jnp.floor(at).astype(jnp.int32) - 1
    weights = jnp.zeros((length, old), jnp.float32)
    for tap in range(4):
        weight = cubic_kernel(jnp.abs(at - (first + tap)), jnp.where)
        source = jnp.clip(first + tap, 0, old - 1)  # beyond the border, the last value repeats
        weights += weight[:, None] * (source[:, None] == jnp.arange(old))
    inside = (index >= start) & (index < end)
    return jnp.where(inside[:, None], weights, 0.0)


def aligned(depth: jax.Array, truth: jax.Array, limits: tuple[float, float]) -> jax.Array:
    """Fits scale and shift of the inverse depth of each image to its truth.

    Args:
      depth: (B, H, W) [metres].
      truth: (B, H, W) [metres], 0 where unknown.
      limits: lowest and highest depth [metres].

    Returns:
      (B, H, W) [metres], between the limits.
    """
    low, high = limits
    found, wanted = inverse(depth), jnp.where(truth > 0, 1 / jnp.where(truth > 0, truth, 1.0), 0.0)
    scale, shift = (x[:, None, None] for x in align(found, wanted))
    return 1 / jnp.clip(scale * found + shift, 1 / high, 1 / low)


def inverse(depth: jax.Array) -> jax.Array:
    """Returns the inverse of depth above 0."""
    return 1 / jnp.maximum(depth, 1e-6)
