"""The semantic branch of the hybrid task cascade: classes of all pixels from all levels.

References:
  Chen et al. 2019, "Hybrid Task Cascade for Instance Segmentation", section 3.3.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from tokenvit_jax.heads.roi_heads import CONV_INIT
from tokenvit_jax.layers import Conv
from tokenvit_jax.ops import resize_bilinear

LEVEL = 1  # number of the level, of stride 8, to whose size the others are resized
NUM_CONVS = 4


class SemanticBranch(nn.Module):
    """Levels (B, h, w, C) -> logits (B, h, w, S) in float32 and features (B, h, w, C).

    Both have the size of the second level.

    Attributes:
      num_classes: S.
      channels: channels C of the convolutions.
      dtype: type of the computation.
    """

    num_classes: int
    channels: int = 256
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, levels: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
        def conv(dim, kernel_size, name):
            return Conv(dim, kernel_size, init=CONV_INIT, dtype=self.dtype, name=name)

        size, x = levels[LEVEL].shape[1:3], 0
        for i, level in enumerate(levels):
            if i != LEVEL:
                level = resize_bilinear(level, size, align_corners=True)
            x = x + nn.relu(conv(self.channels, 1, f"lateral_{i}")(level))
        for i in range(NUM_CONVS):
            x = nn.relu(conv(self.channels, 3, f"convs_{i}")(x))
        logits = conv(self.num_classes, 1, "logits")(x)
        features = nn.relu(conv(self.channels, 1, "embedding")(x))
        return logits.astype(jnp.float32), features


def semantic_sums(logits: jax.Array, classes: jax.Array) -> jax.Array:
    """Returns the cross-entropy of every image, added over its cells: (B,).

    Args:
      logits: (B, h, w, S).
      classes: (B, h, w); -1 for cells that add nothing.
    """
    counted = classes >= 0
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(classes, 0))
    return jnp.where(counted, losses, 0.0).sum((1, 2))
