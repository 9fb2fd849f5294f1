"""Sums of the rows of every cluster, and weighted means, in forms for different machines."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from tokenvit_jax.kernels.arithmetic import exp2, narrow, widen
from tokenvit_jax.kernels.pieces import LOG2_E, dot, range_of
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
    """Computes weighted means of clusters with weights exp(scores).

    The exponents are shifted by the largest score of a cluster, which a first pass over the tokens
    finds: then a token has one weight, and not one for each of the clusters that it is not in.

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
    kernel = functools.partial(_means_kernel, epsilon=epsilon, interpret=interpret)
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
        functools.partial(kernel, clusters=clusters, width=width),
        grid=(-(-num_clusters // clusters), -(-channels // width), batch),
        in_specs=[tokens] + [per_token] * (len(inputs) - 1),
        out_specs=[sums] + [per_cluster] * (len(outputs) - 1),
        out_shape=outputs,
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
    )(*inputs)


def _own_part(x, assignment, clusters, width):
    """Returns the clusters and channels of a program, and two functions of tokens.

    The first returns their clusters and which of them are in each own cluster (clusters, tokens),
    the second their rows (tokens, channels).
    """
    length, channels = x.shape
    own = range_of(pl.program_id(0) * clusters, clusters)
    columns = range_of(pl.program_id(1) * width, width)

    def members(tokens):
        at = plt.load(assignment.at[tokens], mask=tokens < length, other=-1)
        return at, own[:, None] == at[None]

    def load(tokens):
        mask = (tokens < length)[:, None] & (columns < channels)[None]
        return plt.load(x.at[tokens[:, None], columns[None]], mask=mask, other=0.0)

    return own, columns, members, load


def _store_sums(ref, own, columns, sums):
    inside = (own < ref.shape[0])[:, None] & (columns < ref.shape[1])[None]
    plt.store(ref.at[own[:, None], columns[None]], sums.astype(ref.dtype), mask=inside)


def _add_members(sums, member, rows):
    """Adds up rows (tokens, channels) for member (clusters, tokens).

    The tensor cores add numbers of 8 bits: three of them hold a float32.
    """
    ones = member.astype(jnp.bfloat16)
    if rows.dtype == jnp.bfloat16:
        return sums + dot(ones, rows)
    left = rows.astype(jnp.float32)
    for _ in range(3):
        part = narrow(left, jnp.bfloat16)
        sums += dot(ones, part)
        left -= widen(part)
    return sums


def _sums_kernel(x, assignment, sums, *, clusters, width):
    own, columns, members, load = _own_part(x, assignment, clusters, width)

    def step(i, total):
        tokens = range_of(i * BLOCK, BLOCK)
        return _add_members(total, members(tokens)[1], load(tokens))

    total = jnp.zeros((clusters, width), jnp.float32)
    total = lax.fori_loop(0, -(-x.shape[0] // BLOCK), step, total)
    _store_sums(sums, own, columns, total)


def _means_kernel(
    x, assignment, scores, means, shifts, totals, *, clusters, width, epsilon, interpret
):
    block, length, blocks = pl.program_id(0), x.shape[0], -(-x.shape[0] // BLOCK)
    own, columns, members, load = _own_part(x, assignment, clusters, width)
    inside = own < shifts.shape[0]
    zeros = jnp.zeros((clusters, BLOCK), jnp.float32)

    def scores_of(tokens):
        return plt.load(scores.at[tokens], mask=tokens < length, other=0.0).astype(jnp.float32)

    def add_scores(i, largest):
        tokens = range_of(i * BLOCK, BLOCK)
        score = jnp.where(members(tokens)[1], scores_of(tokens)[None], 0.0)
        return jnp.maximum(largest, score)

    shift = lax.fori_loop(0, blocks, add_scores, zeros).max(1)
    # Programs for other channels store the same.
    plt.store(shifts.at[own], shift, mask=inside)
    if not interpret:
        plt.debug_barrier()

    def add_rows(i, carry):
        total, sums = carry
        tokens = range_of(i * BLOCK, BLOCK)
        at, member = members(tokens)
        is_own = (at // clusters == block) & (at < shifts.shape[0])
        shift_of_token = plt.load(shifts.at[jnp.where(is_own, at, 0)], mask=is_own, other=0.0)
        weight = exp2((scores_of(tokens) - shift_of_token) * LOG2_E)
        weight = jnp.where(is_own, weight, 0.0)
        rows = widen(load(tokens)) * weight[:, None]
        total += jnp.where(member, weight[None], 0.0)
        return total, _add_members(sums, member, rows)

    carry = zeros, jnp.zeros((clusters, width), jnp.float32)
    total, sums = lax.fori_loop(0, blocks, add_rows, carry)
    total = total.sum(1) + epsilon * jnp.exp(-shift)
    _store_sums(means, own, columns, sums / total[:, None])
    plt.store(totals.at[own], total, mask=inside & (pl.program_id(1) == 0))
