"""Linear layers: products and gradients that suit the platform."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from tokenvit_jax.kernels.platforms import by_platform, device_batch

# From this number of tokens on, the product of the narrower matrix first is faster on a CPU.
_MANY_TOKENS = 1024
# Bytes of all parts of a layer from which on a copy of them takes longer than a few launches.
_LARGE_PARTS = 2**23


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def linear_parts(
    x: Float[Array, "*B C"], kernel: Float[Array, "C dim"], bias: Float[Array, " dim"], parts: int
) -> tuple[Float[Array, "*B part"], ...]:
    """Computes a linear layer whose outputs are parts of equal size, such as queries and keys.

    Kernels of attention read each part as an array of its own. Without gradients, a GPU therefore
    computes large parts by a product each, instead of copying them out of one product.

    Args:
      x: (..., C).
      kernel: (C, dim), in the type of ``x``.
      bias: (dim,), in the type of ``x``.
      parts: number of parts; it divides dim.

    Returns:
      The parts, each (..., dim / parts).

    Raises:
      ValueError: ``parts`` does not divide dim.
    """
    dim = kernel.shape[1]
    if parts < 1 or dim % parts:
        raise ValueError(f"parts={parts} does not divide the {dim} outputs of the layer")
    whole = functools.partial(_cut, parts=parts)
    size = device_batch(x.shape[0]) * math.prod(x.shape[1:-1]) * dim * x.dtype.itemsize
    if size < _LARGE_PARTS:
        return whole(x, kernel, bias)
    return by_platform(
        "parts of a linear layer", x, kernel, bias,
        cuda=functools.partial(_by_parts, parts=parts), default=whole, shared=(1, 2),
    )  # fmt: skip


def _cut(x, kernel, bias, *, parts):
    return tuple(jnp.split(linear_product(x, kernel) + bias, parts, axis=-1))


def _by_parts(x, kernel, bias, *, parts):
    pairs = zip(jnp.split(kernel, parts, axis=1), jnp.split(bias, parts), strict=True)
    # Behind barriers, because XLA would join products of the same matrix again.
    return tuple(linear_product(*lax.optimization_barrier((x, w))) + b for w, b in pairs)


def _parts_forward(x, kernel, bias, parts):
    return jax.vjp(functools.partial(_cut, parts=parts), x, kernel, bias)


linear_parts.defvjp(_parts_forward, lambda parts, pull, gradients: pull(gradients))
