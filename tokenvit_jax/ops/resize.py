"""Resizes images: inside a padded buffer, whose image's size is known only at run time, or bicubic.

`jax.image.resize` covers the other cases.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from tokenvit_jax.ops.dtypes import softmax_dtype


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


def _cubic_weights(old: int, new: int) -> np.ndarray:
    """Returns the weights (new, old) of cubic convolution along one axis."""
    a = -0.75
    place = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(place).astype(int) - 1
    weights = np.zeros((new, old))
    for step in range(4):
        distance = np.abs(place - (first + step))
        near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
        far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
        weight = np.where(distance <= 1, near, far)
        # add.at: at a border several steps meet the same value.
        np.add.at(weights, (np.arange(new), np.clip(first + step, 0, old - 1)), weight)
    return weights
