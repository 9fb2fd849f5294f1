"""Heads that predict a heat map for every keypoint from the maps of a backbone."""

from collections.abc import Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import normal

from tokenvit_jax import ops
from tokenvit_jax.heads.head import Head
from tokenvit_jax.layers import AddLayerNorm, BatchNorm, Conv, StridedAttention, dense
from tokenvit_jax.layers.conv import Weights, depthwise_init, linear_init, product
from tokenvit_jax.models.settings import (
    BATCH_NORM,
    BLOCKS,
    CHANNELS,
    CLASSES,
    HEADS,
    Rules,
    norm_axis,
)
from tokenvit_jax.ops import resize_nearest
from tokenvit_jax.ops.batch_norm import SharedBy
from tokenvit_jax.valid import Number, whole

EPSILON = 1e-5  # of LayerNorm, as in TCFormer


class PoseHead(Head):
    """The base of heads that predict heat maps.

    Attributes:
      num_keypoints: K.
      channels: channels of the maps in front of the last layer.
      init_std: standard deviation of the last layer's initial weights.
      dtype: type of the computation; parameters and heat maps are float32.
      axis_name: mapped axis that the batch is split over, for pmap; None under jit.
      first_map: number of the first map of a backbone that the head reads, from 0 on.
    """

    reads = "maps"
    first_map: ClassVar[int] = 0
    valid: ClassVar[Rules] = {
        "num_keypoints": whole(1, CLASSES), "channels": CHANNELS, "init_std": Number(1e-8, 10),
    }  # fmt: skip

    num_keypoints: int
    channels: int = 256
    init_std: float = 0.001
    dtype: Any = jnp.float32
    axis_name: str | None = None

    def heatmaps(self, x: jax.Array) -> jax.Array:
        """Returns the heat maps (B, h, w, K) in float32 for a map (B, h, w, C)."""
        return Conv(self.num_keypoints, 1, init=normal(self.init_std), name="heatmaps")(x)


class MtaHead(PoseHead):
    """Four maps -> heat maps with the stride of the finest one, by attention from coarse to fine.

    Every map becomes `channels` wide. Then, from the second coarsest to the finest, the coarser map
    is added, repeated to twice its size, and a transformer block follows, in which keys and values
    come from averages over squares of 2, 4 and 8 pixels. Heights and widths of the finest map are
    multiples of 8.

    Further attributes are those of :class:`PoseHead`.

    Attributes:
      num_heads: heads of the attention, a divisor of `channels`.
      mlp_ratio: expansion of the channels in the feed-forward networks.

    References:
      Zeng et al. 2022, "Not All Tokens Are Equal: Human-centric Visual Analysis via Token
      Clustering Transformer" (TCFormer): its head of multi-stage token aggregation, for maps.
    """

    valid: ClassVar[Rules] = {"num_heads": HEADS, "mlp_ratio": whole(1, 256)}

    num_heads: int = 4
    mlp_ratio: int = 4

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array], train: bool) -> jax.Array:
        del train
        return self.heatmaps(self.levels(maps)[0])

    @nn.nowrap
    def levels(self, maps: Sequence[jax.Array]) -> list[jax.Array]:
        """Returns a map (B, h, w, `channels`) for every map (B, h, w, C), the finest first."""
        xs = [
            Conv(self.channels, 1, dtype=self.dtype, name=f"lateral_{i}")(x)
            for i, x in enumerate(maps, 1)
        ]
        for i in reversed(range(len(xs) - 1)):
            x = xs[i] + resize_nearest(xs[i + 1], xs[i].shape[1:3])
            stride = 2 ** (len(xs) - 1 - i)
            block = PooledBlock(
                self.num_heads, stride, self.mlp_ratio, self.dtype, name=f"block_{i + 1}"
            )
            xs[i] = block(x)
        return xs


class PooledAttention(StridedAttention):
    """Self-attention (B, H, W, C) -> (B, H, W, C) with keys and values of averages over squares.

    `stride` is the side of a square [pixels], which divides H and W.
    """

    def _shrink(self, x, train):
        del train
        batch, height, width, channels = x.shape
        side = self.stride
        cells = x.reshape(batch, height // side, side, width // side, side, channels)
        return cells.mean((2, 4))


class PooledBlock(nn.Module):
    """x + attention(LN(x)), then x + FFN(LN(x)): (B, H, W, C) -> (B, H, W, C).

    The feed-forward network is fc2(gelu(s h + depthwise 3 x 3 convolution(h))), h = fc1(x), with a
    factor s for every channel.

    Attributes:
      num_heads: heads of the attention, a divisor of C.
      stride: side of the squares that a key and a value stand for [pixels].
      mlp_ratio: expansion of the channels in the feed-forward network.
      dtype: type of the computation.
    """

    num_heads: int
    stride: int
    mlp_ratio: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        attention = PooledAttention(self.num_heads, self.stride, self.dtype, name="attention")
        x, y = AddLayerNorm(EPSILON, self.dtype, name="norm1")(x)
        x, y = AddLayerNorm(EPSILON, self.dtype, name="norm2")(x, attention(y, train=False))
        return x + self._feed_forward(y)

    def _feed_forward(self, x):
        channels = x.shape[-1]
        hidden = self.mlp_ratio * channels
        kernel, input_bias = Weights((channels, hidden), linear_init, name="fc1")()
        x = product(x, kernel)
        kernel, bias = Weights((3, 3, hidden), depthwise_init, name="depthwise")()
        skip = self.param("skip", nn.initializers.ones, (hidden,))
        # s h is part of the convolution: h times the middle of the kernel.
        kernel = jnp.asarray(kernel).at[1, 1].add(skip)
        x, _ = ops.depthwise_block(x, kernel, bias, input_bias=input_bias, activate=True)
        return dense(channels, self.dtype, "fc2")(x)


class DeconvHead(PoseHead):
    """The last map -> heat maps by transposed convolutions, each with twice the height and width.

    A transposed convolution is followed by BatchNorm and ReLU. Further attributes are those of
    :class:`PoseHead`.

    Attributes:
      num_layers: number of transposed convolutions: three reach a stride of 4 pixels from 32.
      batch_norm: images that statistics are over in training, as in `BatchNormSettings`.

    References:
      Xiao et al. 2018, "Simple Baselines for Human Pose Estimation and Tracking", section 2.
    """

    first_map = 3
    valid: ClassVar[Rules] = {"num_layers": whole(0, BLOCKS), "batch_norm": BATCH_NORM}

    num_layers: int = 3
    batch_norm: str | int = "global"

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array], train: bool) -> jax.Array:
        x, axis = maps[-1], norm_axis(self.batch_norm, self.axis_name)
        for i in range(1, self.num_layers + 1):
            x = Deconvolution(self.channels, self.dtype, axis, name=f"deconvolution_{i}")(x, train)
        return self.heatmaps(x)


class Deconvolution(nn.Module):
    """Transposed 4 x 4 convolution with stride 2, BatchNorm and ReLU.

    (B, H, W, C) -> (B, 2 H, 2 W, dim). The convolution has no bias.

    Attributes:
      dim: output channels.
      dtype: type of the computation.
      axis_name: devices that share statistics, see :class:`~tokenvit_jax.layers.BatchNorm`.
    """

    dim: int
    dtype: Any = jnp.float32
    axis_name: SharedBy = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        kernel = self.param("kernel", normal(0.001), (4, 4, x.shape[-1], self.dim))
        x = double(x.astype(self.dtype), kernel.astype(self.dtype))
        norm = BatchNorm(dtype=self.dtype, axis_name=self.axis_name, unbiased=True, name="norm")
        return nn.relu(norm(x, use_running_average=not train))


def double(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves a map (B, H, W, C) with zeros between its pixels and around it: (B, 2 H, 2 W, dim).

    An output pixel reads 2 x 2 pixels of the map. Which quarter of the kernel multiplies them
    depends on whether its row and its column are even, so that four small convolutions compute the
    four kinds of output pixels, without any product with the zeros.

    Args:
      x: (B, H, W, C).
      kernel: (4, 4, C, dim).
    """
    batch, height, width, _ = x.shape
    rows = []
    for i in range(2):
        quarters = [
            ops.conv_with_padding(x, kernel[i::2, j::2], 1, ((1 - i, i), (1 - j, j)))
            for j in range(2)
        ]
        rows.append(jnp.stack(quarters, 3))  # (B, H, W, 2, dim)
    return jnp.stack(rows, 2).reshape(batch, 2 * height, 2 * width, -1)
