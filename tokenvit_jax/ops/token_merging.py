"""Bipartite soft matching of tokens (Bolya et al. 2023, "Token Merging: Your ViT But Faster")."""

import jax
import jax.numpy as jnp
from jax import lax

from tokenvit_jax.ops.attention import softmax_dtype
from tokenvit_jax.ops.counted import counted
from tokenvit_jax.ops.selection import smallest, top_indices


def _macs(inputs, outputs):
    """N^2 D / 4: every token of one half with every token of the other."""
    batch, length, dim = inputs[0]
    return batch * (length // 2) * (length - length // 2) * dim


@counted(_macs, static_argnames=("num_merged",))
def bipartite_matching(tokens: jax.Array, num_merged: int) -> jax.Array:
    """Pairs tokens of odd place with the most similar tokens of even place.

    Every token of odd place finds the token of even place of the largest cosine; the
    ``num_merged`` most similar ones join theirs. Cosines are computed in float32 (float64 for
    float64 tokens). Ties go to the lowest index. Nothing carries a gradient.

    Args:
      tokens: what is compared (B, N, D), such as the keys of attention.
      num_merged: tokens that join another one, R, from 0 to N // 2.

    Returns:
      The cluster of every token (B, N) int32 in [0, N - R): first those of odd place that stay
      alone, then those of even place, both in order.

    Raises:
      ValueError: ``tokens`` is not (B, N, D), or ``num_merged`` is out of range.

    References:
      Bolya et al. 2023, Section 3 and Appendix D. There the class token comes first and is of
      the odd half; it stays alone always, and is not among ``tokens`` here.
    """
    if tokens.ndim != 3:
        raise ValueError(f"tokens has shape {tokens.shape}; expected (batch, tokens, channels)")
    batch, length, _ = tokens.shape
    half = length // 2
    if not 0 <= num_merged <= half:
        raise ValueError(
            f"num_merged is {num_merged}; it must be from 0 to {half} for tokens of shape "
            f"{tokens.shape}"
        )
    x = lax.stop_gradient(tokens).astype(softmax_dtype(tokens.dtype))
    x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), jnp.finfo(x.dtype).tiny)
    odd, even = x[:, 1::2], x[:, ::2]
    cosine = jnp.einsum("bnd,bmd->bnm", odd, even, precision=lax.Precision.HIGHEST)
    most_similar, dissimilarity = smallest(-cosine)
    order = top_indices(-dissimilarity, num_merged)
    joins = jax.vmap(lambda at: jnp.zeros(half, bool).at[at].set(True))(order)
    num_alone = half - num_merged
    cluster = jnp.where(joins, num_alone + most_similar, jnp.cumsum(~joins, 1, dtype=jnp.int32) - 1)
    own = jnp.broadcast_to(
        jnp.arange(num_alone, length - num_merged, dtype=jnp.int32), even.shape[:2]
    )
    assignment = jnp.zeros((batch, length), jnp.int32)
    return assignment.at[:, 1::2].set(cluster).at[:, ::2].set(own)
