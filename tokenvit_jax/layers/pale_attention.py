"""Multi-head pale-shaped attention on maps of any size."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokenvit_jax import ops
from tokenvit_jax.errors import UserError
from tokenvit_jax.layers.blocks import check_num_heads, dense
from tokenvit_jax.layers.conv import (
    FoldedBatchNorm,
    Weights,
    affine_product,
    depthwise_init,
    linear_init,
)
from tokenvit_jax.ops.batch_norm import SharedBy
from tokenvit_jax.ops.heads import merge_heads, split_heads
from tokenvit_jax.ops.pale_attention import HALVED
from tokenvit_jax.ops.windows import pad_map, whole_windows


class SeparableProjection(nn.Module):
    """Depthwise 3x3 convolution, BatchNorm, linear layer: (B, H, W, C) -> (B, H, W, C).

    The convolution has no bias, because BatchNorm follows.

    Attributes:
      dtype: type of the computation.
      axis_name: devices that share the statistics of BatchNorm, see :class:`layers.norm.BatchNorm`.

    References:
      Wu et al. 2021, "CvT".
    """

    dtype: Any = jnp.float32
    axis_name: SharedBy = None

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool) -> Float[Array, "B H W C"]:
        channels = x.shape[-1]
        kernel, _ = Weights((3, 3, channels), depthwise_init, use_bias=False, name="depthwise")()
        x, sums = ops.depthwise_block(x.astype(self.dtype), kernel, with_sums=train)
        norm = FoldedBatchNorm(axis_name=self.axis_name, name="norm")
        affine = norm(sums, channels, x.size // channels, use_running_average=not train)
        weights = Weights((channels, channels), linear_init, name="pointwise")()
        x, bias = affine_product(x, *weights, *affine)  # the linear layer takes the norm along
        return x + bias.astype(self.dtype)


class PaleAttention(nn.Module):
    """Self-attention (B, H, W, C) -> (B, H, W, C) within pales, or their rows and columns.

    The map is padded with zeros below and on the right to whole pales before queries, keys and
    values are computed, and cropped before the output projection.

    Attributes:
      num_heads: N, a divisor of C.
      pale_size: s, rows and columns of a pale.
      mode: see :func:`tokenvit_jax.ops.pale_attention`.
      mask_padding: True: no token attends to padding. False: padding is attended to like tokens.
      dtype: type of the computation.
      axis_name: devices that share the statistics of BatchNorm, see :class:`layers.norm.BatchNorm`.

    Raises:
      UserError: num_heads does not divide C, or is odd where the mode halves it.

    References:
      Wu et al. 2022, "Pale Transformer", Section 3.
    """

    num_heads: int
    pale_size: int
    mode: str = "parallel"
    mask_padding: bool = False
    dtype: Any = jnp.float32
    axis_name: SharedBy = None

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool) -> Float[Array, "B H W C"]:
        _, height, width, channels = x.shape
        check_num_heads(self.num_heads, channels)
        if self.mode in HALVED and self.num_heads % 2:
            raise UserError(
                f"num_heads={self.num_heads} must be even: mode {self.mode!r} halves the heads"
            )
        padded = padded_size(height, width, self.pale_size, self.mode)
        x = pad_map(x, padded)
        mask = None
        if self.mask_padding and padded != (height, width):
            mask = (jnp.arange(padded[0])[:, None] < height) & (jnp.arange(padded[1]) < width)

        def heads(name):
            y = SeparableProjection(self.dtype, self.axis_name, name=name)(x, train)
            return split_heads(y, self.num_heads)

        y = ops.pale_attention(
            heads("q"), heads("k"), heads("v"),
            pale=(self.pale_size, self.pale_size), mode=self.mode, mask=mask,
        )  # fmt: skip
        y = merge_heads(y)[:, :height, :width]
        return dense(channels, self.dtype, "proj")(y)


def padded_size(height: int, width: int, pale_size: int, mode: str) -> tuple[int, int]:
    """Returns the size of a map padded to whole pales.

    A pale in mode "vanilla" has one row group and one column group, so their numbers must be equal
    and the padded map is square.

    Args:
      height: rows of the map.
      width: columns of the map.
      pale_size: rows and columns of a pale.
      mode: see :func:`tokenvit_jax.ops.pale_attention`.
    """
    rows, columns = whole_windows((height, width), (pale_size, pale_size))
    if mode == "vanilla":
        rows = columns = max(rows, columns)
    return rows * pale_size, columns * pale_size
