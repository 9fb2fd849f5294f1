"""Resizing of the part of an array that is image, whose size is known only when a program runs."""

import jax
import jax.numpy as jnp


def resize_rows(x: jax.Array, size: jax.Array, new_size: jax.Array, at: jax.Array) -> jax.Array:
    """Returns rows of an array that is resized along its first axis, bilinear.

    As `torch.nn.functional.interpolate` with align_corners=False: new row i lies at
    (i + 1/2) size / new_size - 1/2, and beyond the outermost rows they go on.

    Args:
      x: (H, ...); the first ``size`` rows count.
      size: () int, at least 1.
      new_size: () int, at least 1.
      at: (n,) int, the new rows wanted; those from ``new_size`` on are of no use.

    Returns:
      (n, ...), in float32 for narrower types.
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    place = (at + 0.5) * (size / new_size).astype(dtype) - 0.5
    place = jnp.clip(place, 0, size - 1)
    low = place.astype(jnp.int32)
    part = (place - low).reshape(-1, *(1,) * (x.ndim - 1)).astype(dtype)
    take = lambda index: jnp.take(x, index, 0, mode="clip").astype(dtype)  # noqa: E731
    return (1 - part) * take(low) + part * take(jnp.minimum(low + 1, size - 1))
