"""Selects the largest or the smallest among many numbers."""

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, Shaped

from tokenvit_jax.kernels.platforms import by_platform
from tokenvit_jax.kernels.top_indices import MAX_COUNTED, by_counting, by_sorting, by_top_k

# Values per group in :func:`smallest_k`, at every level of groups of groups.
GROUP = 8


def top_indices(scores: Float[Array, "... L"], top_k: int) -> Int32[Array, "... k"]:
    """Returns the indices (..., k) of the largest scores (..., L), falling, ties to the lowest."""
    on_gpu = by_counting if top_k and scores.shape[-1] <= MAX_COUNTED else by_top_k
    on_cpu, on_gpu, elsewhere = (
        functools.partial(form, top_k=top_k) for form in (by_top_k, on_gpu, by_sorting)
    )
    return by_platform("top indices", scores, cpu=on_cpu, cuda=on_gpu, default=elsewhere)


def smallest(
    values: Shaped[Array, "*batch L"],
) -> tuple[Int32[Array, "*batch"], Shaped[Array, "*batch"]]:
    """Returns index (...) and value (...) of the smallest along the last axis of values (..., L).

    Ties go to the lowest index. On CPU this is twice as fast as ``argmin``, whose loop XLA does not
    vectorise. If a value is NaN, the index may be any number in [0, L).
    """
    last = values.shape[-1] - 1
    smallest = values.min(-1)
    places = jnp.arange(last + 1, dtype=jnp.int32)
    return jnp.where(values == smallest[..., None], places, last).min(-1), smallest


def smallest_k(
    values: Float[Array, "B N Q"], k: int
) -> tuple[Float[Array, "B k Q"], Int32[Array, "B k Q"]]:
    """Returns the k smallest values along the second axis and their indices, sorted by both.

    This resembles ``lax.top_k`` along a leading axis, but does not scan all values k times.

    Args:
      values: (B, N, Q).
      k: from 1 to N.

    Returns:
      Values (B, k, Q) in rising order, and indices (B, k, Q); ties are in order of index.
    """
    length = values.shape[1]
    if length <= 4 * k * GROUP:
        return _select(values, _column(length), k)
    values = jnp.pad(values, ((0, 0), (0, -length % GROUP), (0, 0)), constant_values=jnp.inf)
    return smallest_of_groups(values, in_groups(values).min(2), k)


def smallest_of_groups(
    values: Float[Array, "B N Q"], minima: Float[Array, "B groups Q"], k: int
) -> tuple[Float[Array, "B k Q"], Int32[Array, "B k Q"]]:
    """Computes :func:`smallest_k` of values whose groups have known minima.

    The k smallest values are in the k groups with the smallest (minimum, index): at least these k
    minima come before any value of another group.

    Args:
      values: (B, N, Q), N a multiple of ``GROUP``.
      minima: (B, N / GROUP, Q), the smallest value in each group.
      k: from 1 to N.

    Returns:
      The result of :func:`smallest_k`.
    """
    _, groups = smallest_k(minima, min(k, minima.shape[1]))
    index = groups[:, :, None] * GROUP + _column(GROUP)
    index = index.reshape(index.shape[0], index.shape[1] * GROUP, index.shape[-1])
    among = jnp.take_along_axis(values, index, 1, mode="promise_in_bounds")
    return _select(among, index, k)


def in_groups(values: Shaped[Array, "B N Q"]) -> Shaped[Array, "B groups group Q"]:
    """Divides values into groups: (B, N, Q) -> (B, N / GROUP, GROUP, Q)."""
    return values.reshape(values.shape[0], values.shape[1] // GROUP, GROUP, values.shape[-1])


def largest_mask(scores: Float[Array, "B N L G"], top_k: int) -> Bool[Array, "B N L G"]:
    """Returns a mask of the ``top_k`` largest scores along L, ties to the lowest index.

    Finds the k-th largest value by bisection, bit by bit, on integers that order like the floats,
    then the index up to which its ties are selected. Every step counts along a leading axis, which
    is a vector loop on CPU. For a mask this is faster than ``lax.top_k`` and selects exactly the
    same set.
    """
    unsigned, signed, bits = {4: (jnp.uint32, jnp.int32, 32), 8: (jnp.uint64, jnp.int64, 64)}[
        scores.dtype.itemsize
    ]
    sign = jnp.array(1 << (bits - 1), unsigned)
    raw = lax.bitcast_convert_type(scores, unsigned)
    ordered = jnp.where(lax.bitcast_convert_type(scores, signed) < 0, ~raw, raw | sign)

    def count(mask):
        return jnp.sum(mask, axis=-2, keepdims=True, dtype=jnp.int32)

    zero = jnp.zeros_like(ordered, shape=(*scores.shape[:2], 1, scores.shape[3]))
    threshold = _largest_integer(zero, bits, lambda value: count(ordered >= value) >= top_k)
    above, tied = ordered > threshold, ordered == threshold
    wanted = top_k - count(above)
    index = jnp.arange(scores.shape[2], dtype=jnp.int32)[:, None]
    # The ties before this index are selected.
    end = _largest_integer(
        jnp.zeros_like(wanted),
        scores.shape[2].bit_length(),
        lambda value: count(tied & (index < value)) <= wanted,
    )
    return above | (tied & (index < end))


def _largest_integer(zero, bits, holds):
    """Returns the largest integers of ``bits`` bits, shaped like ``zero``, that ``holds`` accepts.

    ``holds`` is true up to some integer and false above it. One loop compiles in half the time of
    32 copies of its body, and runs as fast.
    """

    def try_bit(_, carry):
        value, bit = carry
        candidate = value | bit
        return jnp.where(holds(candidate), candidate, value), bit >> 1

    first_bit = jnp.array(1 << (bits - 1), zero.dtype)
    return lax.fori_loop(0, bits, try_bit, (zero, first_bit))[0]


def _select(values, index, k):
    """Computes :func:`smallest_k` by k rounds over values (B, N, Q) with any distinct indices."""
    selected, left = [], True
    largest = jnp.iinfo(index.dtype).max
    for _ in range(k):
        value = jnp.where(left, values, jnp.inf).min(1, keepdims=True)
        at = jnp.where(left & (values == value), index, largest).min(1, keepdims=True)
        selected.append((value, at))
        left = (values > value) | ((values == value) & (index > at))
    values, indices = zip(*selected, strict=True)
    return jnp.concatenate(values, 1), jnp.concatenate(indices, 1)


def _column(length):
    return jnp.arange(length, dtype=jnp.int32)[:, None]
