"""Weighted means of clusters on TPUs (Pallas-Mosaic)."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from tokenvit_jax.kernels.tpus import LARGE_VMEM, has_large_vmem, vmem_limit

BLOCK = 512  # tokens
SUBLANES, LANES = 8, 128  # of a register
# What the kernel may use of a core's memory [bytes]: of any TPU, and of TPUs with much memory.
SMALL_VMEM = 16 << 20


def misfit(num_clusters: int, channels: int, dtype: DTypeLike) -> str | None:
    """Returns why the kernel cannot take so many clusters, or tokens of a type, or None."""
    if jnp.dtype(dtype) == jnp.float16:
        return "float16"  # Mosaic does not load it
    most = LARGE_VMEM if has_large_vmem() else SMALL_VMEM
    held = pl.cdiv(num_clusters, SUBLANES) * SUBLANES
    channels_held = pl.cdiv(channels, LANES) * LANES
    # Sums, shifts and totals twice, because they are written meanwhile; tokens likewise. By its
    # reports for v4, the compiler holds up to six matrices like the weights, and up to a quarter of
    # a byte for every number of the tokens.
    of_clusters = 4 * held * (2 * channels_held + 4 * LANES + 6 * BLOCK)
    of_tokens = BLOCK * channels_held * (2 * jnp.dtype(dtype).itemsize + 0.25)
    if of_clusters + of_tokens > most:
        return f"{num_clusters} clusters with {channels} channels exceed {most >> 20} MiB"
    return None


def means(
    x: Float[Array, "B N C"],
    assignment: Int[Array, "B N"],
    scores: Float[Array, "B N"],
    num_clusters: int,
    epsilon: float,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B M C"], Float[Array, "B M"], Float[Array, "B M"]]:
    """Computes weighted means of clusters with weights exp(scores), in one pass over the tokens.

    Returns the same as :func:`tokenvit_jax.kernels.cluster_sums.means_by_kernel`.

    Args:
      x: (B, N, C).
      assignment: cluster of each row (B, N), integers in [0, M).
      scores: (B, N).
      num_clusters: M.
      epsilon: constant that is added to each sum of weights.
      interpret: run on a CPU, for tests.
    """
    batch, length, channels = x.shape
    blocks = -(-length // BLOCK)
    row = pl.BlockSpec((None, 1, BLOCK), lambda i, j: (i, 0, j))
    out = lambda size: pl.BlockSpec((None, num_clusters, size), lambda i, j: (i, 0, 0))  # noqa: E731
    shape = lambda size: jax.ShapeDtypeStruct((batch, num_clusters, size), jnp.float32)  # noqa: E731
    sums, shift, total = pl.pallas_call(
        functools.partial(_kernel, length=length, blocks=blocks, epsilon=epsilon),
        grid=(batch, blocks),
        in_specs=[pl.BlockSpec((None, BLOCK, channels), lambda i, j: (i, j, 0)), row, row],
        out_specs=[out(channels), out(1), out(1)],
        out_shape=[shape(channels), shape(1), shape(1)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem_limit()
        ),
        interpret=interpret,
    )(x, assignment.astype(jnp.int32)[:, None], scores.astype(jnp.float32)[:, None])
    return sums, shift[..., 0], total[..., 0]


def _kernel(x, assignment, scores, sums, shift, total, *, length, blocks, epsilon):
    """Adds a block of tokens; the outputs stay in the core's memory until the image is complete."""
    block, num_clusters = pl.program_id(1), sums.shape[0]

    @pl.when(block == 0)
    def _():
        for out in (sums, shift, total):
            out[...] = jnp.zeros_like(out)

    start = block * BLOCK
    own = lax.broadcasted_iota(jnp.int32, (num_clusters, BLOCK), 0)
    token = start + lax.broadcasted_iota(jnp.int32, (num_clusters, BLOCK), 1)
    member = (assignment[...] == own) & (token < length)
    largest = jnp.maximum(shift[...], jnp.where(member, scores[...], 0).max(1, keepdims=True))
    rescale = jnp.exp(shift[...] - largest)
    weights = jnp.where(member, jnp.exp(scores[...] - largest), 0)  # (M, BLOCK)
    # The last block reads beyond the image: any values, even NaN.
    inside = start + lax.broadcasted_iota(jnp.int32, x.shape, 0) < length
    rows = jnp.where(inside, x[...].astype(jnp.float32), 0)
    products = jnp.dot(
        weights, rows, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    sums[...] = sums[...] * rescale + products
    total[...] = total[...] * rescale + weights.sum(1, keepdims=True)
    shift[...] = largest

    @pl.when(block == blocks - 1)
    def _():
        total[...] += epsilon * jnp.exp(-largest)
        sums[...] /= total[...]
