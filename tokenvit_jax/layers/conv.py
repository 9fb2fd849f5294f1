"""Convolutions and BatchNorm."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokenvit_jax import ops
from tokenvit_jax.layers.norm import BatchNorm

# Kernels of convolutions: the usual choice with BatchNorm (He et al. 2015).
conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# Kernels of linear layers.
linear_init = nn.initializers.truncated_normal(0.02)


class Conv3x3(nn.Module):
    """3x3 convolution with bias and padding 1: (B, H, W, C) -> (B, H / stride, W / stride, dim).

    Sizes that the stride does not divide are rounded up.

    Attributes:
      dim: output channels.
      stride: stride in both directions.
      dtype: type of the computation.
    """

    dim: int
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w dim"]:
        strides, padding = (self.stride, self.stride), ((1, 1), (1, 1))
        return nn.Conv(
            self.dim, (3, 3), strides, padding, dtype=self.dtype, kernel_init=conv_init, name="conv"
        )(x)


class DepthwiseConv3x3(nn.Module):
    """3x3 depthwise convolution with padding 1: (B, H, W, C) -> (B, H, W, C).

    Attributes:
      dtype: type of the computation.
      use_bias: whether a bias is added.
    """

    dtype: Any = jnp.float32
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        channels = x.shape[-1]
        # The fan-out of a depthwise kernel is its nine entries.
        kernel = self.param("kernel", nn.initializers.normal((2 / 9) ** 0.5), (3, 3, channels))
        bias = self.param("bias", nn.initializers.zeros, (channels,)) if self.use_bias else None
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        x = ops.depthwise_conv(x, kernel)
        return x if bias is None else x + bias


def batch_norm(
    *, dtype: Any, axis_name: str | None, with_gelu: bool = False, name: str | None = None
) -> BatchNorm:
    """Returns BatchNorm over the global batch.

    Args:
      dtype: type of the computation.
      axis_name: mapped axis over which the statistics are averaged, for pmap; None under jit.
      with_gelu: whether GELU comes first.
      name: name of the module; None: linen chooses it.
    """
    return BatchNorm(dtype=dtype, axis_name=axis_name, with_gelu=with_gelu, name=name)
