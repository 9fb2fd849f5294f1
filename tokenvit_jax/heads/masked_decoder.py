"""The decoder of Mask2Former: queries that attend to the places of their own masks."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.nn.initializers import normal, xavier_uniform

from tokenvit_jax import ops
from tokenvit_jax.heads.pixel_decoder import EPSILON, NUM_LEVELS, PixelFeatures
from tokenvit_jax.layers import AddLayerNorm, LayerNorm, dense, uniform_init
from tokenvit_jax.layers.blocks import check_num_heads
from tokenvit_jax.layers.conv import Weights, product
from tokenvit_jax.ops.heads import merge_heads, split_heads

SEEN = "seen"  # scope of the products that tell what a query sees
MASK_LAYERS = 3  # linear layers from a query to the embedding of its mask


class MaskPredictions(NamedTuple):
    """What the queries predict in n places of the decoder, in float32.

    Attributes:
      logits: logits of the classes (n, B, Q, K + 1); the last one is for no object.
      masks: logits of the masks (n, B, Q, h, w), with the stride of the mask features.
    """

    logits: jax.Array
    masks: jax.Array


class QueryAttention(nn.Module):
    """Multi-head attention with one projection of queries, keys and values that differ.

    Attributes:
      num_heads: number of heads, a divisor of C.
      dtype: type of the computation.

    Raises:
      UserError: num_heads does not divide C.
    """

    num_heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, queries, keys, values, mask=None):
        """Returns the output (B, Q, C).

        Args:
          queries: (B, Q, C).
          keys: (B, S, C).
          values: (B, S, C).
          mask: as in :func:`~tokenvit_jax.ops.masked_attention` (B, Q, S); None: all keys.
        """
        channels = queries.shape[-1]
        check_num_heads(self.num_heads, channels)
        kernel, bias = Weights((channels, 3 * channels), xavier_uniform(), name="qkv")()
        parts = zip(
            (queries, keys, values), jnp.split(kernel, 3, 1), jnp.split(bias, 3), strict=True
        )
        q, k, v = (
            split_heads(product(x.astype(self.dtype), w) + b.astype(self.dtype), self.num_heads)
            for x, w, b in parts
        )
        if mask is None:
            y = ops.dot_product_attention(q, k, v)
        else:
            y = ops.masked_attention(q, k, v, mask)
        return dense(channels, self.dtype, "proj", xavier_uniform())(merge_heads(y))


class DecoderLayer(nn.Module):
    """Masked cross-attention, self-attention and two linear layers, each LN(x + ...).

    Attributes:
      num_heads: number of heads, a divisor of C.
      hidden: channels between the linear layers.
      dtype: type of the computation.
    """

    num_heads: int
    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, query_positions, cells, cell_positions, mask):
        """Returns the queries (B, Q, C) after the layer.

        Args:
          x: queries (B, Q, C).
          query_positions: (Q, C), added to queries and keys, not to values.
          cells: cells of a map (B, S, C).
          cell_positions: their position embeddings (S, C), added to keys only.
          mask: cells that each query sees (B, Q, S).
        """

        def add(x, y, name):
            return AddLayerNorm(EPSILON, self.dtype, name=name)(x, y)[1]

        cross, own = (
            QueryAttention(self.num_heads, self.dtype, name=name)
            for name in ("cross_attention", "self_attention")
        )
        x = add(x, cross(x + query_positions, cells + cell_positions, cells, mask), "norm1")
        placed = x + query_positions
        x = add(x, own(placed, placed, x), "norm2")
        y = nn.relu(dense(self.hidden, self.dtype, "fc1", xavier_uniform())(x))
        return add(x, dense(x.shape[-1], self.dtype, "fc2", xavier_uniform())(y), "norm3")


class MaskedDecoder(nn.Module):
    """Features of pixels -> what queries predict: a class and a mask each.

    A layer reads one level, the coarsest first, and a query sees the cells where the mask that it
    predicts before the layer has a probability of at least 1/2, resized to the level. If there is
    none, it sees the whole level.

    Attributes:
      num_classes: K.
      num_queries: Q.
      depth: number of layers.
      num_heads: heads of the attention, a divisor of the channels.
      hidden: channels between the linear layers of a layer.
      dtype: type of the computation; predictions are float32.

    References:
      Cheng et al. 2022, "Masked-attention Mask Transformer for Universal Image Segmentation",
      Section 3.2.
    """

    num_classes: int
    num_queries: int = 100
    depth: int = 9
    num_heads: int = 8
    hidden: int = 2048
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: PixelFeatures, train: bool) -> MaskPredictions:
        """Returns the predictions after the last layer; in training, of all n = depth + 1 places.

        Args:
          features: features of the pixels.
          train: whether all predictions are returned, for their losses.
        """
        channels = features.levels[0].shape[-1]
        cells, positions = self._sources(features.levels)
        # Resizing is linear: the features are resized once, instead of the masks of every layer.
        mask_features = lax.stop_gradient(features.mask_features).astype(self.dtype)
        resized = [ops.resize_bilinear(mask_features, x.shape[1:3]) for x in features.levels]
        shape = (self.num_queries, channels)
        queries = self.param("queries", normal(1.0), shape).astype(self.dtype)
        query_positions = self.param("query_positions", normal(1.0), shape).astype(self.dtype)
        x = jnp.broadcast_to(queries, (cells[0].shape[0], *shape))
        embed = self._embedding(channels, features.mask_features.shape[-1])
        embedded = [embed(x)]
        for i in range(self.depth):
            level = i % NUM_LEVELS
            seen = _seen(embedded[-1][1], resized[level])
            layer = DecoderLayer(self.num_heads, self.hidden, self.dtype, name=f"layer_{i}")
            x = layer(x, query_positions, cells[level], positions[level], seen)
            embedded.append(embed(x))
        if not train:
            embedded = embedded[-1:]
        normed, embeddings = map(jnp.stack, zip(*embedded, strict=True))
        classifier = _pytorch_dense(self.num_classes + 1, channels, self.dtype, "classifier")
        masks = jnp.einsum(
            "nbqc,bhwc->nbqhw", embeddings, features.mask_features.astype(self.dtype),
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        return MaskPredictions(classifier(normed).astype(jnp.float32), masks)

    def _embedding(self, channels, mask_channels):
        """Returns a function from queries to their LayerNorm and the embeddings of their masks."""
        norm = LayerNorm(EPSILON, self.dtype, name="norm")
        sizes = [channels] * (MASK_LAYERS - 1) + [mask_channels]
        first, *others = (
            _pytorch_dense(size, channels, self.dtype, f"mask_embedding_{i}")
            for i, size in enumerate(sizes)
        )

        def embed(x):
            normed = norm(x)
            y = first(normed)
            for layer in others:
                y = layer(nn.relu(y))
            return normed, y

        return embed

    def _sources(self, levels):
        """Returns the cells of every level (B, S, C) and their position embeddings (S, C)."""
        channels = levels[0].shape[-1]
        embeddings = self.param("level_embedding", normal(1.0), (NUM_LEVELS, channels))
        cells = [
            (x.reshape(x.shape[0], -1, channels) + embedding).astype(self.dtype)
            for x, embedding in zip(levels, embeddings, strict=True)
        ]
        positions = [ops.sine_positions(x.shape[1:3], channels) for x in levels]
        return cells, [x.reshape(-1, channels).astype(self.dtype) for x in positions]


def _seen(embeddings, features):
    """Returns the cells (B, Q, S) of a level where masks have a probability of at least 1/2.

    Args:
      embeddings: embeddings of the masks (B, Q, C).
      features: mask features, resized to the level (B, h, w, C).
    """
    features = features.reshape(features.shape[0], -1, features.shape[-1])
    with jax.named_scope(SEEN):
        return jnp.einsum("bqc,bsc->bqs", embeddings, features) >= 0


def _pytorch_dense(dim, fan_in, dtype, name):
    """Returns a linear layer with PyTorch's default initialisation."""
    init = uniform_init(fan_in)
    return dense(dim, dtype, name, init, bias_init=init)
