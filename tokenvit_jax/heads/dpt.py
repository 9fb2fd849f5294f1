"""The decoder of DPT, from four taps of a plain backbone to one number per pixel."""

from collections.abc import Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer

from tokenvit_jax.heads.head import Head
from tokenvit_jax.layers import Conv, PatchConvTranspose, ResidualConvUnit, gelu, uniform_init
from tokenvit_jax.layers.conv import Weights, product
from tokenvit_jax.models.backbone import Tap
from tokenvit_jax.models.settings import CHANNELS, Rules
from tokenvit_jax.ops import resize_bilinear
from tokenvit_jax.ops.dtypes import softmax_dtype
from tokenvit_jax.valid import Either, OneOf, Several

LEVELS = 4


class DptHead(Head):
    """Four taps -> (B, H, W), at least 0, in float32.

    Tokens pass the readout projection, which adds the class token to each of them, and are resized
    to the stride of their level: a quarter, half, once and twice the stride of the tokens. Maps of
    a stem, which have no tokens in front, are taken as they are. Fusion then goes from the coarsest
    level to the finest, and doubles the size at each level.

    Kernels and biases have PyTorch's default initialisation. The last layer starts without negative
    weights: the ReLU after it would have no gradient if all its inputs were negative.

    Attributes:
      channels: channels of the fusion.
      level_channels: channels of the levels in front of the fusion, from the finest; (): C / 4,
        C / 2, C and C for tokens of C channels. Maps of a stem keep their channels.
      last_channels: channels in front of the last layer.
      dtype: type of the computation; parameters and the result are float32.
      axis_name: attribute of every head; ignored here.

    References:
      Ranftl et al. 2021, "Vision Transformers for Dense Prediction".
    """

    reads = "taps"
    valid: ClassVar[Rules] = {
        "channels": CHANNELS,
        "level_channels": Either((OneOf(((),)), Several(CHANNELS, LEVELS))),
        "last_channels": CHANNELS,
    }

    channels: int = 256
    level_channels: tuple[int, ...] = ()
    last_channels: int = 32
    dtype: Any = jnp.float32
    axis_name: str | tuple[str, ...] | None = None

    @nn.compact
    def __call__(self, taps: Sequence[Tap], size: tuple[int, int], train: bool) -> jax.Array:
        """Returns one number for every pixel.

        Args:
          taps: from the finest level to the coarsest. The map of the last one has an even number of
            rows and columns.
          size: height H and width W of the result.
          train: ignored: training and evaluation are the same.
        """
        del train
        levels = [
            self._conv(self._reassemble(tap, i), self.channels, 3, f"level_{i}", use_bias=False)
            for i, tap in enumerate(taps, 1)
        ]
        x = None
        for i in reversed(range(1, LEVELS + 1)):
            x = self._fuse(x, levels[i - 1], i)
        x = self._conv(x, self.channels // 2, 3, "output_1")
        x = nn.relu(self._conv([x], self.last_channels, 3, "output_2", size=size))
        return nn.relu(self._last(x))

    def _last(self, x):
        """Returns one number for every cell, in float32.

        A product with one column would make a map in float32 first; a sum does not.
        """
        init = _magnitudes(uniform_init(self.last_channels))
        shape = (1, 1, self.last_channels, 1)
        kernel, bias = Weights(shape, init, bias_init=init, name="output_3")()
        dtype = softmax_dtype(self.dtype)
        return jnp.sum(x.astype(dtype) * kernel[0, 0, :, 0], -1) + bias[0]

    def _reassemble(self, tap, level):
        """Returns the map of a level; `resize_{level}` changes the size."""
        x, front = tap
        if front is None:
            return x
        x = self._project(x, front[:, 0], f"readout_{level}")
        dim = x.shape[-1]
        dims = self.level_channels or (max(dim // 4, 1), max(dim // 2, 1), dim, dim)
        dim = dims[level - 1]
        x, name = self._conv(x, dim, 1, f"project_{level}"), f"resize_{level}"
        match level:
            case 1 | 2:
                return PatchConvTranspose(dim, 8 // 2**level, self.dtype, name=name)(x)
            case 4:
                return self._conv(x, dim, 3, name, stride=2)
        return x

    def _project(self, x, token, name):
        """Applies a linear layer and GELU to every patch, joined with the class token.

        The product with the class token is the same for all patches.
        """
        dim = x.shape[-1]
        init = uniform_init(2 * dim)
        layer = Weights((2 * dim, dim), init, bias_init=init, name=name)
        kernel, bias = (y.astype(self.dtype) for y in layer())
        common = product(token.astype(self.dtype), kernel[dim:]) + bias
        return gelu(product(x.astype(self.dtype), kernel[:dim]) + common[:, None, None])

    def _fuse(self, x, level, number):
        """Adds a level to a map x, doubles the size, and applies a 1 x 1 convolution.

        The convolution comes before the resizing, with which it commutes: a quarter of the work.
        """
        name = f"fusion_{number}"
        if x is not None:
            level = x + ResidualConvUnit(self.dtype, name=f"{name}_skip")(level)
        x = ResidualConvUnit(self.dtype, name=f"{name}_sum")(level)
        x = self._conv(x, self.channels, 1, f"{name}_output")
        size = tuple(2 * side for side in x.shape[1:3])
        return resize_bilinear(x, size, align_corners=True)

    def _conv(self, x, dim, kernel_size, name, stride=1, use_bias=True, size=None):
        """Applies a convolution with PyTorch's default initialisation."""
        channels = jax.tree.leaves(x)[0].shape[-1]
        init = uniform_init(kernel_size**2 * channels)
        conv = Conv(dim, kernel_size, use_bias, init, self.dtype, stride, init, name=name)
        return conv(x, size, align_corners=True)


def _magnitudes(init: Initializer) -> Initializer:
    return lambda key, shape, dtype=jnp.float32: jnp.abs(init(key, shape, dtype))
