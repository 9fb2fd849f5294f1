"""Hierarchical backbones: four stages, their maps and the classifier."""

import abc
import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from tokenvit_jax.errors import UserError
from tokenvit_jax.layers import Dropout, DropPaths, Factors
from tokenvit_jax.models.backbone import Backbone, Encoded
from tokenvit_jax.models.settings import (
    BLOCKS,
    CHANNELS,
    HEADS,
    BackboneSettings,
    Rules,
    check_heads,
    rules_of,
)
from tokenvit_jax.ops.mix_boxes import mix_boxes
from tokenvit_jax.valid import Several, whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class PyramidSettings(BackboneSettings):
    """Settings of every hierarchical backbone; tuples have one entry per stage.

    Attributes:
      dims: number of channels.
      num_heads: number of attention heads.
      depths: number of blocks.
    """

    valid: ClassVar[Rules] = {
        "dims": Several(CHANNELS), "num_heads": Several(HEADS), "depths": Several(whole(0, BLOCKS))
    }  # fmt: skip

    dims: tuple[int, ...]
    num_heads: tuple[int, ...]
    depths: tuple[int, ...]

    def check_relations(self) -> None:
        for name, rule in rules_of(type(self)).items():
            # Tuples of any length have one entry per stage.
            if isinstance(rule, Several) and rule.length is None:
                value, stages = getattr(self, name), len(self.dims)
                if not stages or len(value) != stages:
                    raise UserError(
                        f"{name}={value} does not fit dims={self.dims}; valid: one value for every "
                        "stage, and at least one stage"
                    )
        if not self.num_blocks:
            raise UserError(f"depths={self.depths} has no block; valid: at least one")
        for stage, depth in enumerate(self.depths):
            if depth:  # a stage without blocks has no heads
                check_heads(self.num_heads[stage], self.dims[stage], f"dims={self.dims}")

    @property
    def num_blocks(self) -> int:
        return sum(self.depths)


class Pyramid(Backbone):
    """A backbone of stages, each a patch embedding and blocks; four stages have strides 4 to 32.

    A subclass sets :attr:`block_type` and implements :meth:`embedding`; it can also override
    :meth:`stem`, :meth:`run_blocks`, :meth:`end_stage` and :meth:`head`.

    Attributes:
      settings: the architecture.
      block_type: class of the blocks, created as ``block_type(settings, stage, index)`` and called
        as ``block(x, train, factors)`` with x (B, H, W, C) and the factors of its branches;
        ``index`` counts from the first block of the network.
    """

    settings: PyramidSettings

    block_type: ClassVar[type[nn.Module]]
    first_layer = "embeddings_0"

    @abc.abstractmethod
    def embedding(self, stage: int) -> nn.Module:
        """Returns the first layer of a stage, which leaves a quarter of the tokens."""

    def stem(self, images: jax.Array, train: bool) -> jax.Array:
        """Returns the input of the first patch embedding."""
        del train
        return images

    def run_blocks(
        self, stage: int, x: jax.Array, train: bool, factors: list[Factors]
    ) -> jax.Array:
        """Applies the blocks of a stage to the map of its embedding.

        Args:
          stage: number of the stage, from 0.
          x: (B, H, W, C).
          train: whether the blocks behave as in training.
          factors: those of the branches of every block of the network.
        """
        for block in self.stages[stage]:
            x = block(x, train, factors[block.index])
        return x

    def end_stage(self, stage: int, x: jax.Array) -> jax.Array:
        """Returns the map of a stage, the input of the next stage, from the last block's map."""
        del stage
        return x

    def head(self, x: jax.Array, train: bool) -> jax.Array:
        """Returns the tokens whose mean is classified, from the map of the last stage."""
        del train
        return x

    def setup(self):
        settings = self.settings
        self.embeddings = [self.embedding(stage) for stage in range(len(settings.dims))]
        self.stages = self._stages()
        self.drop_paths = DropPaths(settings.drop_path, settings.num_blocks, settings.axis_name)
        self.head_dropout = Dropout(settings.dropout, settings.axis_name)
        self.classifier = self.make_classifier()

    def _stages(self):
        cls, settings = self.block_type, self.settings
        cls = nn.remat(cls, static_argnums=(2,)) if settings.remat else cls
        stages, index = [], 0
        for stage, depth in enumerate(settings.depths):
            stages.append([cls(settings, stage, i) for i in range(index, index + depth)])
            index += depth
        return stages

    @nn.nowrap
    def layer_of(self, path: str) -> int:
        """Returns the layer of a variable: 0, the block's number from 1, or the last layer.

        What lies between two stages belongs to the last block in front of it (SimMIM's code for
        Swin); the stem and the first embedding are layer 0.
        """
        module, *numbers = path.split("/")[0].split("_")
        depths = self.settings.depths
        match module, numbers:
            case "stages", [stage, block]:
                return sum(depths[: int(stage)]) + int(block) + 1
            case "embeddings", [stage]:
                return sum(depths[: int(stage)])
            case "norms", [stage]:
                return sum(depths[: int(stage) + 1])
        return 0 if module == "first" else self.num_layers - 1

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of the maps [pixels]: 4, 8, 16 and 32."""
        return tuple(4 * 2**stage for stage in range(len(self.settings.dims)))

    def features(
        self, images: jax.Array, train: bool = False, mix_box: jax.Array | None = None
    ) -> list[jax.Array]:
        """Returns four maps, (B, H / 4, W / 4, C1) to (B, H / 32, W / 32, C4), rounded up.

        Args:
          images: (B, H, W, 3) float, H and W from 32.
          train: whether BatchNorm, dropout and routing behave as in training.
          mix_box: (4,) int, the box of MixToken (Jiang et al. 2021): top, bottom, left and right in
            cells of the last map. Inside the box, the tokens of the first embedding come from image
            i ^ 1. None: nothing is mixed.
        """
        self.check_images(images)
        x = self.stem(images.astype(self.settings.dtype), train)
        factors = self.drop_paths(x.shape[0], train)
        maps = []
        for stage, embedding in enumerate(self.embeddings):
            x = embedding(x)
            if stage == 0 and mix_box is not None:
                x = mix_boxes(x, mix_box * 2 ** (len(self.settings.dims) - 1))
            x = self.end_stage(stage, self.run_blocks(stage, x, train, factors))
            maps.append(x)
        return maps

    def encode(self, images: jax.Array, train: bool = False) -> Encoded:
        """Returns the channels of all four maps at every position of the first map.

        The other maps are resized to the first, bilinearly (hypercolumns, Hariharan et al. 2015).

        Args:
          images: (B, H, W, 3) float, H and W from 32.
          train: as in :meth:`features`.

        Returns:
          Tokens (B, ceil(H / 4) ceil(W / 4), C), where C is the sum of ``dims``, and the function
          that reshapes a head's output to (B, ceil(H / 4), ceil(W / 4), D).
        """
        maps = self.features(images, train)
        batch, height, width, _ = maps[0].shape
        columns = [
            jax.image.resize(x, (batch, height, width, x.shape[-1]), "bilinear") for x in maps
        ]
        tokens = jnp.concatenate(columns, -1).reshape(batch, height * width, -1)
        return Encoded(tokens, lambda y: y.reshape(batch, height, width, -1))

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Returns the logits (B, num_classes) in float32; without classes, :meth:`pooled`."""
        return self.classify(self.pooled(images, train), train)

    def pooled(self, images: jax.Array, train: bool = False) -> jax.Array:
        return pool_tokens(self.head(self.features(images, train)[-1], train))

    def dense_logits(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Returns the classifier's logits at every position of the last map, in float32.

        The shape is (B, ceil(H / 32), ceil(W / 32), num_classes). The mean over the positions
        equals the logits of the image.

        Raises:
          UserError: the model has no classes.
        """
        if not self.settings.num_classes:
            raise UserError("num_classes=0: the model has no logits; valid: at least 1")
        tokens = self.head(self.features(images, train)[-1], train)
        return self.classifier(tokens.astype(jnp.float32))


def pool_tokens(tokens: jax.Array) -> jax.Array:
    """Returns the mean over the positions of a map: (B, h, w, C) -> (B, C) in float32."""
    return tokens.mean((1, 2)).astype(jnp.float32)
