"""Softmax attention that also sums up the attention which each key receives."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Shaped

from tokenvit_jax.kernels import cudnn
from tokenvit_jax.kernels.arithmetic import exp2, fma, reciprocal
from tokenvit_jax.kernels.attention import attend
from tokenvit_jax.kernels.pieces import LOG2_E, range_of
from tokenvit_jax.ops.dtypes import softmax_dtype

BLOCK = 64  # queries of a program, and keys of a step: 32 logits per thread


def score_with_logits(
    q: Float[Array, "B L N D"],
    k: Float[Array, "B S N D"],
    v: Float[Array, "B S N D"],
    size: Shaped[Array, "B S"] | None,
    *,
    scale: float,
    diagonal: bool,
) -> tuple[Float[Array, "B L N D"], Float[Array, "B S"]]:
    """Attends with all logits at once; see `ops.scored_attention`."""
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q * scale, k, v))
    bias = None if size is None else jnp.log(size.astype(softmax_dtype(q.dtype)))[:, None, None]
    output, weights, total = attend(q, k, v, bias=bias)
    if not diagonal:
        weights = jnp.where(jnp.eye(q.shape[2], dtype=bool), 0, weights)
    received = jnp.einsum("bhqk,bhq->bk", weights.astype(total.dtype), 1 / total[..., 0])
    return jnp.swapaxes(output, 1, 2), received


def score_by_kernels(
    q: Float[Array, "B L N D"],
    k: Float[Array, "B S N D"],
    v: Float[Array, "B S N D"],
    size: Shaped[Array, "B S"] | None,
    *,
    scale: float,
    diagonal: bool,
) -> tuple[Float[Array, "B L N D"], Float[Array, "B S"]]:
    """Attends by cuDNN, and sums up the weights in a second kernel that computes them again.

    No logits are in memory. The compiler leaves the second kernel out if nothing reads its sums.
    """
    bias = None
    if size is not None:
        bias = jnp.maximum(jnp.log(size.astype(jnp.float32)), cudnn.NEVER)
    output = cudnn.attend(q, k, v, scale=scale, key_bias=bias)
    return output, received_attention(q, k, bias, scale, diagonal)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def received_attention(
    q: Float[Array, "B L N D"],
    k: Float[Array, "B S N D"],
    key_bias: Float[Array, "B S"] | None,
    scale: float,
    diagonal: bool,
    interpret: bool = False,
) -> Float[Array, "B S"]:
    """Sums up softmax(scale q k^T + key_bias) over heads and queries, in one kernel.

    Each program reads 64 queries of a head, passes twice over the keys, first for the normaliser
    and then for the weights, and writes its sums of them.

    Args:
      q: queries (B, L, N, D).
      k: keys (B, S, N, D).
      key_bias: added to the logits of each key (B, S), float32; None: 0.
      scale: factor of the products.
      diagonal: whether the sums include query i's weight for key i.
      interpret: whether to run the kernel by jax, for tests.

    Returns:
      (B, S) in float32. The backward pass has all logits in memory.
    """
    (batch, num_queries, heads, dim), num_keys = q.shape, k.shape[1]
    blocks, keys, width = pl.cdiv(num_queries, BLOCK), _rounded_up(num_keys), _width(dim)
    of_keys = pl.BlockSpec((None, keys), lambda b, n, i: (b, 0))
    biases = [] if key_bias is None else [(key_bias, of_keys)]
    arrays, specs = zip(
        (q, pl.BlockSpec((None, BLOCK, None, width), lambda b, n, i: (b, i, n, 0))),
        (k, pl.BlockSpec((None, keys, None, width), lambda b, n, i: (b, 0, n, 0))),
        *biases,
        strict=True,
    )
    sums = pl.pallas_call(
        functools.partial(
            _sum_weights, shape=(num_queries, num_keys, dim), scale=scale, diagonal=diagonal
        ),
        grid=(batch, heads, blocks),
        in_specs=specs,
        out_specs=pl.BlockSpec((None, None, None, keys), lambda b, n, i: (b, n, i, 0)),
        out_shape=jax.ShapeDtypeStruct((batch, heads, blocks, num_keys), jnp.float32),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="received_attention",
    )(*arrays)
    return sums.sum((1, 2))


def _sum_weights(q_ref, k_ref, *refs, shape, scale, diagonal):
    """Sums up the weights of a block of queries, key by key."""
    *biases, sums_ref = refs
    num_queries, num_keys, dim = shape
    rows = range_of(pl.program_id(2) * BLOCK, BLOCK)
    is_query = (rows < num_queries)[:, None]
    in_dim = range_of(0, q_ref.shape[1]) < dim
    q = plt.load(q_ref, mask=is_query & in_dim, other=0.0)
    q = (q * scale).astype(q.dtype)

    def logits_of(step):
        block = pl.ds(step * BLOCK, BLOCK)
        columns = range_of(step * BLOCK, BLOCK)
        is_key = columns < num_keys
        k = plt.load(k_ref.at[block, :], mask=is_key[:, None] & in_dim, other=0.0)
        logits = plt.dot(q, k.T)
        for bias_ref in biases:
            logits += plt.load(bias_ref.at[block], mask=is_key, other=0.0)
        return jnp.where(is_key, logits, -jnp.inf), columns, block

    def normalise(step, carry):
        largest, total = carry
        logits, _, _ = logits_of(step)
        new = jnp.maximum(largest, logits.max(1) * LOG2_E)
        total = total * exp2(largest - new) + exp2(fma(logits, LOG2_E, -new[:, None])).sum(1)
        return new, total

    def add_up(step, carry):
        logits, columns, block = logits_of(step)
        counts = is_query
        if not diagonal:
            counts &= rows[:, None] != columns
        weights = exp2(fma(logits, LOG2_E, -largest[:, None])) * inverse[:, None]
        weights = jnp.where(counts, weights, 0.0)
        plt.store(sums_ref.at[block], weights.sum(0), mask=columns < num_keys)
        return carry

    steps = k_ref.shape[0] // BLOCK
    start = jnp.full((BLOCK,), jnp.finfo(jnp.float32).min), jnp.zeros((BLOCK,), jnp.float32)
    largest, total = lax.fori_loop(0, steps, normalise, start)
    inverse = reciprocal(total)
    lax.fori_loop(0, steps, add_up, 0)


def _rounded_up(length):
    return pl.cdiv(length, BLOCK) * BLOCK


def _width(dim):
    return max(16, pl.next_power_of_2(dim))  # a smaller product has no instruction


def _forward(q, k, key_bias, scale, diagonal, interpret):
    return received_attention(q, k, key_bias, scale, diagonal, interpret), (q, k, key_bias)


def _backward(scale, diagonal, interpret, residuals, d_received):
    q, k, key_bias = residuals

    def with_logits(q, k, key_bias):
        size = None if key_bias is None else jnp.exp(key_bias)
        return score_with_logits(q, k, k, size, scale=scale, diagonal=diagonal)[1]

    return jax.vjp(with_logits, q, k, key_bias)[1](d_received)


received_attention.defvjp(_forward, _backward)
