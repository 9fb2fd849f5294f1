"""Selection of the largest or the smallest of many numbers."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

# Values per group of :func:`smallest_k`, at every level of groups of groups.
GROUP = 8


def top_indices(scores: jax.Array, top_k: int) -> jax.Array:
    """Returns the indices (..., k) of the largest scores (..., L), falling, ties to the lowest."""
    first = lambda scores: lax.top_k(scores, top_k)[1]  # noqa: E731
    return lax.platform_dependent(
        scores, cpu=first, default=functools.partial(_by_sorting, top_k=top_k)
    )


def _by_sorting(scores, top_k):
    # XLA cannot divide top_k over devices: a batch that is split over a mesh would be gathered on
    # all of them. A sort along another axis stays divided. On CPU it is several times slower.
    index = lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
    _, order = lax.sort((-scores, index), dimension=-1, is_stable=True, num_keys=1)
    return order[..., :top_k]


def smallest(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the index (...) int32 and the value (...) of the smallest of some values (..., L).

    Ties go to the lowest index. Twice as fast as `argmin` on CPU, whose loop XLA does not
    vectorise. If a value is not a number any index in [0, L) may come back.
    """
    last = values.shape[-1] - 1
    smallest = values.min(-1)
    places = jnp.arange(last + 1, dtype=jnp.int32)
    return jnp.where(values == smallest[..., None], places, last).min(-1), smallest


def smallest_k(values: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Returns the k smallest values (B, k, Q) of (B, N, Q) and their indices, as if sorted by both.

    Like ``lax.top_k``, but along a leading axis and without looking at everything k times.
    """
    length = values.shape[1]
    if length <= 4 * k * GROUP:
        return _select(values, _column(length), k)
    values = jnp.pad(values, ((0, 0), (0, -length % GROUP), (0, 0)), constant_values=jnp.inf)
    return smallest_of_groups(values, in_groups(values).min(2), k)


def smallest_of_groups(values: jax.Array, minima: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """:func:`smallest_k` of whole groups with known minima (B, N / GROUP, Q).

    The k smallest are in the k groups of smallest (minimum, index): a value of another group has at
    least these k minima before it.
    """
    _, groups = smallest_k(minima, min(k, minima.shape[1]))
    index = groups[:, :, None] * GROUP + _column(GROUP)
    index = index.reshape(index.shape[0], -1, index.shape[-1])  # (B, k * GROUP, Q)
    among = jnp.take_along_axis(values, index, 1, mode="promise_in_bounds")
    return _select(among, index, k)


def in_groups(values: jax.Array) -> jax.Array:
    """(B, N, Q) -> (B, N / GROUP, GROUP, Q)."""
    return values.reshape(values.shape[0], -1, GROUP, values.shape[-1])


def _select(values, index, k):
    """:func:`smallest_k` by k rounds over values (B, N, Q) with any distinct indices."""
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
