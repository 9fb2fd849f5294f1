"""GroupNorm with statistics in float32 and a gradient that keeps only the input."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tokenvit_jax.errors import UserError
from tokenvit_jax.ops.dtypes import softmax_dtype


class GroupStatistics(NamedTuple):
    """Mean and inverse standard deviation of the group of each channel, (B, C)."""

    mean: Float[Array, "B C"]
    inverse: Float[Array, "B C"]


def group_norm(
    x: Float[Array, "B *M C"],
    scale: Float[Array, " C"],
    bias: Float[Array, " C"],
    *,
    num_groups: int,
    epsilon: float,
    dtype: DTypeLike | None = None,
) -> Float[Array, "B *M C"]:
    """Normalizes groups of neighbouring channels of each image by their mean and variance.

    Args:
      x: maps (B, ..., C).
      scale: (C,).
      bias: (C,).
      num_groups: number of groups, a divisor of C.
      epsilon: constant added to the variance.
      dtype: type of the result; None: the type of x. Statistics are in float32 (float64 for
        float64).

    Returns:
      The normalized maps (B, ..., C).

    Raises:
      UserError: the groups do not divide the channels.

    References:
      Wu and He 2018, "Group Normalization".
    """
    if x.shape[-1] % num_groups:
        raise UserError(
            f"num_groups={num_groups} does not divide {x.shape[-1]} channels; valid: divisors of "
            f"{x.shape[-1]}"
        )
    return _group_norm(x, scale, bias, num_groups, epsilon, jnp.dtype(dtype or x.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _group_norm(x, scale, bias, num_groups, epsilon, dtype):
    return _forward(x, scale, bias, num_groups, epsilon, dtype)[0]


def _forward(x, scale, bias, num_groups, epsilon, dtype):
    wide = x.astype(softmax_dtype(x.dtype))
    sums = _image_sums(wide, wide * wide)
    mean, mean_square = _group_means(sums, num_groups, math.prod(x.shape[1:-1]))
    var = jnp.maximum(0.0, mean_square - mean * mean)
    statistics = GroupStatistics(mean, lax.rsqrt(var + epsilon))
    factor = statistics.inverse * scale
    y = (wide - _over_maps(mean, x)) * _over_maps(factor, x) + bias
    return y.astype(dtype), (x, scale, bias, statistics)


def _backward(num_groups, epsilon, dtype, residuals, dy):
    """Computes dx = dy_factor dy + x_factor x + offset, with factors per image and channel."""
    del epsilon, dtype
    x, scale, bias, (mean, inverse) = residuals
    dy, wide = dy.astype(mean.dtype), x.astype(mean.dtype)
    sums, products = _image_sums(dy, dy * wide)
    products = inverse * (products - mean * sums)  # sums of dy and the normalized x
    pixels = math.prod(x.shape[1:-1])
    centre, slope = _group_means(scale * jnp.stack([sums, products]), num_groups, pixels)
    x_factor = -inverse * inverse * slope
    offset = -inverse * centre - x_factor * mean
    dx = _over_maps(inverse * scale, x) * dy + _over_maps(x_factor, x) * wide
    dx = dx + _over_maps(offset, x)
    dscale, dbias = products.sum(0), sums.sum(0)
    return dx.astype(x.dtype), dscale.astype(scale.dtype), dbias.astype(bias.dtype)


_group_norm.defvjp(_forward, _backward)


def _image_sums(*values):
    """Returns sums over the pixels of each image, (n, B, C)."""
    return jnp.stack([x.sum(tuple(range(1, x.ndim - 1))) for x in values])


def _group_means(sums, num_groups, pixels):
    """Returns the means over groups for the sums over pixels (n, B, C), for each channel."""
    groups = sums.reshape(*sums.shape[:-1], num_groups, sums.shape[-1] // num_groups)
    means = groups.sum(-1, keepdims=True) / (pixels * groups.shape[-1])
    return jnp.broadcast_to(means, groups.shape).reshape(sums.shape)


def _over_maps(values, x):
    """Gives values (B, C) the axes of maps (B, ..., C)."""
    return values.reshape(values.shape[0], *(1,) * (x.ndim - 2), values.shape[1])
