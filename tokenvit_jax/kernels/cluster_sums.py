"""Sums of the rows of every cluster, and weighted means, in forms for different machines."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from tokenvit_jax.kernels.arithmetic import exp2, fma
from tokenvit_jax.kernels.pieces import LOG2_E, range_of, three_products
from tokenvit_jax.kernels.platforms import device_batch


def sums_by_scatter(
    x: Float[Array, "B N C"], assignment: Int[Array, "B N"], num_clusters: int
) -> Float[Array, "B M C"]:
    """Adds row by row; on CPU 5 to 100 times faster than products, more so with more clusters."""
    zeros = jnp.zeros_like(x, shape=(num_clusters, x.shape[2]))
    add = lambda rows, at: zeros.at[at].add(rows, mode="promise_in_bounds")  # noqa: E731
    return jax.vmap(add)(x, assignment)


def sums_by_products(
    x: Float[Array, "B N C"],
    assignment: Int[Array, "B N"],
    num_clusters: int,
    chunk: int = 1 << 25,
) -> Float[Array, "B M C"]:
    """Multiplies by the membership matrix, in parts with at most about ``chunk`` entries.

    Deterministic on accelerators, where a scatter adds in any order.
    """
    batch, length, dim = x.shape
    size = min(max(chunk // (device_batch(batch) * num_clusters), 1), length)
    cluster = jnp.arange(num_clusters, dtype=assignment.dtype)[:, None]

    def step(i, sums):
        start = jnp.minimum(i * size, length - size)
        is_new = start + jnp.arange(size) >= i * size  # the last chunk begins earlier
        rows = lax.dynamic_slice_in_dim(x, start, size, 1)
        at = lax.dynamic_slice_in_dim(assignment, start, size, 1)[:, None]
        member = ((at == cluster) & is_new).astype(x.dtype)  # (B, M, size)
        return sums + jnp.einsum("bmn,bnc->bmc", member, rows, precision=lax.Precision.HIGHEST)

    sums = jnp.zeros_like(x, shape=(batch, num_clusters, dim))
    return lax.fori_loop(0, -(-length // size), step, sums)


# ------------------------------------------------------------------------------------------------
# Kernel for NVIDIA GPUs (Pallas-Triton)
# ------------------------------------------------------------------------------------------------

# Tokens, clusters and channels in registers; products need at least 16 of each.
BLOCK = 64


def sums_by_kernel(
    x: Float[Array, "B N C"],
    assignment: Int[Array, "B N"],
    num_clusters: int,
    *,
    interpret: bool = False,
) -> Float[Array, "B M C"]:
    """Multiplies by parts of the membership matrix that exist in registers only."""
    shape = x.shape[0], num_clusters, x.shape[2]
    outputs = [jax.ShapeDtypeStruct(shape, x.dtype)]
    return _call(_sums_kernel, (x, assignment), outputs, interpret)[0]


def means_by_kernel(
    x: Float[Array, "B N C"],
    assignment: Int[Array, "B N"],
    scores: Float[Array, "B N"],
    num_clusters: int,
    epsilon: float,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B M C"], Float[Array, "B M"], Float[Array, "B M"]]:
    """Computes weighted means of clusters with weights exp(scores), in one pass over the tokens.

    The exponents are shifted by the largest score of a cluster so far. A larger score rescales the
    sums, as in flash attention.

    Args:
      x: (B, N, C).
      assignment: cluster of each row (B, N), integers in [0, M).
      scores: (B, N).
      num_clusters: M.
      epsilon: constant that is added to each sum of weights.
      interpret: run on a CPU, for tests.

    Returns:
      The means (B, M, C), the largest score of each cluster, at least 0, and the sum of
      exp(score - largest) and epsilon * exp(-largest) (B, M), all float32.
    """
    shape = x.shape[0], num_clusters, x.shape[2]
    outputs = [jax.ShapeDtypeStruct(shape[:n], jnp.float32) for n in (3, 2, 2)]
    kernel = functools.partial(_means_kernel, epsilon=epsilon)
    return _call(kernel, (x, assignment, scores), outputs, interpret)


def _call(kernel, inputs, outputs, interpret):
    """Calls a kernel for blocks of clusters, blocks of channels and images.

    The programs see the tokens of one image, with one block of channels.
    """
    x, (batch, num_clusters, channels) = inputs[0], outputs[0].shape
    clusters, width = (
        min(max(pl.next_power_of_2(size), 16), BLOCK) for size in (num_clusters, channels)
    )
    per_token = pl.BlockSpec((None, x.shape[1]), lambda i, j, image: (image, 0))
    tokens = pl.BlockSpec((None, *x.shape[1:]), lambda i, j, image: (image, 0, 0))
    sums = pl.BlockSpec((None, num_clusters, channels), lambda i, j, image: (image, 0, 0))
    per_cluster = pl.BlockSpec((None, num_clusters), lambda i, j, image: (image, 0))
    return pl.pallas_call(
        functools.partial(
            kernel, clusters=clusters, width=width, precision=three_products(interpret)
        ),
        grid=(-(-num_clusters // clusters), -(-channels // width), batch),
        in_specs=[tokens] + [per_token] * (len(inputs) - 1),
        out_specs=[sums] + [per_cluster] * (len(outputs) - 1),
        out_shape=outputs,
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
    )(*inputs)


def _own_part(x, assignment, clusters, width):
    """Returns the clusters and channels of a program, and a function that loads its tokens.

    The function returns rows (tokens, channels) and which of them are in each cluster
    (tokens, clusters): threads hold columns of such a matrix, so that reductions over tokens need
    few exchanges.
    """
    length, channels = x.shape
    own = range_of(pl.program_id(0) * clusters, clusters)
    columns = range_of(pl.program_id(1) * width, width)

    def load(tokens):
        inside = tokens < length
        at = plt.load(assignment.at[tokens], mask=inside, other=-1)
        mask = inside[:, None] & (columns < channels)[None]
        rows = plt.load(x.at[tokens[:, None], columns[None]], mask=mask, other=0.0)
        return rows.astype(jnp.float32), at[:, None] == own[None]

    return own, columns, load


def _store_sums(ref, own, columns, sums):
    inside = (own < ref.shape[0])[:, None] & (columns < ref.shape[1])[None]
    plt.store(ref.at[own[:, None], columns[None]], sums.astype(ref.dtype), mask=inside)


def _of_tokens(weights, rows, precision):
    """Returns the sums of rows (tokens, channels) with weights (tokens, clusters)."""
    over_tokens = (((0,), (0,)), ((), ()))
    return lax.dot_general(weights, rows, over_tokens, precision=precision)


def _sums_kernel(x, assignment, sums, *, clusters, width, precision):
    own, columns, load = _own_part(x, assignment, clusters, width)

    def step(i, total):
        rows, member = load(range_of(i * BLOCK, BLOCK))
        return total + _of_tokens(member.astype(jnp.float32), rows, precision)

    total = jnp.zeros((clusters, width), jnp.float32)
    total = lax.fori_loop(0, -(-x.shape[0] // BLOCK), step, total)
    _store_sums(sums, own, columns, total)


def _means_kernel(
    x, assignment, scores, means, shifts, totals, *, clusters, width, precision, epsilon
):
    own, columns, load = _own_part(x, assignment, clusters, width)

    def step(i, carry):
        shift, total, sums = carry
        tokens = range_of(i * BLOCK, BLOCK)
        rows, member = load(tokens)
        score = plt.load(scores.at[tokens], mask=tokens < x.shape[0], other=0.0)
        score = score.astype(jnp.float32)[:, None]
        largest = jnp.maximum(shift, jnp.where(member, score, 0.0).max(0))
        rescale = jnp.exp(shift - largest)
        weights = exp2(fma(score, LOG2_E, largest[None] * -LOG2_E))
        weights = jnp.where(member, weights, 0.0)
        products = _of_tokens(weights, rows, precision)
        return largest, total * rescale + weights.sum(0), sums * rescale[:, None] + products

    zeros = jnp.zeros((clusters,), jnp.float32)
    carry = zeros, zeros, jnp.zeros((clusters, width), jnp.float32)
    shift, total, sums = lax.fori_loop(0, -(-x.shape[0] // BLOCK), step, carry)
    total += epsilon * jnp.exp(-shift)
    _store_sums(means, own, columns, sums / total[:, None])
    first = (own < shifts.shape[0]) & (pl.program_id(1) == 0)
    plt.store(shifts.at[own], shift, mask=first)
    plt.store(totals.at[own], total, mask=first)
