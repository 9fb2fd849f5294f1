"""Softmax attention of all queries with all keys."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tokenvit_jax.ops.counted import counted

# On a CPU more logits than this (16 MiB) are not held at once: they would leave the cache.
MAX_LOGITS = 2**22


def softmax_dtype(dtype) -> jnp.dtype:
    """Returns the type of distances, softmax and statistics: float64 stays, all else is float32."""
    return jnp.promote_types(dtype, jnp.float32)


def _macs(inputs, outputs):
    batch, queries, heads, dim = inputs[0]
    return 2 * batch * queries * inputs[1][1] * heads * dim


@counted(_macs, static_argnames=("scale",))
def dot_product_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float | None = None,
    key_mask: jax.Array | None = None,
) -> jax.Array:
    """Computes softmax(scale q k^T) v for every head.

    Args:
      q: queries (B, L, N, D).
      k: keys (B, S, N, D).
      v: values (B, S, N, D).
      scale: factor of the logits; None: 1 / sqrt(D).
      key_mask: (B, S) bool, the keys that count, at least one per image; None: all.

    Returns:
      (B, L, N, D) in the type of ``v``.

    Raises:
      ValueError: the shapes do not fit together.
    """
    check_qkv(q, k, v)
    if key_mask is not None and key_mask.shape != k.shape[:2]:
        raise ValueError(f"key_mask has shape {key_mask.shape}; expected {k.shape[:2]}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    mask = None if key_mask is None else key_mask[:, None, None]  # (B, 1, 1, S)

    def on_cpu(q, k, v):
        # XLA's batched product is several times faster with (batch, heads) in front.
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q * scale, k, v))
        y = map_queries(lambda q: attend(q, k, v, mask)[0], k.shape[2], q)
        return jnp.swapaxes(y, 1, 2)

    def elsewhere(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, scale=scale, mask=mask)

    if softmax_dtype(q.dtype) == jnp.float64:
        return on_cpu(q, k, v)
    return lax.platform_dependent(q, k, v, cpu=on_cpu, default=elsewhere)


class ScoredAttention(NamedTuple):
    """output (B, L, N, D); received (B, S), the attention of all heads and queries to each key."""

    output: jax.Array
    received: jax.Array


@counted(_macs, static_argnames=("scale", "diagonal"))
def scored_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    size: jax.Array | None = None,
    *,
    scale: float | None = None,
    diagonal: bool = True,
) -> ScoredAttention:
    """Attends like :func:`dot_product_attention`, and reports how much attention each key received.

    Args:
      q: queries (B, L, N, D).
      k: keys (B, S, N, D).
      v: values (B, S, N, D).
      size: tokens that each key stands for (B, S), not negative: adds their logarithm to the
        logits, which is what so many equal keys would do; None: 1.
      scale: factor of the logits; None: 1 / sqrt(D).
      diagonal: False: what a query gives to the key of its own place is not reported.

    Returns:
      ScoredAttention(output in the type of ``v``, received in float32 or float64).

    Raises:
      ValueError: the shapes do not fit together.

    References:
      Marin et al. 2021, "Token Pooling", Supplement E; without the diagonal: the code of
      PoWER-BERT (Goyal et al. 2020).
    """
    check_qkv(q, k, v)
    if size is not None and size.shape != k.shape[:2]:
        raise ValueError(f"size has shape {size.shape}; expected {k.shape[:2]}")
    if not diagonal and q.shape[1] != k.shape[1]:
        raise ValueError(
            f"diagonal=False needs as many queries as keys, not {q.shape[1]} and {k.shape[1]}"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q * scale, k, v))
    bias = None if size is None else jnp.log(size.astype(softmax_dtype(q.dtype)))[:, None, None]
    output, weights, total = attend(q, k, v, bias=bias)
    if not diagonal:
        weights = jnp.where(jnp.eye(q.shape[2], dtype=bool), 0, weights)
    received = jnp.einsum("bhqk,bhq->bk", weights.astype(total.dtype), 1 / total[..., 0])
    return ScoredAttention(jnp.swapaxes(output, 1, 2), received)


def map_queries(run: Callable[..., jax.Array], num_keys: int, *queries: jax.Array) -> jax.Array:
    """Returns ``run(*queries)``, of so many queries at once that about ``MAX_LOGITS`` logits fit.

    Args:
      run: of what it takes the backward pass computes the logits of a chunk again.
      num_keys: logits per query and head.
      queries: arrays (B, N, L, ...) that belong together.

    Returns:
      (B, N, L, ...).
    """
    batch, heads, length = queries[0].shape[:3]
    chunks = min(-(-batch * heads * length * num_keys // MAX_LOGITS), length)
    if chunks == 1:
        return run(*queries)
    size = -(-length // chunks)
    padding = -length % size

    def split(x):  # (chunks, B, N, size, ...)
        x = jnp.pad(x, [(0, padding if axis == 2 else 0) for axis in range(x.ndim)])
        return jnp.moveaxis(x.reshape(batch, heads, -1, size, *x.shape[3:]), 2, 0)

    run = jax.checkpoint(run, prevent_cse=False)
    output = jnp.moveaxis(lax.map(lambda chunk: run(*chunk), [split(x) for x in queries]), 0, 2)
    return output.reshape(batch, heads, length + padding, *output.shape[4:])[:, :, :length]


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes softmax(q k^T) v for any leading axes, with its log-normaliser in two parts.

    Args:
      q: scaled queries (..., L, D).
      k: keys (..., S, D).
      v: values (..., S, E).
      mask: bool, broadcastable to (..., L, S): the keys that count; None: all.
      bias: of the logits, broadcastable to (..., L, S); None: 0.

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


def check_qkv(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    """Raises ValueError unless q, k, v are (B, L, N, D), (B, S, N, D), (B, S, N, D)."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} has shape {x.shape}; expected (batch, length, heads, dim)")
    if k.shape != v.shape:
        raise ValueError(f"k has shape {k.shape} and v {v.shape}; they must be equal")
    if q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(
            f"k has shape {k.shape}; batch, heads and dim must be those of q, {q.shape}"
        )
