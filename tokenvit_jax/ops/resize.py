"""Resizes maps and images, as PyTorch does.

`count_macs` leaves the interpolation matrices of maps out: resizing counts as elementwise work.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from tokenvit_jax.ops.counted import counted
from tokenvit_jax.ops.dtypes import softmax_dtype


@counted(lambda inputs, outputs: 0, static_argnames=("size", "align_corners"))
def resize_bilinear(
    x: Float[Array, "B H W C"], size: tuple[int, int], align_corners: bool = False
) -> Float[Array, "B h w C"]:
    """Resizes maps bilinearly, without antialiasing, as `torch.nn.functional.interpolate` does.

    Row i of the result lies at (i + 1/2) H / h - 1/2, and beyond the outermost rows the values are
    constant; with ``align_corners`` it lies at i (H - 1) / (h - 1).

    Args:
      x: (B, H, W, C).
      size: height h and width w of the result.
      align_corners: whether the outermost rows and columns keep their places.

    Returns:
      (B, h, w, C) in the type of x.
    """
    y = x
    for axis, new in zip((1, 2), size, strict=True):
        old = y.shape[axis]
        places = _linear_places(old, new, align_corners)
        if new % old or new > old**2:  # or so few values that the matrix is small
            y = multiply_axis(y, _weights_at(places, old), axis)
        elif new > old:
            y = _enlarge(y, places, axis)
        if align_corners:  # one map less in float32: DPT resizes its largest ones
            y = y.astype(x.dtype)
    return y.astype(x.dtype)


def _enlarge(x, places, axis):
    """Makes an axis of maps a whole number of times as long, in float32 for narrower types.

    New values k j to k j + k - 1 are means of the old values j - 1, j and j + 1. The sums are
    elementwise, forward and backward. With the cross-entropy of 512 x 512 pixels and its gradient,
    they take 0.6 times as long on a CPU as products with a matrix; compiled for an H200, one axis
    is one kernel forward, and both are one backward.
    """
    length, cut = x.shape[axis], functools.partial(lax.slice_in_dim, axis=axis)
    x = x.astype(softmax_dtype(x.dtype))
    x = jnp.concatenate([cut(x, 0, 1), x, cut(x, length - 1, length)], axis)
    places = places.reshape(length, -1) - np.arange(length)[:, None] + 1  # in front is a copy
    means = []
    for place in places.T:
        parts = [(i, np.maximum(0, 1 - np.abs(place - i))) for i in range(3)]
        means.append(
            sum(
                times_along(share, cut(x, i, i + length), axis) for i, share in parts if share.any()
            )
        )
    shape = (*x.shape[:axis], places.size, *x.shape[axis + 1 :])
    return jnp.stack(means, axis + 1).reshape(shape)


def times_along(
    weights: Float[np.ndarray, " n"], x: Float[Array, "*shape"], axis: int
) -> Float[Array, "*shape"]:
    """Multiplies an array by weights along one axis, or by one number if they are equal."""
    if np.ptp(weights) < 1e-12:
        return weights[0].astype(x.dtype) * x
    return jnp.asarray(weights, x.dtype).reshape(-1, *(1,) * (x.ndim - 1 - axis)) * x


@counted(lambda inputs, outputs: 0, static_argnames=("size",))
def resize_nearest(x: Shaped[Array, "B H W C"], size: tuple[int, int]) -> Shaped[Array, "B h w C"]:
    """Resizes maps; row i of the result is row floor(i H / h).

    As in `torch.nn.functional.interpolate` with mode="nearest". (`jax.image.resize` takes row
    floor((i + 1/2) H / h).)

    Args:
      x: (B, H, W, C).
      size: height h and width w of the result.

    Returns:
      (B, h, w, C) in the type of x.
    """
    for axis, new in zip((1, 2), size, strict=True):
        old = x.shape[axis]
        if new == old:
            continue
        if new % old == 0:
            x = jnp.repeat(x, new // old, axis)
        else:
            x = jnp.take(x, np.arange(new) * old // new, axis)
    return x


def _linear_places(old: int, new: int, align_corners: bool) -> np.ndarray:
    """Returns the places of the new values among the old ones (new,)."""
    if align_corners:
        return np.arange(new) * (old - 1) / max(new - 1, 1)
    return (np.arange(new) + 0.5) * old / new - 0.5


def linear_weights(old: int, new: int, align_corners: bool) -> Float[np.ndarray, "new old"]:
    """Returns the weights of the old values in the new ones, as in :func:`resize_bilinear`.

    Args:
      old: number of old values.
      new: number of new values.
      align_corners: as in :func:`resize_bilinear`.
    """
    return _weights_at(_linear_places(old, new, align_corners), old)


def _weights_at(places: np.ndarray, old: int) -> np.ndarray:
    """Returns the weights (new, old) of linear interpolation at some places (new,)."""
    places = np.clip(places, 0, old - 1)
    return np.maximum(0, 1 - np.abs(places[:, None] - np.arange(old)))


def multiply_axis(
    x: Float[Array, "B H W C"], weights: Float[np.ndarray, "n m"], axis: int
) -> Float[Array, "B h w C"]:
    """Multiplies a matrix and one axis of maps, with the precision of float32.

    Args:
      x: (B, H, W, C).
      weights: (n, m); m is the length of the axis.
      axis: 1 for the rows, 2 for the columns.

    Returns:
      Maps with n rows or columns, in float32 for narrower types.
    """
    dtype = softmax_dtype(x.dtype)
    spec = {1: "nH,BHWC->BnWC", 2: "nW,BHWC->BHnC"}[axis]
    matrix = jnp.asarray(weights, dtype)
    return jnp.einsum(spec, matrix, x.astype(dtype), precision=lax.Precision.HIGHEST)


def resize_rows(
    x: Shaped[Array, "H ..."], size: Int[Array, ""], new_size: Int[Array, ""], at: Int[Array, " n"]
) -> Float[Array, "n ..."]:
    """Resizes an array along its first axis (bilinear) and returns some of the new rows.

    As in `torch.nn.functional.interpolate` with align_corners=False, new row i lies at
    (i + 1/2) size / new_size - 1/2; beyond the outermost rows the values are constant.

    Args:
      x: (H, ...); the first ``size`` rows are the image, the others are padding.
      size: number of rows of the image, at least 1.
      new_size: number of rows after resizing, at least 1.
      at: indices of the new rows to return (n,); rows from ``new_size`` on are meaningless.

    Returns:
      (n, ...), in float32 for narrower types.
    """
    dtype = softmax_dtype(x.dtype)
    place = (at + 0.5) * (size / new_size).astype(dtype) - 0.5
    place = jnp.clip(place, 0, size - 1)
    low = place.astype(jnp.int32)
    part = (place - low).reshape(-1, *(1,) * (x.ndim - 1)).astype(dtype)
    take = lambda index: jnp.take(x, index, 0, mode="clip").astype(dtype)  # noqa: E731
    return (1 - part) * take(low) + part * take(jnp.minimum(low + 1, size - 1))


def resize_valid(
    x: Shaped[Array, "H W C"],
    size: Int[Array, "2"],
    new_size: Int[Array, "2"],
    rows: Int[Array, " n"],
    width: int,
) -> Float[Array, "n width C"]:
    """Resizes an image at the top left of a buffer (bilinear) and returns some of its rows.

    Args:
      x: (H, W, C).
      size: height and width of the image in the buffer.
      new_size: height and width of the resized image.
      rows: indices of the new rows to return (n,).
      width: number of columns to return. Rows and columns beyond the new size are meaningless.

    Returns:
      (n, width, C), in float32 for narrower types.
    """
    y = resize_rows(x, size[0], new_size[0], rows).swapaxes(0, 1)
    return resize_rows(y, size[1], new_size[1], jnp.arange(width)).swapaxes(0, 1)


def resize_bicubic(x: Shaped[Array, "H W C"], size: tuple[int, int]) -> Float[Array, "h w C"]:
    """Resizes a map with cubic convolution, without antialiasing.

    As `torch.nn.functional.interpolate` with mode="bicubic" and align_corners=False: a = -0.75, and
    beyond the border the outermost values repeat. (`jax.image.resize` has a = -0.5, as Pillow, and
    leaves out what lies beyond the border.)

    Args:
      x: (H, W, C).
      size: height and width of the result.

    Returns:
      (h, w, C) in the type of x.

    References:
      Keys 1981, "Cubic convolution interpolation for digital image processing".
    """
    dtype = softmax_dtype(x.dtype)
    rows, columns = (
        jnp.asarray(_cubic_weights(*sizes), dtype) for sizes in zip(x.shape, size, strict=False)
    )
    return jnp.einsum("hH,wW,HWC->hwC", rows, columns, x.astype(dtype)).astype(x.dtype)


def cubic_kernel(distance: Any, where: Callable[..., Any]) -> Any:
    """Returns the weights of cubic convolution with a = -0.75 at distances from 0 to 2.

    Args:
      distance: an array of numpy or jax.
      where: `where` of the same library.
    """
    a = -0.75
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return where(distance <= 1, near, far)


def _cubic_weights(old: int, new: int) -> np.ndarray:
    """Returns the weights (new, old) of cubic convolution along one axis."""
    place = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(place).astype(int) - 1
    weights = np.zeros((new, old))
    for step in range(4):
        weight = cubic_kernel(np.abs(place - (first + step)), np.where)
        # add.at: at a border several steps meet the same value.
        np.add.at(weights, (np.arange(new), np.clip(first + step, 0, old - 1)), weight)
    return weights
