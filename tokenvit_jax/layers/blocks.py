"""Pieces of which the blocks and stages of hierarchical backbones are made."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.nn.initializers import Initializer

from tokenvit_jax.layers.conv import DepthwiseConv3x3, conv_init, linear_init


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, x times the normal distribution function of x (Hendrycks and Gimpel 2016).

    By erf, which XLA turns into one vector loop; on CPU the erfc of `jax.nn.gelu` took 5 times as
    long. Computed in float32 for narrower types, as 1 + erf cancels; the gradient keeps x alone.
    """
    return _gelu_and_slope(x)[0]


def _gelu_and_slope(x):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    distribution = 0.5 * (1 + lax.erf(wide * 2**-0.5))
    density = jnp.exp(-0.5 * wide * wide) * (2 * math.pi) ** -0.5
    return (wide * distribution).astype(x.dtype), distribution + wide * density


def _gelu_backward(x, dy):
    # Without the barrier XLA would keep erf of the forward pass, which costs more than doing it
    # again.
    x = lax.optimization_barrier(x)
    return ((dy * _gelu_and_slope(x)[1]).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


class PatchEmbedding(nn.Module):
    """Overlapping patches: (B, H, W, C) -> (B, ceil(H / stride), ceil(W / stride), dim), normed.

    A convolution with bias, then LayerNorm.

    Attributes:
      dim: channels of the result.
      kernel_size: side of a patch.
      stride: distance of two patches.
      padding: zeros above and on the left; below and on the right as many as the size needs.
      epsilon: of LayerNorm.
    """

    dim: int
    kernel_size: int = 3
    stride: int = 2
    padding: int = 1
    epsilon: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        padding = [(self.padding, self._padding_after(size)) for size in x.shape[1:3]]
        kernel, strides = (self.kernel_size,) * 2, (self.stride,) * 2
        x = nn.Conv(
            self.dim, kernel, strides, padding, dtype=self.dtype, kernel_init=conv_init, name="conv"
        )(x)
        return nn.LayerNorm(self.epsilon, dtype=self.dtype, name="norm")(x)

    def _padding_after(self, size):
        patches = -(-size // self.stride)
        return max((patches - 1) * self.stride + self.kernel_size - size - self.padding, 0)


class ConditionalPositionEncoding(nn.Module):
    """x + depthwise 3x3 convolution of x: (B, H, W, C) -> (B, H, W, C) (Chu et al. 2021)."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x + DepthwiseConv3x3(dtype=self.dtype, name="conv")(x)


class Mlp(nn.Module):
    """Linear, GELU, linear: (..., C) -> (..., C) through ``ratio`` C channels."""

    ratio: int
    dtype: Any = jnp.float32
    init: Initializer = linear_init

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        x = gelu(dense(self.ratio * channels, self.dtype, "fc1", self.init)(x))
        return dense(channels, self.dtype, "fc2", self.init)(x)


def dense(
    dim: int, dtype: Any, name: str | None = None, init: Initializer = linear_init
) -> nn.Dense:
    """Returns a linear layer with the initialisation of transformers."""
    return nn.Dense(dim, dtype=dtype, kernel_init=init, name=name)
