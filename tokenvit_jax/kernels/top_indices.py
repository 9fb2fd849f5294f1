"""Selection of the largest scores, in forms for different machines."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32


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
