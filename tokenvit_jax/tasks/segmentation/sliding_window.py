"""Computes logits for images of any size with a model for windows of one size.

The images are in buffers of one shape. Shapes are static; the size of the image inside its padded
buffer is not.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax


def window_starts(
    size: jax.Array, buffer: int, window: int, stride: int
) -> tuple[jax.Array, jax.Array]:
    """Returns where the windows along one side of an image start, and which of them count.

    A window starts every ``stride`` pixels; the last one ends where the image ends, as in the code
    of Segmenter (Strudel et al. 2021).

    Args:
      size: () int, length of the image along this side [pixels].
      buffer: length of the buffer along this side [pixels], at least ``window``.
      window: length of a window along this side [pixels].
      stride: distance from one window to the next [pixels].

    Returns:
      First pixel of each window (n,) int32, and whether the window counts (n,) bool; n is the
      number of windows of an image as large as the buffer.
    """
    number = jnp.arange(-(-(buffer - window) // stride) + 1)
    last = jnp.maximum(size - window, 0)
    starts = jnp.minimum(number * stride, last)
    return starts.astype(jnp.int32), (number == 0) | ((number - 1) * stride < last)


def sliding_logits(
    apply: Callable[[jax.Array], jax.Array],
    images: jax.Array,
    sizes: jax.Array,
    window: tuple[int, int],
    stride: tuple[int, int],
) -> jax.Array:
    """Returns the mean logits of each pixel over all windows that contain it.

    Args:
      apply: function (B, h, w, C) -> (B, h, w, K), for windows.
      images: (B, H, W, C) float, at least as large as a window.
      sizes: (B, 2) int, height and width of the image in each buffer.
      window: height h and width w of a window [pixels].
      stride: distances from one window to the next, down and to the right [pixels], from 1 to the
        sides of a window.

    Returns:
      (B, H, W, K) float32; values outside an image are meaningless.
    """
    batch, height, width, _ = images.shape
    if (height, width) == tuple(window):
        return apply(images)

    def starts(axis):
        buffer = images.shape[1 + axis]
        return jax.vmap(lambda n: window_starts(n, buffer, window[axis], stride[axis]))(
            sizes[:, axis]
        )

    (rows, row_counts), (columns, column_counts) = starts(0), starts(1)
    shape = jax.eval_shape(apply, images[:, : window[0], : window[1]]).shape

    def cut(x, row, column):
        return lax.dynamic_slice(x, (row, column, 0), (*window, x.shape[-1]))

    def add(x, row, column, y):
        return lax.dynamic_update_slice(x, cut(x, row, column) + y, (row, column, 0))

    def visit(number, carry):
        i, j = number // columns.shape[1], number % columns.shape[1]
        place = rows[:, i], columns[:, j]
        used = row_counts[:, i] & column_counts[:, j]

        def look(sums, counts):
            weight = used.astype(jnp.float32)[:, None, None, None]
            logits = apply(jax.vmap(cut)(images, *place))
            sums = jax.vmap(add)(sums, *place, logits * weight)
            ones = jnp.broadcast_to(weight, (batch, *window, 1))
            return sums, jax.vmap(add)(counts, *place, ones)

        # In a buffer that is far larger than its images, most windows are empty.
        return lax.cond(used.any(), look, lambda *carry: carry, *carry)

    zeros = [jnp.zeros((batch, height, width, n)) for n in (shape[-1], 1)]
    sums, counts = lax.fori_loop(0, rows.shape[1] * columns.shape[1], visit, tuple(zeros))
    return sums / jnp.maximum(counts, 1)
