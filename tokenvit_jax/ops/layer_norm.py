"""LayerNorm with statistics in float32, alone or together with the sum that it normalizes."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tokenvit_jax.kernels.layer_norm import backward_pass, forward_pass, layer_norm_misfit
from tokenvit_jax.kernels.platforms import by_platform, device_batch
from tokenvit_jax.ops.dtypes import softmax_dtype


def layer_norm(
    x: Float[Array, "*B C"],
    scale: Float[Array, " C"],
    bias: Float[Array, " C"],
    *,
    epsilon: float,
    dtype: DTypeLike | None = None,
) -> Float[Array, "*B C"]:
    """Normalizes the channels of every token to mean 0 and variance 1, then scales and shifts them.

    The backward pass keeps x in its own type, and mean and 1 / deviation of each token.

    Args:
      x: (..., C).
      scale: (C,).
      bias: (C,).
      epsilon: constant added to the variance.
      dtype: type of the result; None: the type of x. Statistics are in float32 (float64 for
        float64).

    References:
      Ba et al. 2016, "Layer Normalization".
    """
    return _layer_norm(x, scale, bias, epsilon, dtype or x.dtype)


def add_layer_norm(
    x: Float[Array, "*B C"],
    branch: Float[Array, "*B C"] | None,
    scale: Float[Array, " C"],
    bias: Float[Array, " C"],
    *,
    epsilon: float,
    dtype: DTypeLike | None = None,
    factors: Float[Array, " B"] | None = None,
) -> tuple[Float[Array, "*B C"], Float[Array, "*B C"]]:
    """Returns x + factors branch and its LayerNorm, in one pass where there is a kernel.

    The backward pass adds the gradients of both results in the same pass, too. Use it also where
    nothing is added (`branch=None`) but x is needed beside its LayerNorm.

    Args:
      x: (..., C).
      branch: (..., C); None: zeros.
      scale: (C,).
      bias: (C,).
      epsilon: constant added to the variance.
      dtype: type of the normalized result; None: the type of x + branch.
      factors: (B,), factor of the branch of each image, such as the mask of stochastic depth; it
        has no gradient. None: 1.
    """
    if branch is not None:
        total_dtype = jnp.promote_types(x.dtype, branch.dtype)
        x, branch = x.astype(total_dtype), branch.astype(total_dtype)
    return _add_layer_norm(x, branch, factors, scale, bias, epsilon, dtype or x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _layer_norm(x, scale, bias, epsilon, dtype):
    return _forward(x, None, None, scale, bias, epsilon, dtype)[0]


def _layer_norm_forward(x, scale, bias, epsilon, dtype):
    y, residuals = _forward(x, None, None, scale, bias, epsilon, dtype)
    return y, (*residuals, bias)


def _layer_norm_backward(epsilon, dtype, residuals, dy):
    del epsilon, dtype
    dx, _, dscale, dbias = _backward(*residuals, None, dy, None)
    return dx, dscale, dbias


_layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _add_layer_norm(x, branch, factors, scale, bias, epsilon, dtype):
    y, (total, *_) = _forward(x, branch, factors, scale, bias, epsilon, dtype)
    return total, y


def _add_layer_norm_forward(x, branch, factors, scale, bias, epsilon, dtype):
    y, residuals = _forward(x, branch, factors, scale, bias, epsilon, dtype)
    return (residuals[0], y), (*residuals, bias, factors, branch is None)


def _add_layer_norm_backward(epsilon, dtype, residuals, cotangents):
    del epsilon, dtype
    *residuals, alone = residuals
    dtotal, dy = cotangents
    dx, dbranch, dscale, dbias = _backward(*residuals, dy, dtotal)
    factors = residuals[-1]
    dfactors = None if factors is None else jnp.zeros_like(factors)
    return dx, None if alone else dbranch, dfactors, dscale, dbias


_add_layer_norm.defvjp(_add_layer_norm_forward, _add_layer_norm_backward)


def _forward(x, branch, factors, scale, bias, epsilon, dtype):
    """Returns the normalized tokens, and (x + factors branch, scale, mean, 1 / deviation)."""
    options = {"epsilon": epsilon, "dtype": dtype}
    total, y, mean, inverse = by_platform(
        "layer norm",
        x,
        branch,
        factors,
        scale,
        bias,
        default=functools.partial(_forward_default, **options),
        cuda=functools.partial(forward_pass, **options),
        misfits={"cuda": layer_norm_misfit(x)},
        shared=(3, 4),
    )
    return y, (x if branch is None else total, scale, mean, inverse)


def _forward_default(x, branch, factors, scale, bias, *, epsilon, dtype):
    total = x if branch is None else x + _times(branch, factors)
    wide = total.astype(softmax_dtype(x.dtype))
    mean = wide.mean(-1, keepdims=True)
    var = jnp.maximum(0.0, (wide * wide).mean(-1, keepdims=True) - mean * mean)
    inverse = lax.rsqrt(var + epsilon)
    y = (wide - mean) * (inverse * scale) + bias
    return None if branch is None else total, y.astype(dtype), mean[..., 0], inverse[..., 0]


def _times(branch, factors):
    """Returns the branch of each image times its factor."""
    if factors is None:
        return branch
    return branch * jnp.expand_dims(factors.astype(branch.dtype), tuple(range(1, branch.ndim)))


def _backward(x, scale, mean, inverse, bias, factors, dy, dtotal):
    """Returns the gradients of x, branch, scale and bias; `dtotal` is added to the first."""
    dx, dbranch, sums = by_platform(
        "layer norm gradient",
        x,
        dy,
        dtotal,
        factors,
        scale,
        mean,
        inverse,
        default=_backward_default,
        cuda=backward_pass,
        misfits={"cuda": layer_norm_misfit(x)},
        shared=(4,),
    )
    dscale, dbias = sums.sum(0)
    dbranch = dx if factors is None else dbranch
    return dx, dbranch, dscale.astype(scale.dtype), dbias.astype(bias.dtype)


def _backward_default(x, dy, dtotal, factors, scale, mean, inverse):
    inverse = inverse[..., None]
    normed = (x.astype(mean.dtype) - mean[..., None]) * inverse
    dy = dy.astype(mean.dtype)
    scaled = dy * scale
    dx = inverse * (
        scaled - scaled.mean(-1, keepdims=True) - normed * (scaled * normed).mean(-1, keepdims=True)
    )
    dx = dx if dtotal is None else dx + dtotal
    # One sum per device, as the kernel returns them.
    parts = x.shape[0] // device_batch(x.shape[0]) if isinstance(x.shape[0], int) else 1
    rows = math.prod(x.shape[:-1]) // max(parts, 1)  # of 0 images there are no parts
    sums = [a.reshape(parts, rows, x.shape[-1]).sum(1) for a in (dy * normed, dy)]
    dx = dx.astype(x.dtype)
    return dx, None if factors is None else _times(dx, factors), jnp.stack(sums, 1)
