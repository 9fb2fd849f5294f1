"""Softmax attention of queries with the keys that each of them may see."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tokenvit_jax.kernels.attention import attend
from tokenvit_jax.ops.attention import check_qkv
from tokenvit_jax.ops.counted import counted


def _macs(inputs, outputs):
    batch, queries, heads, dim = inputs[0]
    return 2 * batch * queries * inputs[1][1] * heads * dim


@counted(_macs)
def masked_attention(
    q: Float[Array, "B L N D"],
    k: Float[Array, "B S N D"],
    v: Float[Array, "B S N D"],
    mask: Bool[Array, "B L S"],
) -> Float[Array, "B L N D"]:
    """Computes softmax(q k^T / sqrt(D)) v over the keys that each query sees.

    :func:`~tokenvit_jax.ops.dot_product_attention` has one mask for all queries of an image, which
    its kernels need; here, every query has its own.

    Args:
      q: queries (B, L, N, D).
      k: keys (B, S, N, D).
      v: values (B, S, N, D).
      mask: keys that a query sees, in all heads (B, L, S). A query without any sees all keys.

    Returns:
      (B, L, N, D) in the type of ``v``.

    Raises:
      ValueError: the shapes do not fit together.

    References:
      Cheng et al. 2022, "Masked-attention Mask Transformer", Eq. 2.
    """
    check_qkv(q, k, v)
    expected = (q.shape[0], q.shape[1], k.shape[1])
    if mask.shape != expected:
        raise ValueError(f"mask has shape {mask.shape}; expected {expected}")
    mask = (mask | ~mask.any(-1, keepdims=True))[:, None]  # (B, 1, L, S)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
    return jnp.swapaxes(attend(q, k, v, mask)[0], 1, 2)
