"""BatchNorm with statistics in float32 and a gradient that keeps only the input.

Each direction exchanges one small array between devices: two sums per channel.
"""

import functools
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tokenvit_jax.ops.dtypes import softmax_dtype
from tokenvit_jax.ops.gelu import gelu, gelu_and_slope


class DeviceGroups(NamedTuple):
    """Groups of consecutive devices, each with statistics of its own.

    Attributes:
      axis_name: mapped axis or axes of all devices.
      size: devices in a group, a divisor of their number.
    """

    axis_name: str | tuple[str, ...]
    size: int


# The devices that share statistics: those of mapped axes, groups of these, or None, one device.
SharedBy: TypeAlias = str | tuple[str, ...] | DeviceGroups | None


class BatchAffine(NamedTuple):
    """BatchNorm as an affine function per channel: y = factor x + offset.

    Attributes:
      factor: (C,), scale / sqrt(var + epsilon).
      offset: (C,), bias - mean factor.
      mean: (C,), mean over the global batch.
      var: (C,), biased variance over the global batch.
    """

    factor: Float[Array, " C"]
    offset: Float[Array, " C"]
    mean: Float[Array, " C"]
    var: Float[Array, " C"]


class BatchAffineGradient(NamedTuple):
    """Gradient of BatchNorm: dx = dy_factor dy + x_factor x + offset, per channel.

    Attributes:
      dy_factor: (C,), factor of the gradient of the output.
      x_factor: (C,), factor of the input.
      offset: (C,).
      dscale: (C,), gradient of the scale.
      dbias: (C,), gradient of the bias.
    """

    dy_factor: Float[Array, " C"]
    x_factor: Float[Array, " C"]
    offset: Float[Array, " C"]
    dscale: Float[Array, " C"]
    dbias: Float[Array, " C"]


def batch_norm(
    x: Float[Array, "*B C"],
    scale: Float[Array, " C"],
    bias: Float[Array, " C"],
    *,
    epsilon: float,
    dtype: DTypeLike | None = None,
    axis_name: SharedBy = None,
    with_gelu: bool = False,
) -> tuple[Float[Array, "*B C"], Float[Array, " C"], Float[Array, " C"]]:
    """Normalizes every channel by its mean and variance over the global batch, or a group's part.

    Args:
      x: (..., C).
      scale: (C,).
      bias: (C,).
      epsilon: constant added to the variance.
      dtype: type of the result; None: the type of x. Statistics are in float32 (float64 for
        float64).
      axis_name: mapped axis or axes that divide the batch, or groups of their devices; None: one
        device.
      with_gelu: whether GELU(x) is normalized instead of x. The backward pass then computes GELU
        again instead of keeping it.

    Returns:
      The normalized array (..., C); mean and biased variance (C,), which have no gradient.

    References:
      Ioffe and Szegedy 2015, "Batch Normalization".
    """
    y, affine = _batch_norm(
        x, scale, bias, epsilon, dtype or x.dtype, axis_name, with_gelu
    )  # fmt: skip
    return y, lax.stop_gradient(affine.mean), lax.stop_gradient(affine.var)


def affine_of(
    sums: Float[Array, "2 C"],
    count: int,
    scale: Float[Array, " C"],
    bias: Float[Array, " C"],
    epsilon: float,
) -> BatchAffine:
    """Returns BatchNorm as an affine function, from sums over the global batch.

    Args:
      sums: (2, C), sums of x and of x^2.
      count: number of values per channel.
      scale: (C,).
      bias: (C,).
      epsilon: constant added to the variance.
    """
    mean, mean_square = sums / count
    var = jnp.maximum(0.0, mean_square - mean * mean)
    factor = lax.rsqrt(var + epsilon) * scale
    return BatchAffine(factor, bias - mean * factor, mean, var)


def affine_gradient(
    sums: Float[Array, "2 C"],
    global_sums: Float[Array, "2 C"],
    count: int,
    affine: BatchAffine,
    epsilon: float,
) -> BatchAffineGradient:
    """Returns the gradient of BatchNorm as an affine function.

    Args:
      sums: (2, C), sums of dy and of dy x over the part of the batch that this program sees, for
        the gradients of scale and bias.
      global_sums: (2, C), the same over the global batch; unlike `sums` under pmap only.
      count: number of values per channel in the global batch.
      affine: result of :func:`affine_of`.
      epsilon: constant added to the variance.
    """
    inverse = lax.rsqrt(affine.var + epsilon)

    def dscale(sums):
        return inverse * (sums[1] - affine.mean * sums[0])

    x_factor = -affine.factor * inverse * dscale(global_sums) / count
    offset = -affine.factor * global_sums[0] / count - x_factor * affine.mean
    return BatchAffineGradient(affine.factor, x_factor, offset, dscale(sums), sums[0])


def over_devices(sums: Float[Array, "2 C"], axis_name: SharedBy) -> Float[Array, "2 C"]:
    """Returns sums over the devices that share statistics."""
    if not isinstance(axis_name, DeviceGroups):
        return sums if axis_name is None else lax.psum(sums, axis_name)
    if axis_name.size == 1:
        return sums
    devices = range(lax.axis_size(axis_name.axis_name))
    groups = [[*devices[i : i + axis_name.size]] for i in devices[:: axis_name.size]]
    return lax.psum(sums, axis_name.axis_name, axis_index_groups=groups)


def num_sharing(axis_name: SharedBy) -> int:
    """Returns the number of devices that share statistics."""
    if isinstance(axis_name, DeviceGroups):
        return axis_name.size
    return 1 if axis_name is None else lax.axis_size(axis_name)


def global_count(x: Float[Array, "*B C"], axis_name: SharedBy) -> int:
    """Returns the number of values per channel on the devices that share statistics."""
    return num_sharing(axis_name) * x.size // x.shape[-1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _batch_norm(x, scale, bias, epsilon, dtype, axis_name, with_gelu):
    return _forward(x, scale, bias, epsilon, dtype, axis_name, with_gelu)[0]


def _forward(x, scale, bias, epsilon, dtype, axis_name, with_gelu):
    wide = _normalized(x, with_gelu)
    sums = over_devices(_column_sums(wide, wide * wide), axis_name)
    affine = affine_of(sums, global_count(x, axis_name), scale, bias, epsilon)
    if with_gelu:
        # GELU is computed again instead of going through memory.
        x, affine = lax.optimization_barrier((x, affine))
        wide = _normalized(x, with_gelu)
    y = ((wide - affine.mean) * affine.factor + bias).astype(dtype)
    return (y, affine), (x, scale, bias, affine)


def _backward(epsilon, dtype, axis_name, with_gelu, residuals, cotangents):
    del dtype
    x, scale, bias, affine = residuals
    dy = cotangents[0].astype(affine.mean.dtype)
    wide = _normalized(x, with_gelu)
    sums = _column_sums(dy, dy * wide)
    gradient = affine_gradient(
        sums, over_devices(sums, axis_name), global_count(x, axis_name), affine, epsilon
    )
    if with_gelu:
        x, gradient = lax.optimization_barrier((x, gradient))
        wide = _normalized(x, with_gelu)
    dx = gradient.dy_factor * dy + gradient.x_factor * wide + gradient.offset
    if with_gelu:
        dx = dx * gelu_and_slope(x)[1]
    dscale, dbias = gradient.dscale.astype(scale.dtype), gradient.dbias.astype(bias.dtype)
    return dx.astype(x.dtype), dscale, dbias


_batch_norm.defvjp(_forward, _backward)


def _normalized(x, with_gelu):
    """Returns what is normalized, in the type of the statistics."""
    return (gelu(x) if with_gelu else x).astype(softmax_dtype(x.dtype))


def _column_sums(*values):
    axes = tuple(range(values[0].ndim - 1))
    return jnp.stack([x.sum(axes) for x in values])
