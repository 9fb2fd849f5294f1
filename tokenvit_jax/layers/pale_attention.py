"""Multi-head pale-shaped attention on maps of any size."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokenvit_jax import ops
from tokenvit_jax.errors import UserError
from tokenvit_jax.layers.blocks import check_num_heads, dense
from tokenvit_jax.layers.conv import (
    FoldedBatchNorm,
    Weights,
    affine_products,
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
      channels: C.
      axis_name: devices that share the statistics of BatchNorm, see :class:`layers.norm.BatchNorm`.

    References:
      Wu et al. 2021, "CvT".
    """

    channels: int
    axis_name: SharedBy = None

    def setup(self):
        channels = self.channels
        self.depthwise = Weights((3, 3, channels), depthwise_init, use_bias=False)
        self.norm = FoldedBatchNorm(axis_name=self.axis_name)
        self.pointwise = Weights((channels, channels), linear_init)

    def __call__(self, x: Float[Array, "B H W C"], train: bool) -> Float[Array, "B H W C"]:
        return _project(x, [self], train)[0]

    def affine(
        self, sums: Float[Array, "n 2 C"] | None, number: int, pixels: int
    ) -> tuple[Float[Array, " C"], Float[Array, " C"]]:
        """Returns BatchNorm as factors and offsets of the channels.

        Args:
          sums: sums over the maps of several projections (n, 2, C), see
            :func:`ops.depthwise_branches`; None: the running statistics are taken.
          number: number of this projection among them.
          pixels: number of values of a channel on this device.
        """
        with jax.named_scope("norm"):  # `compile` finds the purpose of a sum over devices by it
            own = None if sums is None else sums[number]
        return self.norm(own, self.channels, pixels, use_running_average=sums is None)


def _project(
    x: Float[Array, "B H W C"], projections: Sequence[SeparableProjection], train: bool
) -> list[Float[Array, "B H W C"]]:
    """Applies several separable projections to a map, which is read once.

    Args:
      x: (B, H, W, C).
      projections: n of them.
      train: whether BatchNorm takes its statistics from the batch.

    Returns:
      n maps (B, H, W, C) in the type of ``x``.
    """
    kernels = tuple(projection.depthwise()[0] for projection in projections)
    maps, sums = ops.depthwise_branches(x, kernels, with_sums=train)
    pixels = x.size // x.shape[-1]
    affine = [projection.affine(sums, i, pixels) for i, projection in enumerate(projections)]
    weights = [projection.pointwise() for projection in projections]
    # The linear layers take the norms along.
    return affine_products(maps, *zip(*weights, strict=True), *zip(*affine, strict=True))


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

        projections = [SeparableProjection(channels, self.axis_name, name=name) for name in "qkv"]
        parts = _project(x.astype(self.dtype), projections, train)
        q, k, v = (split_heads(part, self.num_heads) for part in parts)
        pale = self.pale_size, self.pale_size
        y = ops.pale_attention(q, k, v, pale=pale, mode=self.mode, mask=mask)
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
