"""Attention rollout: how much each token after the last block draws on each patch."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from tokenvit_jax.ops.dtypes import softmax_dtype


def attention_rollout(weights: Float[Array, "B L N T T"]) -> Float[Array, "B T T"]:
    """Multiplies the attention of all blocks, half of each replaced by the identity.

    The identity stands for the residual connection: with A the mean over the heads, a block mixes
    its tokens by (A + I) / 2. The rows of the result sum to 1.

    Args:
      weights: attention of L blocks with N heads among the same T tokens, (B, L, N, T, T); the
        rows, over the last axis, sum to 1.

    Returns:
      (B, T, T) in float32 or float64; row i is the share of each input token in token i after the
      last block.

    Raises:
      ValueError: the shape does not fit.

    References:
      Abnar and Zuidema 2020, "Quantifying Attention Flow in Transformers", Section 3.
    """
    if weights.ndim != 5 or weights.shape[-1] != weights.shape[-2] or not weights.shape[1]:
        raise ValueError(
            f"weights have shape {weights.shape}; expected (batch, blocks, heads, tokens, tokens)"
        )
    mixing = weights.astype(softmax_dtype(weights.dtype)).mean(2)
    mixing = (mixing + jnp.eye(mixing.shape[-1], dtype=mixing.dtype)) / 2
    rollout = mixing[:, 0]
    for block in range(1, mixing.shape[1]):
        rollout = mixing[:, block] @ rollout
    return rollout
