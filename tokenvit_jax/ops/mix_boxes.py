"""Rectangles that neighbouring images of a batch exchange: CutMix and MixToken."""

import jax
import jax.numpy as jnp


def mix_boxes(x: jax.Array, box: jax.Array) -> jax.Array:
    """Replaces what is inside a box by the same place of the neighbour image i ^ 1.

    Args:
      x: (B, H, W, C), B even.
      box: (4,) int, top, bottom, left, right; bottom and right exclusive.

    Returns:
      (B, H, W, C).

    Raises:
      ValueError: B is odd.

    References:
      Yun et al. 2019, "CutMix"; Jiang et al. 2021, "All Tokens Matter" (MixToken).
    """
    rows, columns = jnp.arange(x.shape[1])[:, None], jnp.arange(x.shape[2])
    top, bottom, left, right = box
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    return jnp.where(inside[:, :, None], neighbors(x), x)


def neighbors(x: jax.Array) -> jax.Array:
    """Returns x[i ^ 1] for every i, written so that a batch that is split over devices stays there.

    Args:
      x: (B, ...), B even.

    Raises:
      ValueError: B is odd.
    """
    if len(x) % 2:
        raise ValueError(f"x has shape {x.shape}; a batch of {len(x)} cannot be paired")
    return x.reshape(-1, 2, *x.shape[1:])[:, ::-1].reshape(x.shape)
