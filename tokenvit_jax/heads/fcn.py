"""The fully convolutional head, which training adds to another head."""

import flax.linen as nn
import jax

from tokenvit_jax.heads.head import MapHead


class FcnHead(MapHead):
    """A 3 x 3 convolution with BatchNorm and a classifier: (B, h, w, C) -> (B, h, w, K) in float32.

    References:
      Long et al. 2015, "Fully Convolutional Networks for Semantic Segmentation"; as an auxiliary
      head with one convolution in Zhao et al. 2017, "Pyramid Scene Parsing Network".
    """

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return self.classify(self.block(3, "convolution")(x, train), train)
