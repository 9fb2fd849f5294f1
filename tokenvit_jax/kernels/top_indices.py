"""Selection of the largest scores, in forms for different machines."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int32

from tokenvit_jax.kernels.pieces import range_of, sortable

# The comparisons grow with the square of the number of scores. Up to MAX_RANKED, comparing all with
# all, in one launch, takes no longer than sorting.
MAX_COUNTED, MAX_RANKED = 256, 1024
_BLOCK = 64  # scores that are compared with as many others at once


def by_top_k(scores: Float[Array, "... L"], top_k: int) -> Int32[Array, "... k"]:
    """Selects by XLA's own operation, which is several times faster than sorting on CPU."""
    return lax.top_k(scores, top_k)[1]


def by_sorting(scores: Float[Array, "... L"], top_k: int) -> Int32[Array, "... k"]:
    """Sorts all scores, which moves nothing between the devices that share a batch.

    XLA cannot divide ``top_k`` over devices: every device would gather the whole batch.
    """
    index = lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
    _, order = lax.sort((-scores, index), dimension=-1, is_stable=True, num_keys=1)
    return order[..., :top_k]


def by_counting(
    scores: Float[Array, "... L"], top_k: int, *, interpret: bool = False
) -> Int32[Array, "... k"]:
    """Counts the larger scores of every score, in one program per row of at most `MAX_COUNTED`.

    Args:
      scores: (..., L), of 32 or 16 bits.
      top_k: number of scores to select.
      interpret: whether to run without a GPU, for tests.
    """
    *leading, length = scores.shape
    rows = scores.reshape(-1, length)
    chosen = pl.pallas_call(
        _count_kernel,
        grid=(len(rows),),
        in_specs=[pl.BlockSpec((None, length), lambda row: (row, 0))],
        out_specs=pl.BlockSpec((None, top_k), lambda row: (row, 0)),
        out_shape=jax.ShapeDtypeStruct((len(rows), top_k), jnp.int32),
        compiler_params=plt.CompilerParams(num_warps=4),
        interpret=interpret,
        name="top_indices",
    )(rows)
    return chosen.reshape(*leading, top_k)


def _count_kernel(scores, chosen):
    length, top_k = scores.shape[0], chosen.shape[0]
    padded = max(pl.next_power_of_2(length), 16)
    block = min(4096 // padded, 64)  # 32 numbers per thread
    column = jnp.arange(padded, dtype=jnp.int32)

    def ordered(start, size):
        """Returns integers that order like the scores; -0 equals 0, and NaN has a place, too."""
        inside = range_of(start, size) < length
        score = plt.load(scores.at[pl.ds(start, size)], mask=inside, other=-jnp.inf)
        score = score.astype(jnp.float32)
        return sortable(jnp.where(score == 0, 0.0, score))

    # jax 0.12 refuses slices that are known to end beyond an array, even if masked.
    own = ordered(pl.program_id(0) * 0, padded)

    def count(i, place):
        other, number = ordered(i * block, block)[:, None], range_of(i * block, block)[:, None]
        before = (other > own[None]) | ((other == own[None]) & (number < column[None]))
        return place + (before & (number < length)).sum(0, dtype=jnp.int32)

    place = lax.fori_loop(0, pl.cdiv(length, block), count, jnp.zeros(padded, jnp.int32))

    def write(i, carry):
        wanted = range_of(i * block, block)
        here = (place[None] == wanted[:, None]) & (column < length)[None]
        index = jnp.where(here, column[None], 0).sum(1, dtype=jnp.int32)
        plt.store(chosen.at[pl.ds(i * block, block)], index, mask=wanted < top_k)
        return carry

    lax.fori_loop(0, pl.cdiv(top_k, block), write, 0)


def ranks(
    scores: Float[Array, "B N"], *, interpret: bool = False
) -> tuple[Int32[Array, "B N"], Int32[Array, "B N"]]:
    """Sorts scores by counting, for every score, those that are larger.

    Args:
      scores: (B, N) in float32, no -0 beside +0.
      interpret: whether to run without a GPU, for tests.

    Returns:
      The indices in order of falling scores, ties in order of index, and the place of every score
      in that order (B, N).
    """
    batch, length = scores.shape
    blocks = pl.cdiv(length, _BLOCK)
    row = lambda size: pl.BlockSpec((None, size), lambda _, row: (row, 0))  # noqa: E731
    sizes = blocks * _BLOCK, length
    order, places = pl.pallas_call(
        _ranks_kernel,
        grid=(blocks, batch),
        in_specs=[row(length)],
        out_specs=[row(size) for size in sizes],
        out_shape=[jax.ShapeDtypeStruct((batch, size), jnp.int32) for size in sizes],
        compiler_params=plt.CompilerParams(num_warps=4),
        interpret=interpret,
        name="ranks",
    )(scores)
    return order[:, :length], places


def _ranks_kernel(scores, order, places):
    length = scores.shape[0]
    block = pl.program_id(0)

    def block_of(i):
        index = range_of(i * _BLOCK, _BLOCK)
        return index, sortable(plt.load(scores.at[index], mask=index < length, other=-jnp.inf))

    rows, own = block_of(block)
    own = own[:, None]

    def add(is_first, i, count):
        return count + is_first(block_of(i)[1][None]).astype(jnp.int32)

    def in_own_block(key):
        return (key > own) | ((key == own) & (rows[None] < rows[:, None]))

    count = add(in_own_block, block, jnp.zeros((_BLOCK, _BLOCK), jnp.int32))
    # Of equal scores, those in blocks before are first, those in blocks behind are not.
    count = lax.fori_loop(0, block, functools.partial(add, lambda key: key >= own), count)
    after = functools.partial(add, lambda key: key > own)
    count = lax.fori_loop(block + 1, pl.cdiv(length, _BLOCK), after, count)
    place = count.sum(1, dtype=jnp.int32)
    place = jnp.where(rows < length, place, rows)  # every place is written once
    plt.store(order.at[place], rows)
    plt.store(places.at[rows], place, mask=rows < length)
