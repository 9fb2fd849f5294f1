"""Product of a linear layer, whose gradient of the kernel suits the platform."""

import functools
import math

import jax
from jax import lax
from jaxtyping import Array, Float

from tokenvit_jax.kernels.platforms import by_platform, device_batch

# From this number of tokens on, the product of the narrower matrix first is faster on a CPU.
_MANY_TOKENS = 1024


@jax.custom_vjp
def linear_product(
    x: Float[Array, "*B C"], kernel: Float[Array, "C dim"]
) -> Float[Array, "*B dim"]:
    """Multiplies by the kernel of a linear layer.

    The values and gradients are those of `lax.dot_general`. On a CPU, XLA computes the gradient of
    the kernel from a transposed copy of a map, unless it is written as a product of two matrices.

    Args:
      x: (..., C).
      kernel: (C, dim), in the type of ``x``.
    """
    return lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def _backward(residuals, dy):
    x, kernel = residuals
    tokens = device_batch(x.shape[0]) * math.prod(x.shape[1:-1])
    narrows = kernel.shape[0] >= 2 * kernel.shape[1] and tokens >= _MANY_TOKENS
    dkernel = by_platform(
        "gradient of a linear layer", x, dy,
        cpu=functools.partial(_by_matrices, narrows=narrows),
        default=_by_maps,
    )  # fmt: skip
    dx = lax.dot_general(dy, kernel, (((dy.ndim - 1,), (1,)), ((), ())))
    return dx, dkernel


linear_product.defvjp(lambda x, kernel: (linear_product(x, kernel), (x, kernel)), _backward)


def _by_maps(x, dy):
    """Returns the gradient of the kernel as autodiff writes it."""
    tokens = tuple(range(x.ndim - 1))
    return lax.dot_general(dy, x, ((tokens, tokens), ((), ()))).T


def _by_matrices(x, dy, *, narrows):
    x, dy = (y.reshape(-1, y.shape[-1]) for y in (x, dy))
    product = functools.partial(lax.dot_general, dimension_numbers=(((0,), (0,)), ((), ())))
    if not narrows:
        return product(x, dy)
    # Without the barrier, XLA would fold the transposition into the product of the other order.
    return lax.optimization_barrier(product(dy, x)).T
