"""Multi-head pale-shaped attention on maps of any size."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tokenvit_jax import ops
from tokenvit_jax.errors import UserError
from tokenvit_jax.layers.blocks import dense
from tokenvit_jax.layers.conv import DepthwiseConv3x3, batch_norm
from tokenvit_jax.ops.pale_attention import HALVED


class SeparableProjection(nn.Module):
    """Depthwise 3x3 convolution, BatchNorm, linear: (B, H, W, C) -> (B, H, W, C).

    As in CvT (Wu et al. 2021), without bias before BatchNorm.
    """

    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        norm = batch_norm(dtype=self.dtype, axis_name=self.axis_name, name="norm")
        x = DepthwiseConv3x3(self.dtype, use_bias=False, name="depthwise")(x)
        x = norm(x, use_running_average=not train)
        return dense(x.shape[-1], self.dtype, "pointwise")(x)


class PaleAttention(nn.Module):
    """Self-attention (B, H, W, C) -> (B, H, W, C) within pales or their rows and columns.

    The map is padded with zeros below and on the right as far as its pales need it, before the
    queries, keys and values are computed, and cropped before the output projection.

    Attributes:
      num_heads: N; C is a multiple of it.
      pale_size: s, rows and columns of a pale.
      mode: see :func:`tokenvit_jax.ops.pale_attention`.
      mask_padding: whether padding is left out of the attention; it is a part of it otherwise.

    Raises:
      UserError: num_heads does not divide C, or is odd where the mode halves it.
    """

    num_heads: int
    pale_size: int
    mode: str = "parallel"
    mask_padding: bool = False
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        _, height, width, channels = x.shape
        if channels % self.num_heads:
            raise UserError(f"num_heads={self.num_heads} does not divide {channels} channels")
        if self.mode in HALVED and self.num_heads % 2:
            raise UserError(
                f"num_heads={self.num_heads} must be even: mode {self.mode!r} halves the heads"
            )
        padded = padded_size(height, width, self.pale_size, self.mode)
        below, right = padded[0] - height, padded[1] - width
        x = jnp.pad(x, ((0, 0), (0, below), (0, right), (0, 0)))
        mask = None
        if self.mask_padding and (below or right):
            mask = (jnp.arange(padded[0])[:, None] < height) & (jnp.arange(padded[1]) < width)

        def heads(name):
            y = SeparableProjection(self.dtype, self.axis_name, name=name)(x, train)
            return y.reshape(*x.shape[:3], self.num_heads, -1)

        y = ops.pale_attention(
            heads("q"), heads("k"), heads("v"),
            pale=(self.pale_size, self.pale_size), mode=self.mode, mask=mask,
        )  # fmt: skip
        y = y.reshape(x.shape)[:, :height, :width]
        return dense(channels, self.dtype, "proj")(y)


def padded_size(height: int, width: int, pale_size: int, mode: str) -> tuple[int, int]:
    """Returns the multiples of the pale size that hold the map; of equal sides in mode "vanilla".

    Vanilla pales have one row group and one column group each, so there must be as many of both.
    """
    rows, columns = -(-height // pale_size), -(-width // pale_size)
    if mode == "vanilla":
        rows = columns = max(rows, columns)
    return rows * pale_size, columns * pale_size
