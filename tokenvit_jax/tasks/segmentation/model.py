"""The segmentation model: a backbone, a head, and logits for every pixel."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from tokenvit_jax.errors import UserError
from tokenvit_jax.heads import FcnHead, Head, LinearDecoder, MaskTransformer, SemanticFpn, UperNet
from tokenvit_jax.layers import LayerNorm
from tokenvit_jax.models import create_model
from tokenvit_jax.models.backbone import BackboneModel
from tokenvit_jax.ops import resize_bilinear
from tokenvit_jax.tasks.overrides import choose_head, make_backbone, make_head

HEADS: dict[str, type[Head]] = {
    "mask_transformer": MaskTransformer,
    "linear": LinearDecoder,
    "upernet": UperNet,
    "semantic_fpn": SemanticFpn,
}


class CoarseLogits(NamedTuple):
    """Logits of cells of the image, in float32.

    Attributes:
      main: (B, h, w, K), logits of the head.
      auxiliary: (B, h', w', K), logits of the auxiliary head; None outside of training.
    """

    main: jax.Array
    auxiliary: jax.Array | None


class Segmenter(BackboneModel):
    """Applies a head to a backbone and interpolates the logits to all pixels (bilinear).

    With a plain host and a head on tokens this is Segmenter (Strudel et al. 2021). A hierarchical
    backbone passes the tokens of all its maps to such a head at once; other heads read the maps.

    Attributes:
      backbone: the backbone.
      head: module that maps tokens (B, n, C) to logits (B, n, K), or maps to logits (B, h, w, K).
      auxiliary: module that maps the third map to logits in training; None: there is none.
    """

    head: Head
    auxiliary: FcnHead | None = None

    @property
    def local_statistics(self) -> bool:
        return super().local_statistics or getattr(self.head, "batch_norm", "global") != "global"

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits (B, H, W, K) in float32 for images (B, H, W, C)."""
        return self.to_pixels(self.coarse_logits(images, train).main, images.shape[1:3])

    @nn.compact
    def coarse_logits(self, images: jax.Array, train: bool = False) -> CoarseLogits:
        """Returns the logits of the head, and in training also of the auxiliary head."""
        if self.head.reads == "tokens":
            tokens, restore = self.backbone.encode(images, train)
            return CoarseLogits(restore(self.head(tokens, train=train)), None)
        maps = self.backbone.features(images, train)
        epsilon = self.backbone.map_norm_epsilon
        if epsilon is not None:
            maps = [
                LayerNorm(epsilon, x.dtype, name=f"map_norm_{i}")(x) for i, x in enumerate(maps, 1)
            ]
        logits = self.head(maps, train=train)
        if self.auxiliary is None or not (train or self.is_initializing()):
            return CoarseLogits(logits, None)
        return CoarseLogits(logits, self.auxiliary(maps[2], train=train))

    @nn.nowrap
    def to_pixels(self, logits: jax.Array, size: tuple[int, int]) -> jax.Array:
        """Interpolates coarse logits (B, h, w, K) to images of a size: (B, H, W, K) in float32."""
        logits = logits.astype(jnp.float32)
        if self.head.reads == "maps":
            return resize_bilinear(logits, tuple(size))
        # The map covers the image padded to whole patches.
        height, width = (cells * self.backbone.strides[0] for cells in logits.shape[1:3])
        shape = (logits.shape[0], height, width, logits.shape[-1])
        logits = jax.image.resize(logits, shape, "bilinear", antialias=False)
        return logits[:, : size[0], : size[1]]


def head_class(name: str) -> type[Head]:
    """Returns the class of a head.

    Raises:
      UserError: there is no such head.
    """
    return choose_head(name, HEADS)


def make_segmenter(config: ConfigDict, num_classes: int, axis_name: str | None) -> Segmenter:
    """Returns the segmentation model of a configuration.

    Args:
      config: provides `model`, `model_overrides`, `head`, `head_overrides`, `auxiliary_weight` and
        `dtype`.
      num_classes: number of classes.
      axis_name: axis of `jax.pmap` over which a batch is split; None under `jax.jit`.

    Raises:
      UserError: the model, the head or an override is unknown, or the head does not fit the model.
    """
    common = {"dtype": jnp.dtype(config.dtype), "axis_name": axis_name}
    check_head(config)
    cls = head_class(config.head)
    head = make_head(cls, config, num_classes=num_classes, **common)
    auxiliary = None
    if cls.has_auxiliary and config.auxiliary_weight:
        shared = {name: getattr(head, name) for name in ("dropout", "batch_norm", "init_std")}
        auxiliary = FcnHead(num_classes, head.auxiliary_channels, **shared, **common)
    return Segmenter(make_backbone(config, **common), head, auxiliary)


def check_head(config: ConfigDict) -> None:
    """Raises UserError if the head reads maps that the model does not have.

    Args:
      config: provides `model` and `head`.
    """
    if head_class(config.head).reads == "maps" and len(create_model(config.model).strides) == 1:
        valid = [name for name, head in HEADS.items() if head.reads == "tokens"]
        raise UserError(
            f"config.head={config.head!r} is not valid: it reads the maps of a hierarchical "
            f"backbone, and config.model={config.model!r} is plain; valid: {', '.join(valid)}"
        )
