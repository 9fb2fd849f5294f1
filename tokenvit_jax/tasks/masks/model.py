"""The model of segmentation by masks: a hierarchical backbone and Mask2Former on its maps."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from tokenvit_jax.heads import Mask2Former, MaskPredictions
from tokenvit_jax.models.backbone import BackboneModel
from tokenvit_jax.tasks.map_norms import normed_maps
from tokenvit_jax.tasks.overrides import check_hierarchical, make_backbone, make_head


class MaskSegmenter(BackboneModel):
    """Applies Mask2Former to the maps of a hierarchical backbone.

    Attributes:
      backbone: the backbone.
      head: the head.
    """

    head: Mask2Former

    @property
    def multiple(self) -> int:
        return self.backbone.strides[-1]

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> MaskPredictions:
        """Returns the predictions of the head; masks have a stride of 4 pixels.

        Args:
          images: (B, H, W, C), normalised.
          train: whether the backbone behaves as in training, and all predictions are returned.
        """
        return self.head(normed_maps(self.backbone, images, train), train)


def make_mask_segmenter(
    config: ConfigDict, num_classes: int, axis_name: str | tuple[str, ...] | None
) -> MaskSegmenter:
    """Returns the model of a configuration.

    Args:
      config: provides `model`, `model_overrides`, `head_overrides` and `dtype`.
      num_classes: number of classes.
      axis_name: mapped axis that the batch is split over; None under `jax.jit`.

    Raises:
      UserError: the model or an override is unknown, or the model is plain.
    """
    check_hierarchical(config, "Mask2Former reads")
    common = {"dtype": jnp.dtype(config.dtype), "axis_name": axis_name}
    head = make_head(Mask2Former, config, num_classes=num_classes, **common)
    return MaskSegmenter(make_backbone(config, **common), head)
