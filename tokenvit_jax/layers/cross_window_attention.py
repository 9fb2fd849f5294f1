"""Multi-head attention within cross-shaped windows of maps of any size (CSWin Transformer)."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokenvit_jax import ops
from tokenvit_jax.errors import UserError
from tokenvit_jax.layers.blocks import check_num_heads, dense
from tokenvit_jax.layers.conv import Weights, depthwise_init
from tokenvit_jax.ops.heads import merge_heads, split_heads
from tokenvit_jax.ops.windows import pad_to_windows, to_map, to_windows


class CrossWindowAttention(nn.Module):
    """Self-attention (B, H, W, C) -> (B, H, W, C) within stripes of adjacent rows or columns.

    Half of the heads attends within rows, half within columns. A depthwise 3x3 convolution of the
    values within the stripe is added to the output ("locally-enhanced positional encoding"). The
    map is padded with zeros to whole stripes; no token attends to padding.

    Attributes:
      num_heads: N, an even divisor of C.
      stripe: rows, or columns, of a stripe; at most the map has are used.
      dtype: type of the computation.

    Raises:
      UserError: num_heads is odd or does not divide C.

    References:
      Dong et al. 2022, "CSWin Transformer", Sections 3.2 and 3.3.
    """

    num_heads: int
    stripe: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        _, height, width, channels = x.shape
        check_num_heads(self.num_heads, channels)
        if self.num_heads % 2:
            raise UserError(f"num_heads={self.num_heads} must be even: stripes halve the heads")
        pale = min(self.stripe, height), min(self.stripe, width)
        qkv = pad_to_windows(dense(3 * channels, self.dtype, "qkv")(x), pale)
        mask = None
        if qkv.shape[1:3] != (height, width):
            rows, columns = (jnp.arange(side) for side in qkv.shape[1:3])
            mask = (rows[:, None] < height) & (columns < width)
        q, k, v = (split_heads(y, self.num_heads) for y in jnp.split(qkv, 3, axis=-1))
        y = merge_heads(ops.pale_attention(q, k, v, pale=pale, mode="cross", mask=mask))
        y = y + self._position(merge_heads(v), pale)
        return dense(channels, self.dtype, "proj")(y[:, :height, :width])

    def _position(self, v, pale):
        """Returns the convolution of the values within their stripes."""
        parts = zip(jnp.split(v, 2, axis=-1), ("rows", "columns"), strict=True)
        stripes = {"rows": (pale[0], v.shape[2]), "columns": (v.shape[1], pale[1])}
        return jnp.concatenate([self._convolve(x, stripes[name], name) for x, name in parts], -1)

    def _convolve(self, x, stripe, name):
        kernel, bias = Weights((3, 3, x.shape[-1]), depthwise_init, name=f"position_{name}")()
        windows = to_windows(x, stripe)  # (B, rows, columns, h, w, C / 2)
        y = ops.depthwise_block(windows.reshape(-1, *windows.shape[3:]), kernel, bias)[0]
        return to_map(y.reshape(windows.shape))
