"""The depth model: a plain backbone, DPT's decoder, and depth for every pixel."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from tokenvit_jax.errors import UserError
from tokenvit_jax.heads import DptHead
from tokenvit_jax.heads.dpt import LEVELS
from tokenvit_jax.models import create_model, list_models
from tokenvit_jax.models.backbone import BackboneModel
from tokenvit_jax.tasks.overrides import make_backbone, make_head

LEAST_INVERSE_DEPTH = 1e-8  # [1 / m]
STEM_MAPS = 2  # that a hybrid gives; their strides, 4 and 8, are those of the finest levels


class Dpt(BackboneModel):
    """Predicts depth from taps of a plain backbone: images (B, H, W, 3) -> (B, H, W) [metres].

    The decoder returns y >= 0. The depth is scale y + shift or, with ``invert``,
    1 / max(scale y + shift, 1e-8).

    Attributes:
      backbone: the backbone.
      head: the decoder.
      blocks: the blocks whose outputs the decoder reads, counted from 0, from the finest level to
        the coarsest. With fewer than four, the finer levels are the first stages of the stem.
      scale: factor of the decoder's output.
      shift: added to it.
      invert: whether the decoder predicts inverse depth.

    References:
      Ranftl et al. 2021, "Vision Transformers for Dense Prediction".
    """

    unread_modules = ("norm", "projection")

    head: DptHead
    blocks: tuple[int, ...]
    scale: float = 1.0
    shift: float = 0.0
    invert: bool = False

    @property
    def multiple(self) -> int:  # the largest stride
        return 2 * self.backbone.strides[0]

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Returns the depth of every pixel (B, H, W) [metres] in float32.

        Args:
          images: (B, H, W, 3) float, normalised.
          train: whether the backbone behaves as in training.

        Raises:
          UserError: H or W is not a multiple of :attr:`multiple`.
        """
        return self.to_depth(self.decode(images, train))

    def decode(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Returns the decoder's output y (B, H, W), at least 0, for the arguments of a call."""
        return self.head(self._taps(images, train), images.shape[1:3], train=train)

    def maps(self, images: jax.Array, train: bool = False) -> list[jax.Array]:
        return [tap.map for tap in self._taps(images, train)]

    def _taps(self, images, train):
        height, width = images.shape[1:3]
        if height % self.multiple or width % self.multiple:
            raise UserError(
                f"images are {height} x {width}; valid: height and width in multiples of "
                f"{self.multiple}"
            )
        stages = tuple(range(LEVELS - len(self.blocks)))
        return self.backbone.taps(images, train, self.blocks, stages)

    @nn.nowrap
    def to_depth(self, y: jax.Array) -> jax.Array:
        """Returns the depth [metres] for the decoder's output."""
        y = self.scale * y + self.shift
        return 1 / jnp.maximum(y, LEAST_INVERSE_DEPTH) if self.invert else y


def default_blocks(depth: int, num_taps: int = LEVELS) -> tuple[int, ...]:
    """Returns the last blocks of equal parts of a backbone, as published for 12 and 24 blocks.

    Args:
      depth: number of blocks.
      num_taps: number of blocks that are read, the last ones of four.
    """
    blocks = [max(depth * i // LEVELS - 1, 0) for i in range(1, LEVELS + 1)]
    return tuple(blocks[LEVELS - num_taps :])


def make_dpt(config: ConfigDict, axis_name: str | tuple[str, ...] | None) -> Dpt:
    """Returns the depth model of a configuration.

    Args:
      config: provides `model`, `model_overrides`, `head_overrides`, `depth.scale`, `depth.shift`,
        `depth.invert` and `dtype`.
      axis_name: mapped axis that the batch is split over; None under `jax.jit`.

    Raises:
      UserError: the model or an override is unknown, or the model is hierarchical.
    """
    check_host(config)
    common = {"dtype": jnp.dtype(config.dtype), "axis_name": axis_name}
    backbone = make_backbone(config, **common)
    head = make_head(DptHead, config, **common)
    settings = backbone.settings
    num_maps = 0 if settings.stem is None else min(len(settings.stem.widths), STEM_MAPS)
    blocks = default_blocks(settings.num_blocks, LEVELS - num_maps)
    depth = config.depth
    return Dpt(backbone, head, blocks, depth.scale, depth.shift, depth.invert)


def check_host(config: ConfigDict) -> None:
    """Raises UserError if the model has no taps.

    Args:
      config: provides `model`.
    """
    if len(create_model(config.model).strides) > 1:
        valid = [name for name in list_models() if len(create_model(name).strides) == 1]
        raise UserError(
            f"config.model={config.model!r} is not valid: DPT reads blocks of a plain backbone; "
            f"valid: {', '.join(valid)}"
        )
