"""Resizes an image inside a padded buffer, when its size is known only at run time."""

import jax.numpy as jnp
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
