"""The exact GELU, alone and behind a bias, and its gradient."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from tokenvit_jax.kernels import channel_sums as kernels
from tokenvit_jax.kernels.platforms import by_platform
from tokenvit_jax.ops.channel_affine import per_device
from tokenvit_jax.ops.dtypes import softmax_dtype


@jax.custom_vjp
def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Computes the exact GELU: x times the normal distribution function of x.

    Types narrower than float32 are computed in float32. The backward pass keeps only x.

    References:
      Hendrycks and Gimpel 2016, "Gaussian Error Linear Units".
    """
    return gelu_and_slope(x)[0]


def gelu_and_slope(x: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Returns GELU in the type of x, and its derivative in float32 (float64 for float64)."""
    wide = x.astype(softmax_dtype(x.dtype))
    distribution = _distribution(wide)
    density = jnp.exp(-0.5 * wide * wide) * (2 * math.pi) ** -0.5
    return (wide * distribution).astype(x.dtype), distribution + wide * density


@jax.jit  # traced once for all layers of a size
def _distribution(x):
    """Returns the normal distribution function of x, in its type."""
    if x.dtype == jnp.float64:
        return _distribution_by_erf(x)
    return by_platform(
        "normal distribution", x, default=_distribution_by_erf, tpu=_distribution_by_polynomial,
        shared=(0,),
    )  # fmt: skip


def _distribution_by_erf(x):
    return 0.5 * (1 + lax.erf(x * 2**-0.5))


def _distribution_by_polynomial(x):
    size = jnp.minimum(jnp.abs(x), 10)  # nothing is left of the tail beyond
    exponent = 0.0
    for coefficient in reversed(kernels.LOG2_TAIL):
        exponent = exponent * size + math.log(2) * coefficient
    tail = jnp.exp(exponent)
    return jnp.where(x < 0, tail, 1 - tail)


def _gelu_backward(x, dy):
    # Without the barrier XLA would keep the distribution from the forward pass, which costs more
    # than computing it again.
    x = lax.optimization_barrier(x)
    return ((dy * gelu_and_slope(x)[1]).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


@jax.custom_vjp
def bias_gelu(x: Float[Array, "*B C"], bias: Float[Array, " C"]) -> Float[Array, "*B C"]:
    """Computes gelu(x + bias), whose gradients come from one pass over x.

    Args:
      x: (..., C).
      bias: (C,).

    Returns:
      (..., C) in the type of ``x``.
    """
    return by_platform(
        "gelu", x, bias, default=lambda x, bias: gelu(x + bias.astype(x.dtype)),
        cuda=kernels.gelu_forward, misfits={"cuda": kernels.misfit(x.shape)}, shared=(1,),
    )  # fmt: skip


def _bias_gelu_backward(residuals, dy):
    x, bias = residuals
    return gelu_gradient(dy, None, x, bias)


bias_gelu.defvjp(lambda x, bias: (bias_gelu(x, bias), (x, bias)), _bias_gelu_backward)


def gelu_gradient(
    dy: Float[Array, "*B C"],
    dsums: Float[Array, "2 C"] | None,
    x: Float[Array, "*B C"],
    bias: Float[Array, " C"],
) -> tuple[Float[Array, "*B C"], Float[Array, " C"]]:
    """Returns the gradients of x and bias from those of y = gelu(x + bias).

    Args:
      dy: gradient of y (..., C).
      dsums: gradients of the sums of y and of y^2 over all but the last axis (2, C); None: zeros.
      x: (..., C).
      bias: (C,).
    """
    dx, dbias = by_platform(
        "gelu gradient", dy, dsums, x, bias,
        default=_gradient_by_xla, cuda=kernels.gelu_backward,
        misfits={"cuda": kernels.misfit(x.shape)}, shared=(1, 3),
    )  # fmt: skip
    return dx, dbias.sum((0, 1)).astype(bias.dtype)


def _gradient_by_xla(dy, dsums, x, bias):
    wide = softmax_dtype(x.dtype)
    y, slope = gelu_and_slope(lax.optimization_barrier(x.astype(wide)) + bias)
    dx = with_sums_gradient(dy, dsums, y) * slope
    dbias = jnp.sum(dx, tuple(range(x.ndim - 1)))
    return dx.astype(x.dtype), per_device(dbias[None])


def with_sums_gradient(
    dy: Float[Array, "*B C"], dsums: Float[Array, "2 C"] | None, y: Float[Array, "*B C"]
) -> Float[Array, "*B C"]:
    """Adds the gradient of the sums of y and of y^2 to that of y.

    Args:
      dy: gradient of y (..., C).
      dsums: gradients of both sums (2, C); None: zeros.
      y: (..., C).
    """
    return dy if dsums is None else dy + (dsums[0] + 2 * dsums[1] * y)
