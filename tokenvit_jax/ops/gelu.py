"""The exact GELU and its gradient."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from tokenvit_jax.ops.dtypes import softmax_dtype


@jax.custom_vjp
def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Computes the exact GELU: x times the normal distribution function of x.

    Uses erf, which XLA compiles to one vector loop; on CPU the erfc in `jax.nn.gelu` took 5 times
    as long. Narrower types are computed in float32, because 1 + erf cancels. The backward pass
    keeps only x.

    References:
      Hendrycks and Gimpel 2016, "Gaussian Error Linear Units".
    """
    return gelu_and_slope(x)[0]


def gelu_and_slope(x: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Returns GELU in the type of x, and its derivative in float32 (float64 for float64)."""
    wide = x.astype(softmax_dtype(x.dtype))
    distribution = 0.5 * (1 + lax.erf(wide * 2**-0.5))
    density = jnp.exp(-0.5 * wide * wide) * (2 * math.pi) ** -0.5
    return (wide * distribution).astype(x.dtype), distribution + wide * density


def _gelu_backward(x, dy):
    # Without the barrier XLA would keep erf from the forward pass, which costs more than computing
    # it again.
    x = lax.optimization_barrier(x)
    return ((dy * gelu_and_slope(x)[1]).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)
