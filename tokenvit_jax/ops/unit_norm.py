"""Scales vectors to length 1."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from tokenvit_jax.ops.dtypes import softmax_dtype


def unit_norm(x: Float[Array, "... D"], epsilon: float = 0.0) -> Float[Array, "... D"]:
    """Scales vectors to length 1, in float32 or float64; zeros stay zeros.

    Args:
      x: (..., D).
      epsilon: constant added to the squared length. If it is above 0, vectors near zero come out
        shorter than 1, and their gradient stays finite.
    """
    x = x.astype(softmax_dtype(x.dtype))
    square = jnp.sum(x * x, -1, keepdims=True)
    square = square + epsilon if epsilon else jnp.maximum(square, jnp.finfo(x.dtype).tiny)
    return x * lax.rsqrt(square)
