"""Semantic FPN: a feature pyramid whose levels are added, in mmsegmentation's form."""

from collections.abc import Sequence
from typing import ClassVar

import flax.linen as nn
import jax
from jax.nn.initializers import xavier_uniform

from tokenvit_jax.heads.fpn import pyramid_levels
from tokenvit_jax.heads.head import MapHead
from tokenvit_jax.layers import Conv
from tokenvit_jax.models.settings import CHANNELS, Rules
from tokenvit_jax.ops import resize_bilinear


class SemanticFpn(MapHead):
    """Maps (B, h, w, C1) to (B, h / 8, w / 8, C4) -> logits (B, h, w, K) in float32.

    Further attributes are those of :class:`~tokenvit_jax.heads.head.MapHead`.

    Attributes:
      neck_channels: channels of the feature pyramid.

    References:
      Kirillov et al. 2019, "Panoptic Feature Pyramid Networks"; MMSegmentation Contributors,
      "MMSegmentation" (2020), FPN and FPNHead.
    """

    valid: ClassVar[Rules] = {"neck_channels": CHANNELS}

    channels: int = 128
    neck_channels: int = 256

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array], train: bool) -> jax.Array:
        size, total = maps[0].shape[1:3], 0
        for i, x in enumerate(self._pyramid(maps), 1):
            for j in range(1, max(i, 2)):
                x = self.block(3, f"scale_{i}_{j}")(x, train)
                if i > 1:
                    x = resize_bilinear(x, (2 * x.shape[1], 2 * x.shape[2]))
            total += resize_bilinear(x, size)  # sides that were rounded up are too long by now
        return self.classify(total, train)

    def _pyramid(self, maps):
        """Returns a map of `neck_channels` for every map."""

        def conv(kernel_size, name):
            return Conv(
                self.neck_channels, kernel_size, init=xavier_uniform(), dtype=self.dtype, name=name
            )

        return pyramid_levels(maps, conv)
