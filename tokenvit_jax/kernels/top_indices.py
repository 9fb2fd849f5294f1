"""Forms of the selection of the largest scores."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32


def by_top_k(scores: Float[Array, "... L"], top_k: int) -> Int32[Array, "... k"]:
    """Uses XLA's own selection, which is several times faster than sorting on CPU."""
    return lax.top_k(scores, top_k)[1]


def by_sorting(scores: Float[Array, "... L"], top_k: int) -> Int32[Array, "... k"]:
    """Sorts all scores, which leaves a batch that is divided over devices where it is.

    XLA cannot divide ``top_k`` over devices: every device would gather the whole batch.
    """
    index = lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
    _, order = lax.sort((-scores, index), dimension=-1, is_stable=True, num_keys=1)
    return order[..., :top_k]
