"""The segmentation model: a backbone, a head on its tokens, and logits for every pixel."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from tokenvit_jax.errors import UserError, did_you_mean
from tokenvit_jax.heads import LinearDecoder, MaskTransformer
from tokenvit_jax.models import create_model
from tokenvit_jax.models.backbone import BackboneModel

HEADS = {"mask_transformer": MaskTransformer, "linear": LinearDecoder}


class Segmenter(BackboneModel):
    """A backbone and a head on its tokens; logits are bilinear between the tokens.

    With a plain host this is Segmenter (Strudel et al. 2021). A hierarchical backbone gives its
    head the tokens of all its maps at once.

    Attributes:
      backbone: a backbone with the method `encode`.
      head: tokens (B, n, C) -> logits (B, n, K).
    """

    head: nn.Module

    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Returns logits (B, H, W, K) in float32 for images (B, H, W, 3)."""
        tokens, restore = self.backbone.encode(images, train)
        logits = restore(self.head(tokens, train=train))
        # The map belongs to an image that is padded to whole patches.
        height, width = (cells * self.backbone.strides[0] for cells in logits.shape[1:3])
        shape = (len(images), height, width, logits.shape[-1])
        logits = jax.image.resize(logits.astype(jnp.float32), shape, "bilinear", antialias=False)
        return logits[:, : images.shape[1], : images.shape[2]]


def make_segmenter(config: ConfigDict, num_classes: int, axis_name: str | None) -> Segmenter:
    """Returns the segmentation model of a configuration.

    Args:
      config: reads `model`, `model_overrides`, `head`, `head_overrides` and `dtype`.
      num_classes: number of classes.
      axis_name: axis of `jax.pmap` over which a batch is split; None under `jax.jit`.

    Raises:
      UserError: unknown model, head or override.
    """
    common = {"dtype": jnp.dtype(config.dtype), "axis_name": axis_name}
    backbone = create_model(config.model, **common, **config.model_overrides.to_dict())
    if config.head not in HEADS:
        hint = did_you_mean(config.head, HEADS)
        raise UserError(
            f"config.head={config.head!r} is not valid{hint}; valid: {', '.join(HEADS)}"
        )
    overrides = config.head_overrides.to_dict()
    try:
        head = HEADS[config.head](num_classes=num_classes, **common, **overrides)
    except TypeError as error:
        raise UserError(f"config.head_overrides={overrides} of {config.head}: {error}") from error
    return Segmenter(backbone=backbone, head=head)
