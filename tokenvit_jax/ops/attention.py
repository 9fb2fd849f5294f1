"""Softmax attention of all queries with all keys."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from tokenvit_jax.kernels import cudnn
from tokenvit_jax.kernels.attention import (
    attend_by_cudnn,
    attend_by_library,
    attend_heads_first,
)
from tokenvit_jax.kernels.flash_attention_tpu import attend_by_flash, flash_misfit, is_long
from tokenvit_jax.kernels.platforms import by_platform
from tokenvit_jax.kernels.scored_attention import score_by_kernels, score_with_logits
from tokenvit_jax.kernels.window_attention import MAX_TOKENS, attend_short, misfit_of_tiles
from tokenvit_jax.ops.counted import counted
from tokenvit_jax.ops.dtypes import softmax_dtype

# Fewest queries for which two kernels are taken instead of about 10 short launches.
MIN_SCORED = 16


def _macs(inputs, outputs):
    batch, queries, heads, dim = inputs[0]
    return 2 * batch * queries * inputs[1][1] * heads * dim


@counted(_macs, static_argnames=("scale",))
def dot_product_attention(
    q: Float[Array, "B L N D"],
    k: Float[Array, "B S N D"],
    v: Float[Array, "B S N D"],
    *,
    scale: float | None = None,
    key_mask: Bool[Array, "B S"] | None = None,
) -> Float[Array, "B L N D"]:
    """Computes softmax(scale q k^T) v for every head.

    Args:
      q: queries (B, L, N, D).
      k: keys (B, S, N, D).
      v: values (B, S, N, D).
      scale: factor of the logits; None: 1 / sqrt(D).
      key_mask: (B, S) bool, True for keys to attend to, at least one per image; None: all keys.

    Returns:
      (B, L, N, D) in the type of ``v``.

    Raises:
      ValueError: the shapes do not fit together.
    """
    check_qkv(q, k, v)
    if key_mask is not None and key_mask.shape != k.shape[:2]:
        raise ValueError(f"key_mask has shape {key_mask.shape}; expected {k.shape[:2]}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    on_cpu, elsewhere, by_flash = (
        functools.partial(form, scale=scale)
        for form in (attend_heads_first, attend_by_library, attend_by_flash)
    )
    if softmax_dtype(q.dtype) == jnp.float64:
        return on_cpu(q, k, v, key_mask)
    on_gpu, misfit = _gpu_form(q, k, v, key_mask, scale)
    return by_platform(
        "attention", q, k, v, key_mask, cpu=on_cpu, cuda=on_gpu, default=elsewhere,
        tpu=by_flash if is_long(q, k) else elsewhere,
        misfits={"cuda": misfit, "tpu": flash_misfit(q, k) if is_long(q, k) else None},
    )  # fmt: skip


def _gpu_form(q, k, v, key_mask, scale):
    """Returns the form for a GPU, and why it cannot take the arguments."""
    if key_mask is None and q.shape[1] == k.shape[1] <= MAX_TOKENS:
        form = lambda q, k, v, _: attend_short(q, k, v, scale=scale)  # noqa: E731
        return form, misfit_of_tiles(q, k, v, q.shape[1])
    extra = 0 if key_mask is None else cudnn.BIAS_COLUMNS
    form = functools.partial(attend_by_cudnn, scale=scale)
    return form, cudnn.misfit(q, k, v, extra=extra)


class ScoredAttention(NamedTuple):
    """Output of attention, and how much attention each key received.

    Attributes:
      output: (B, L, N, D).
      received: attention of each key, summed over all heads and queries (B, S).
    """

    output: Float[Array, "B L N D"]
    received: Float[Array, "B S"]


@counted(_macs, static_argnames=("scale", "diagonal"))
def scored_attention(
    q: Float[Array, "B L N D"],
    k: Float[Array, "B S N D"],
    v: Float[Array, "B S N D"],
    size: Shaped[Array, "B S"] | None = None,
    *,
    scale: float | None = None,
    diagonal: bool = True,
) -> ScoredAttention:
    """Attends like :func:`dot_product_attention`, and reports how much attention each key received.

    Args:
      q: queries (B, L, N, D).
      k: keys (B, S, N, D).
      v: values (B, S, N, D).
      size: number of tokens that each key stands for (B, S), not negative. Its logarithm is added
        to the logits, so that a key counts like ``size`` equal keys; None: 1.
      scale: factor of the logits; None: 1 / sqrt(D).
      diagonal: whether ``received`` includes the attention of a token to itself (query i to key i).

    Returns:
      ScoredAttention(output in the type of ``v``, received in float32 or float64).

    Raises:
      ValueError: the shapes do not fit together.

    References:
      Marin et al. 2021, "Token Pooling", Supplement E. Leaving out the diagonal follows the code
      of PoWER-BERT (Goyal et al. 2020).
    """
    check_qkv(q, k, v)
    _check_size(size, k)
    if not diagonal and q.shape[1] != k.shape[1]:
        raise ValueError(
            f"diagonal=False needs as many queries as keys, not {q.shape[1]} and {k.shape[1]}"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    by_kernels, with_logits = (
        functools.partial(form, scale=scale, diagonal=diagonal)
        for form in (score_by_kernels, score_with_logits)
    )
    extra = 0 if size is None else cudnn.BIAS_COLUMNS
    misfit = cudnn.misfit(q, k, v, extra=extra, min_queries=MIN_SCORED)
    scored = by_platform(
        "scored attention", q, k, v, size, cuda=by_kernels, default=with_logits,
        misfits={"cuda": misfit},
    )  # fmt: skip
    return ScoredAttention(*scored)


def attention_weights(
    q: Float[Array, "B L N D"],
    k: Float[Array, "B S N D"],
    size: Shaped[Array, "B S"] | None = None,
    *,
    scale: float | None = None,
) -> Float[Array, "B N L S"]:
    """Computes softmax(scale q k^T), the weights that attention multiplies with the values.

    For inspection: :func:`dot_product_attention` and :func:`scored_attention` attend without
    keeping all weights.

    Args:
      q: queries (B, L, N, D).
      k: keys (B, S, N, D).
      size: as in :func:`scored_attention`.
      scale: factor of the logits; None: 1 / sqrt(D).

    Returns:
      (B, N, L, S) in float32 or float64; the sum over the keys is 1.

    Raises:
      ValueError: the shapes do not fit together.
    """
    check_qkv(q, k, k)
    _check_size(size, k)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype = softmax_dtype(q.dtype)
    logits = jnp.einsum("bqnd,bknd->bnqk", q * scale, k, preferred_element_type=dtype)
    if size is not None:
        logits = logits + jnp.log(size.astype(dtype))[:, None, None]
    return jax.nn.softmax(logits)


def _check_size(size, k):
    if size is not None and size.shape != k.shape[:2]:
        raise ValueError(f"size has shape {size.shape}; expected {k.shape[:2]}")


def check_qkv(q: Array, k: Array, v: Array) -> None:
    """Raises ValueError unless q, k, v are (B, L, N, D), (B, S, N, D), (B, S, N, D)."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} has shape {x.shape}; expected (batch, length, heads, dim)")
    if k.shape != v.shape:
        raise ValueError(f"k has shape {k.shape} and v {v.shape}; they must be equal")
    if q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(
            f"k has shape {k.shape} and q {q.shape}; batch, heads and dim must be equal"
        )
