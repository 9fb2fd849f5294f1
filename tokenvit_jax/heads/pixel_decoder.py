"""The pixel decoder of Mask2Former: deformable attention among three maps, and mask features."""

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import lecun_uniform, normal, xavier_uniform

from tokenvit_jax.layers import (
    AddLayerNorm,
    Conv,
    DeformableAttention,
    GroupNorm,
    cell_centers,
    dense,
)
from tokenvit_jax.ops import resize_bilinear, sine_positions

EPSILON = 1e-5  # of LayerNorm, as in the published weights
NUM_GROUPS = 32  # of GroupNorm
NUM_LEVELS = 3  # maps that attend to each other


class PixelFeatures(NamedTuple):
    """Outputs of the pixel decoder, in float32.

    Attributes:
      mask_features: features of the cells of the finest map (B, h, w, C); their products with
        embeddings of queries are the logits of masks.
      levels: encoded maps (B, h, w, C), the coarsest first.
    """

    mask_features: jax.Array
    levels: list[jax.Array]


class EncoderLayer(nn.Module):
    """Deformable attention, then two linear layers, each LN(x + ...): (B, S, C) -> (B, S, C).

    Attributes:
      num_heads: number of heads, a divisor of C.
      num_points: places of a head in a map.
      hidden: channels between the linear layers.
    """

    num_heads: int
    num_points: int
    hidden: int

    @nn.compact
    def __call__(self, x, positions, centers, shapes):
        """Returns the cells of all maps after the layer.

        Args:
          x: cells of all maps (B, S, C), map after map and row by row.
          positions: their position embeddings (S, C).
          centers: their x and y (S, 2), between 0 and 1.
          shapes: rows and columns of each map.
        """
        attention = DeformableAttention(self.num_heads, self.num_points, name="attention")
        _, x = AddLayerNorm(EPSILON, name="norm1")(x, attention(x + positions, x, centers, shapes))
        y = nn.relu(dense(self.hidden, x.dtype, "fc1", xavier_uniform())(x))
        y = dense(x.shape[-1], x.dtype, "fc2", xavier_uniform())(y)
        return AddLayerNorm(EPSILON, name="norm2")(x, y)[1]


class PixelDecoder(nn.Module):
    """Four maps (B, h, w, Ci), the finest first -> :class:`PixelFeatures`.

    The three coarser maps attend to each other. The finest one adds the finest of them, enlarged,
    and passes through a convolution. Everything is float32, also around a narrower backbone.

    Attributes:
      channels: channels C of the levels.
      mask_channels: channels of the mask features.
      depth: layers of the encoder.
      num_heads: heads of its attention, a divisor of C.
      num_points: places of a head in a map.
      hidden: channels between the linear layers of a layer.

    References:
      Cheng et al. 2022, "Masked-attention Mask Transformer for Universal Image Segmentation",
      Section 4.1; Zhu et al. 2021, "Deformable DETR".
    """

    channels: int = 256
    mask_channels: int = 256
    depth: int = 6
    num_heads: int = 8
    num_points: int = 4
    hidden: int = 1024

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array]) -> PixelFeatures:
        if len(maps) != NUM_LEVELS + 1:
            raise ValueError(f"there are {len(maps)} maps; expected {NUM_LEVELS + 1}")
        finest, *coarser = (x.astype(jnp.float32) for x in maps)
        levels = self._encode(coarser[::-1])
        return PixelFeatures(self._mask_features(finest, levels[-1]), levels)

    def _encode(self, maps):
        """Returns the encoded maps, in the order of the maps: the coarsest first."""
        shapes = tuple(x.shape[1:3] for x in maps)
        embeddings = self.param("level_embedding", normal(1.0), (NUM_LEVELS, self.channels))
        cells, positions = [], []
        for i, x in enumerate(maps):
            conv = Conv(self.channels, 1, init=xavier_uniform(), name=f"input_{i}")
            x = GroupNorm(NUM_GROUPS, name=f"input_norm_{i}")(conv(x))
            cells.append(x.reshape(x.shape[0], -1, self.channels))
            position = sine_positions(shapes[i], self.channels).reshape(-1, self.channels)
            positions.append(position + embeddings[i])
        x, positions = jnp.concatenate(cells, 1), jnp.concatenate(positions)
        centers = np.concatenate([cell_centers(shape) for shape in shapes])
        for i in range(self.depth):
            layer = EncoderLayer(self.num_heads, self.num_points, self.hidden, name=f"layer_{i}")
            x = layer(x, positions, centers, shapes)
        ends = np.cumsum([height * width for height, width in shapes])
        parts = zip(jnp.split(x, ends[:-1], 1), shapes, strict=True)
        return [part.reshape(-1, *shape, self.channels) for part, shape in parts]

    def _mask_features(self, finest, level):
        """Returns the mask features from the finest map and the finest encoded one."""

        def block(kernel_size, name, x):
            conv = Conv(self.channels, kernel_size, False, init=lecun_uniform(), name=name)
            return GroupNorm(NUM_GROUPS, name=f"{name}_norm")(conv(x))

        x = block(1, "lateral", finest) + resize_bilinear(level, finest.shape[1:3])
        x = nn.relu(block(3, "output", x))
        return Conv(self.mask_channels, 1, init=lecun_uniform(), name="mask_features")(x)
