"""Selection of the largest of many numbers."""

import functools

import jax
import jax.numpy as jnp
from jax import lax


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
