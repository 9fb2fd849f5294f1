"""Sums over the pixels of a map, and affine functions of its channels, with short gradients.

Both are what BatchNorm consists of. Their gradients read each map once.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokenvit_jax.kernels import channel_sums as kernels
from tokenvit_jax.kernels.platforms import by_platform, num_devices
from tokenvit_jax.ops.dtypes import softmax_dtype


@jax.custom_vjp
def channel_sums(x: Float[Array, "*B C"]) -> Float[Array, "2 C"]:
    """Returns the sums of x and x^2 over all but the last axis, in float32 (or float64)."""
    return _product_sums(x, None)


def _channel_sums_backward(x, dsums):
    return ((dsums[0] + 2 * dsums[1] * x).astype(x.dtype),)


channel_sums.defvjp(lambda x: (channel_sums(x), x), _channel_sums_backward)


@jax.custom_vjp
def channel_affine(
    x: Float[Array, "*B C"], factor: Float[Array, " C"], offset: Float[Array, " C"]
) -> Float[Array, "*B C"]:
    """Computes factor x + offset in the type of ``x``."""
    return (x * factor + offset).astype(x.dtype)


def _channel_affine_backward(residuals, dy):
    x, factor, offset = residuals
    doffset, dfactor = _product_sums(dy, x)
    dx = (dy * factor).astype(x.dtype)
    return dx, dfactor.astype(factor.dtype), doffset.astype(offset.dtype)


channel_affine.defvjp(
    lambda x, factor, offset: (channel_affine(x, factor, offset), (x, factor, offset)),
    _channel_affine_backward,
)


def _product_sums(x, y):
    sums = by_platform(
        "channel sums", x, y, default=_by_xla, cuda=kernels.product_sums,
        misfits={"cuda": kernels.misfit(x.shape)},
    )  # fmt: skip
    return sums.sum(0)


def _by_xla(x, y):
    x = x.astype(softmax_dtype(x.dtype))
    add = functools.partial(jnp.sum, axis=tuple(range(x.ndim - 1)))
    return per_device(jnp.stack([add(x), add(x * (x if y is None else y))]))


def per_device(total: Float[Array, "..."]) -> Float[Array, "D ..."]:
    """Returns a total in the shape of a kernel's result: one part per device, the rest zeros."""
    return jnp.pad(total[None], [(0, num_devices() - 1)] + [(0, 0)] * total.ndim)
