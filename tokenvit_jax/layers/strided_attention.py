"""Multi-head attention of all tokens to a shrunk map of keys and values (CMT)."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokenvit_jax import ops
from tokenvit_jax.layers.blocks import check_num_heads, dense
from tokenvit_jax.layers.conv import batch_norm, depthwise_init
from tokenvit_jax.ops.heads import merge_heads, split_heads
from tokenvit_jax.ops.windows import pad_to_windows


class StridedAttention(nn.Module):
    """Self-attention (B, H, W, C) -> (B, H, W, C) with keys and values of a smaller map.

    A depthwise convolution with stride, then BatchNorm, shrinks the map for keys and values, as in
    CMT's code. CMT's table of relative positions is left out: its size is that of the map, so it
    would fit images of one size only; the depthwise convolution in front of the attention, CMT's
    local perception unit, tells positions.

    Attributes:
      num_heads: N, a divisor of C.
      stride: side of the kernel and stride; 1: no convolution. The map is padded with zeros below
        and on the right to whole strides.
      dtype: type of the computation.
      axis_name: mapped axis that the batch is divided over, for pmap; None under jit.

    Raises:
      UserError: num_heads does not divide C.

    References:
      Guo et al. 2022, "CMT", Section 3.3 (lightweight multi-head self-attention).
    """

    num_heads: int
    stride: int
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool) -> Float[Array, "B H W C"]:
        channels = x.shape[-1]
        check_num_heads(self.num_heads, channels)
        small = self._shrink(x, train) if self.stride > 1 else x
        heads = lambda y: split_heads(y.reshape(y.shape[0], -1, channels), self.num_heads)  # noqa: E731
        q = heads(dense(channels, self.dtype, "q")(x))
        k, v = (heads(dense(channels, self.dtype, name)(small)) for name in ("k", "v"))
        y = merge_heads(ops.dot_product_attention(q, k, v)).reshape(x.shape)
        return dense(channels, self.dtype, "proj")(y)

    def _shrink(self, x, train):
        sides = (self.stride, self.stride)
        x = nn.Conv(
            x.shape[-1], sides, sides, "VALID", feature_group_count=x.shape[-1], dtype=self.dtype,
            kernel_init=depthwise_init, name="shrink",
        )(pad_to_windows(x, sides))  # fmt: skip
        norm = batch_norm(dtype=self.dtype, axis_name=self.axis_name, name="norm")
        return norm(x, use_running_average=not train)
