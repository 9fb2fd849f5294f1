"""Softmax attention of all queries with all keys, in forms for different machines."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Shaped

from tokenvit_jax.kernels import cudnn
from tokenvit_jax.kernels.chunked import map_queries
from tokenvit_jax.ops.dtypes import softmax_dtype


def attend_by_library(
    q: Float[Array, "B L N D"],
    k: Float[Array, "B S N D"],
    v: Float[Array, "B S N D"],
    key_mask: Bool[Array, "B S"] | None,
    *,
    scale: float,
) -> Float[Array, "B L N D"]:
    """Attends by jax's own function in XLA's operations."""
    mask = None if key_mask is None else key_mask[:, None, None]  # (B, 1, 1, S)
    return jax.nn.dot_product_attention(q, k, v, scale=scale, mask=mask)


def attend_by_cudnn(
    q: Float[Array, "B L N D"],
    k: Float[Array, "B S N D"],
    v: Float[Array, "B S N D"],
    key_mask: Bool[Array, "B S"] | None,
    *,
    scale: float,
) -> Float[Array, "B L N D"]:
    """Attends by cuDNN, without logits in memory."""
    bias = None if key_mask is None else jnp.where(key_mask, 0.0, cudnn.NEVER)
    return cudnn.attend(q, k, v, scale=scale, key_bias=bias)


def attend_heads_first(
    q: Float[Array, "B L N D"],
    k: Float[Array, "B S N D"],
    v: Float[Array, "B S N D"],
    key_mask: Bool[Array, "B S"] | None,
    *,
    scale: float,
) -> Float[Array, "B L N D"]:
    """Moves the heads to the front and attends in chunks of queries.

    On CPU, XLA's batched product is several times faster with (batch, heads) in front.
    """
    mask = None if key_mask is None else key_mask[:, None, None]  # (B, 1, 1, S)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q * scale, k, v))
    y = map_queries(lambda q: attend(q, k, v, mask)[0], k.shape[2], q)
    return jnp.swapaxes(y, 1, 2)


def attend(
    q: Float[Array, "*batch L D"],
    k: Float[Array, "*batch S D"],
    v: Float[Array, "*batch S E"],
    mask: Bool[Array, "..."] | None = None,
    bias: Shaped[Array, "..."] | None = None,
) -> tuple[Float[Array, "*batch L E"], Float[Array, "*batch L S"], Float[Array, "*batch L 1"]]:
    """Computes softmax(q k^T) v for any leading axes, with its log-normaliser in two parts.

    Args:
      q: scaled queries (..., L, D).
      k: keys (..., S, D).
      v: values (..., S, E).
      mask: bool, broadcastable to (..., L, S), True for keys to attend to; None: all.
      bias: added to the logits, broadcastable to (..., L, S); None: 0.

    Returns:
      output (..., L, E) in the type of ``v``, exp(logits - max) (..., L, S) in the type of ``v``,
      and their sum over the keys (..., L, 1) in the softmax type.
    """
    dtype = softmax_dtype(q.dtype)
    logits = jnp.einsum("...qd,...kd->...qk", q, k, preferred_element_type=dtype)
    if bias is not None:
        logits = logits + bias
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(dtype).min)
    logits = logits - lax.stop_gradient(logits.max(-1, keepdims=True))
    weights = jnp.exp(logits)
    total = weights.sum(-1, keepdims=True)
    weights = weights.astype(v.dtype)
    output = jnp.einsum("...qk,...ke->...qe", weights, v, preferred_element_type=dtype)
    # Dividing after the product touches L x E numbers instead of L x S.
    return (output / total).astype(v.dtype), weights, total
