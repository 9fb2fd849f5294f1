"""The segmentation model: a backbone, a head on its tokens, and logits for every pixel."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from tokenvit_jax.errors import UserError, did_you_mean
from tokenvit_jax.heads import LinearDecoder, MaskTransformer
from tokenvit_jax.models.backbone import BackboneModel
from tokenvit_jax.tasks.overrides import make_backbone, make_head

HEADS = {"mask_transformer": MaskTransformer, "linear": LinearDecoder}


class Segmenter(BackboneModel):
    """Applies a head to a backbone's tokens and interpolates the logits to all pixels (bilinear).

    With a plain host this is Segmenter (Strudel et al. 2021). A hierarchical backbone passes the
    tokens of all its maps to the head at once.

    Attributes:
      backbone: backbone with the method `encode`.
      head: module that maps tokens (B, n, C) to logits (B, n, K).
    """

    head: nn.Module

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits (B, H, W, K) in float32 for images (B, H, W, C)."""
        tokens, restore = self.backbone.encode(images, train)
        logits = restore(self.head(tokens, train=train))
        # The map covers the image padded to whole patches.
        height, width = (cells * self.backbone.strides[0] for cells in logits.shape[1:3])
        shape = (images.shape[0], height, width, logits.shape[-1])
        logits = jax.image.resize(logits.astype(jnp.float32), shape, "bilinear", antialias=False)
        return logits[:, : images.shape[1], : images.shape[2]]


def head_class(name: str) -> type[nn.Module]:
    """Returns the class of a head.

    Raises:
      UserError: there is no such head.
    """
    if name not in HEADS:
        hint = did_you_mean(name, HEADS)
        raise UserError(f"config.head={name!r} is not valid{hint}; valid: {', '.join(HEADS)}")
    return HEADS[name]


def make_segmenter(config: ConfigDict, num_classes: int, axis_name: str | None) -> Segmenter:
    """Returns the segmentation model of a configuration.

    Args:
      config: provides `model`, `model_overrides`, `head`, `head_overrides` and `dtype`.
      num_classes: number of classes.
      axis_name: axis of `jax.pmap` over which a batch is split; None under `jax.jit`.

    Raises:
      UserError: the model, the head or an override is unknown.
    """
    common = {"dtype": jnp.dtype(config.dtype), "axis_name": axis_name}
    cls = head_class(config.head)
    return Segmenter(
        backbone=make_backbone(config, **common),
        head=make_head(cls, config, num_classes=num_classes, **common),
    )
