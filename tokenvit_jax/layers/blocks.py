"""Building blocks of the backbones: activation, patch embedding, position encoding and MLP."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer
from jaxtyping import Array, Float

from tokenvit_jax import ops
from tokenvit_jax.errors import UserError
from tokenvit_jax.layers.conv import Weights, conv_init, depthwise_init, linear_init, product
from tokenvit_jax.layers.norm import LayerNorm


def quick_gelu(x: Float[Array, "*B C"], bias: Float[Array, " C"]) -> Float[Array, "*B C"]:
    """Computes y = x + bias times the logistic function of 1.702 y.

    It is OpenAI's approximation of GELU.

    Args:
      x: (..., C).
      bias: (C,).
    """
    y = x + bias.astype(x.dtype)
    return y * jax.nn.sigmoid(1.702 * y)


# Functions of a map and of the bias that is added to it.
ACTIVATIONS = {"gelu": ops.bias_gelu, "quick_gelu": quick_gelu}


class PatchEmbedding(nn.Module):
    """Embeds overlapping patches: (B, H, W, C) -> (B, ceil(H / stride), ceil(W / stride), dim).

    The module applies a convolution with bias, then LayerNorm.

    Attributes:
      dim: output channels.
      kernel_size: side of a patch [pixels].
      stride: stride between patches [pixels].
      padding: rows and columns of zeros above and on the left; below and on the right, as many
        zeros are added as the output size requires.
      epsilon: epsilon of LayerNorm.
      dtype: type of the computation.
    """

    dim: int
    kernel_size: int = 3
    stride: int = 2
    padding: int = 1
    epsilon: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w dim"]:
        padding = [(self.padding, self._padding_after(size)) for size in x.shape[1:3]]
        kernel, strides = (self.kernel_size,) * 2, (self.stride,) * 2
        x = nn.Conv(
            self.dim, kernel, strides, padding, dtype=self.dtype, kernel_init=conv_init, name="conv"
        )(x)
        return LayerNorm(self.epsilon, dtype=self.dtype, name="norm")(x)

    def _padding_after(self, size):
        patches = -(-size // self.stride)
        return max((patches - 1) * self.stride + self.kernel_size - size - self.padding, 0)


class ConditionalPositionEncoding(nn.Module):
    """Adds a depthwise 3x3 convolution of x to x: (B, H, W, C) -> (B, H, W, C).

    References:
      Chu et al. 2021, "Conditional Positional Encodings for Vision Transformers".
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        kernel, bias = Weights((3, 3, x.shape[-1]), depthwise_init, name="conv")()
        return ops.depthwise_block(x.astype(self.dtype), kernel, bias, residual=True)[0]


class Mlp(nn.Module):
    """Linear layer, activation, linear layer: (..., C) -> (..., C) through ``ratio`` C channels.

    Attributes:
      ratio: expansion of the channels.
      dtype: type of the computation.
      init: initializer of both kernels.
      activation: a key of ACTIVATIONS.
    """

    ratio: int
    dtype: Any = jnp.float32
    init: Initializer = linear_init
    activation: str = "gelu"

    @nn.compact
    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        channels = x.shape[-1]
        kernel, bias = Weights((channels, self.ratio * channels), self.init, name="fc1")()
        x = product(x.astype(self.dtype), kernel)
        x = ACTIVATIONS[self.activation](x, bias.astype(self.dtype))
        return dense(channels, self.dtype, "fc2", self.init)(x)


def dense(
    dim: int,
    dtype: Any,
    name: str | None = None,
    init: Initializer = linear_init,
    *,
    use_bias: bool = True,
    bias_init: Initializer = nn.initializers.zeros,
) -> nn.Dense:
    """Returns a linear layer with the usual initialization in transformers.

    Args:
      dim: output channels.
      dtype: type of the computation.
      name: name of the module; None: linen chooses it.
      init: initializer of the kernel.
      use_bias: whether there is a bias.
      bias_init: initializer of the bias.
    """
    return nn.Dense(
        dim, use_bias, dtype=dtype, kernel_init=init, bias_init=bias_init, name=name,
        dot_general=_linear_product,
    )  # fmt: skip


class DenseParts(nn.Module):
    """Linear layer whose outputs are parts of equal size, such as keys and values.

    Its variables are those of :func:`dense`.

    Attributes:
      dim: output channels of all parts together.
      parts: number of parts.
      dtype: type of the computation.
      init: initializer of the kernel.
    """

    dim: int
    parts: int
    dtype: Any
    init: Initializer = linear_init

    @nn.compact
    def __call__(self, x: Float[Array, "... C"]) -> tuple[Float[Array, "... part"], ...]:
        kernel = self.param("kernel", self.init, (x.shape[-1], self.dim))
        bias = self.param("bias", nn.initializers.zeros, (self.dim,))
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        return ops.linear_parts(x, kernel, bias, self.parts)


def _linear_product(x, kernel, dimensions, precision=None):
    """Computes the product of `nn.Dense`, whose dimensions are always those of a linear layer."""
    del dimensions, precision
    return ops.linear_product(x, kernel)


def check_num_heads(num_heads: int, channels: int) -> None:
    """Raises UserError unless the channels can be divided into heads."""
    if num_heads < 1 or channels % num_heads:
        raise UserError(f"num_heads={num_heads} does not divide {channels} channels")
