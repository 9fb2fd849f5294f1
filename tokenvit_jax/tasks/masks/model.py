"""The model of segmentation by masks: a hierarchical backbone and Mask2Former on its maps."""

import jax
from flax import linen as nn

from tokenvit_jax.heads import Mask2Former, MaskPredictions
from tokenvit_jax.models.backbone import BackboneModel
from tokenvit_jax.tasks.map_norms import normed_maps


class MaskSegmenter(BackboneModel):
    """Applies Mask2Former to the maps of a hierarchical backbone.

    Attributes:
      backbone: the backbone.
      head: the head.
    """

    head: Mask2Former

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> MaskPredictions:
        """Returns the predictions of the head; masks have a stride of 4 pixels.

        Args:
          images: (B, H, W, C), normalised.
          train: whether the backbone behaves as in training, and all predictions are returned.
        """
        return self.head(normed_maps(self.backbone, images, train), train)
