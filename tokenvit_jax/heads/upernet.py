"""UperNet: pyramid pooling of the last map and a feature pyramid, in mmsegmentation's form."""

from collections.abc import Sequence
from typing import ClassVar

import flax.linen as nn
import jax

from tokenvit_jax.heads.head import MapHead
from tokenvit_jax.models.settings import CHANNELS, Rules
from tokenvit_jax.ops import adaptive_average_pool, resize_bilinear

POOL_SIDES = (1, 2, 3, 6)


class UperNet(MapHead):
    """Maps (B, h, w, C1) to (B, h / 8, w / 8, C4) -> logits (B, h, w, K) in float32.

    Further attributes are those of :class:`~tokenvit_jax.heads.head.MapHead`.

    Attributes:
      auxiliary_channels: channels of the auxiliary head.

    References:
      Xiao et al. 2018, "Unified Perceptual Parsing for Scene Understanding"; MMSegmentation
      Contributors, "MMSegmentation" (2020), UPerHead.
    """

    has_auxiliary = True
    valid: ClassVar[Rules] = {"auxiliary_channels": CHANNELS}

    channels: int = 512
    auxiliary_channels: int = 256

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array], train: bool) -> jax.Array:
        *finer, last = maps
        top = self._pool_pyramid(last, train)
        levels = [self.block(1, f"lateral_{i}")(x, train) for i, x in enumerate(finer, 1)]
        levels.append(top)
        for i in reversed(range(len(finer))):
            levels[i] += resize_bilinear(levels[i + 1], levels[i].shape[1:3])
        outputs = [self.block(3, f"fpn_{i}")(x, train) for i, x in enumerate(levels[:-1], 1)]
        outputs.append(top)
        x = self.block(3, "fusion")(outputs, train, maps[0].shape[1:3])
        return self.classify(x, train)

    def _pool_pyramid(self, x, train):
        """Joins a map (B, h, w, C) and its means over cells, from the whole map to 6 x 6 cells."""
        means = [
            self.block(1, f"pool_{side}")(adaptive_average_pool(x, side), train)
            for side in POOL_SIDES
        ]
        return self.block(3, "bottleneck")([x, *means], train, x.shape[1:3])
