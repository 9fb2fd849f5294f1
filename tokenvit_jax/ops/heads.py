"""Divides channels into attention heads, and joins them again."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def split_heads(x: Float[Array, "... C"], num_heads: int) -> Float[Array, "... N D"]:
    """Divides channels into heads: (..., C) -> (..., N, C / N)."""
    return x.reshape(*x.shape[:-1], num_heads, -1)


def merge_heads(x: Float[Array, "... N D"]) -> Float[Array, "... C"]:
    """Joins the heads again: (..., N, D) -> (..., N D)."""
    return x.reshape(*x.shape[:-2], -1)


def split_qkv(
    qkv: Float[Array, "B L channels"], num_heads: int
) -> tuple[Float[Array, "B L N D"], Float[Array, "B L N D"], Float[Array, "B L N D"]]:
    """Divides the output of one projection into queries, keys and values with heads.

    Args:
      qkv: (B, L, 3 C), all queries first, then all keys, then all values.
      num_heads: N; C is a multiple of it.

    Returns:
      q, k and v, each (B, L, N, C / N).
    """
    # Cut before channels become heads: a TPU would move an array of one head per tile.
    q, k, v = (split_heads(x, num_heads) for x in jnp.split(qkv, 3, axis=-1))
    return q, k, v
