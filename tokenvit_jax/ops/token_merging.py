"""Matches similar tokens in pairs (Bolya et al. 2023, "Token Merging: Your ViT But Faster")."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from tokenvit_jax.ops.counted import counted
from tokenvit_jax.ops.dtypes import softmax_dtype
from tokenvit_jax.ops.selection import smallest, top_indices


def _macs(inputs, outputs):
    """Counts N^2 D / 4: every token of one half with every token of the other half."""
    batch, length, dim = inputs[0]
    return batch * (length // 2) * (length - length // 2) * dim


@counted(_macs, static_argnames=("num_merged",))
def bipartite_matching(tokens: Float[Array, "B N D"], num_merged: int) -> Int32[Array, "B N"]:
    """Merges tokens at odd positions into the most similar tokens at even positions.

    Each token at an odd position is matched to the token at an even position with the largest
    cosine; the ``num_merged`` tokens with the most similar matches join their matches. Cosines are
    computed in float32 (float64 for float64 tokens). Ties go to the lowest index. The result
    carries no gradient.

    Args:
      tokens: vectors to compare (B, N, D), such as the keys of attention.
      num_merged: R, number of tokens that join another one, from 0 to N // 2.

    Returns:
      The cluster of each token (B, N), in [0, N - R): first the unmerged odd positions, then the
      even positions, both in order.

    Raises:
      ValueError: ``tokens`` is not (B, N, D), or ``num_merged`` is out of range.

    References:
      Bolya et al. 2023, Section 3 and Appendix D. In the paper the class token comes first, in the
      half that joins the other half, but is never merged; here it is not among ``tokens``.
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
    # Not `unit_norm`, which rounds differently: the last digit orders nearly equal cosines.
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
    cluster = jnp.pad(cluster, ((0, 0), (0, length % 2)))
    return jnp.stack([own, cluster], 2).reshape(batch, 2 * cluster.shape[1])[:, :length]
