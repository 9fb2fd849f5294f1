"""Mask2Former: a pixel decoder, and queries that predict a class and a mask each."""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from tokenvit_jax.heads.detection import COUNT
from tokenvit_jax.heads.head import LOGITS, Head
from tokenvit_jax.heads.masked_decoder import MaskedDecoder, MaskPredictions
from tokenvit_jax.heads.pixel_decoder import PixelDecoder
from tokenvit_jax.models.settings import BLOCKS, CHANNELS, Rules
from tokenvit_jax.valid import whole


class Mask2Former(Head):
    """Maps of strides 4 to 32 -> a class and a mask for every query.

    Attributes:
      num_classes: K.
      num_queries: Q.
      channels: channels of both decoders and of the mask features, a multiple of 32 and of
        `num_heads`.
      num_heads: heads of all attention.
      num_points: places of a head in a map, in the pixel decoder.
      encoder_depth: layers of the pixel decoder.
      encoder_hidden: channels between the linear layers of the pixel decoder.
      depth: layers of the decoder of queries.
      hidden: channels between the linear layers of the decoder of queries.
      dtype: type of the computation in the decoder of queries; parameters, the pixel decoder and
        the predictions are float32.
      axis_name: attribute of every head; ignored here.

    References:
      Cheng et al. 2022, "Masked-attention Mask Transformer for Universal Image Segmentation".
    """

    reads = "maps"
    valid: ClassVar[Rules] = LOGITS | {
        "num_queries": COUNT, "channels": CHANNELS, "num_heads": CHANNELS, "num_points": COUNT,
        "encoder_depth": whole(0, BLOCKS), "encoder_hidden": CHANNELS, "depth": whole(0, BLOCKS),
        "hidden": CHANNELS,
    }  # fmt: skip

    num_classes: int
    num_queries: int = 100
    channels: int = 256
    num_heads: int = 8
    num_points: int = 4
    encoder_depth: int = 6
    encoder_hidden: int = 1024
    depth: int = 9
    hidden: int = 2048
    dtype: Any = jnp.float32
    axis_name: str | None = None

    def setup(self):
        self.pixel_decoder = PixelDecoder(
            self.channels, self.channels, self.encoder_depth, self.num_heads, self.num_points,
            self.encoder_hidden,
        )  # fmt: skip
        self.decoder = MaskedDecoder(
            self.num_classes, self.num_queries, self.depth, self.num_heads, self.hidden, self.dtype
        )

    def __call__(self, maps: Sequence[jax.Array], train: bool) -> MaskPredictions:
        """Returns the predictions after the last layer; in training, also those before it.

        Args:
          maps: maps (B, h, w, C) of a backbone, the finest first.
          train: whether all predictions are returned, for their losses.
        """
        return self.decoder(self.pixel_decoder(maps), train)
