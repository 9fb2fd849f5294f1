"""What hierarchical backbones have in common: four stages, their maps, and the classifier."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tokenvit_jax.layers import Dropout, dense
from tokenvit_jax.models.registry import check_images
from tokenvit_jax.ops.mix_boxes import mix_boxes


class Pyramid(nn.Module, kw_only=True):
    """A stage is a patch embedding and blocks; four of them reduce an image 4 to 32 times.

    A subclass gives :meth:`embedding` and :meth:`block`, and where it has them :meth:`stem`,
    :meth:`run_blocks`, :meth:`end_stage` and :meth:`head`.

    Attributes:
      num_classes: of the classifier.
      dims: channels of the stages.
      num_heads: heads of the stages.
      depths: blocks of the stages.
      drop_path: stochastic depth of the last block, growing linearly from 0.
      dropout: before the classifier.
      remat: compute the blocks again in the backward pass instead of keeping what is inside.
      dtype: of the computation; parameters are float32.
      axis_name: mapped axis that the batch is divided over, for pmap; None under jit.
    """

    num_classes: int
    dims: tuple[int, ...]
    num_heads: tuple[int, ...]
    depths: tuple[int, ...]
    drop_path: float = 0.0
    dropout: float = 0.0
    remat: bool = False
    dtype: Any = jnp.float32
    axis_name: str | None = None

    dense_stride = 4  # pixels from one place of the map of `dense` to the next

    def embedding(self, stage: int) -> nn.Module:
        """Returns the layer at the beginning of a stage: ``x -> x`` of a quarter of the tokens."""
        raise NotImplementedError

    def block(self, stage: int, index: int) -> tuple[type[nn.Module], dict[str, Any]]:
        """Returns the class and the settings of a block; ``index`` counts from the first stage.

        The block is called as ``block(x, train)`` with x (B, H, W, C).
        """
        raise NotImplementedError

    def stem(self, images: jax.Array, train: bool) -> jax.Array:
        """Returns what the first patch embedding reads."""
        return images

    def run_blocks(self, stage: int, x: jax.Array, train: bool) -> jax.Array:
        """Returns the map that the blocks of a stage make of that of its embedding."""
        for block in self.stages[stage]:
            x = block(x, train)
        return x

    def end_stage(self, stage: int, x: jax.Array) -> jax.Array:
        """Returns the map of a stage, which the next one reads, from that of its last block."""
        return x

    def head(self, x: jax.Array, train: bool) -> jax.Array:
        """Returns the tokens whose mean is classified, from the map of the last stage."""
        return x

    def setup(self):
        self.embeddings = [self.embedding(stage) for stage in range(len(self.dims))]
        self.stages = self._stages()
        self.head_dropout = Dropout(self.dropout, self.axis_name)
        self.classifier = dense(self.num_classes, jnp.float32)

    def _stages(self):
        last = max(sum(self.depths) - 1, 1)
        stages, index = [], 0
        for stage, depth in enumerate(self.depths):
            blocks = []
            for _ in range(depth):
                cls, settings = self.block(stage, index)
                cls = nn.remat(cls, static_argnums=(2,)) if self.remat else cls
                blocks.append(cls(drop_path=self.drop_path * index / last, **settings))
                index += 1
            stages.append(blocks)
        return stages

    def features(
        self, images: jax.Array, train: bool, mix_box: jax.Array | None = None
    ) -> list[jax.Array]:
        """Returns four maps, (B, H / 4, W / 4, C1) to (B, H / 32, W / 32, C4), rounded up.

        Args:
          images: (B, H, W, 3) float, H and W from 32.
          train: whether BatchNorm, dropout and routing behave as in training.
          mix_box: (4,) int, top, bottom, left, right in cells of the last map: MixToken (Jiang et
            al. 2021), the tokens of the first embedding inside come from image i ^ 1.
        """
        check_images(images)
        x = self.stem(images.astype(self.dtype), train)
        maps = []
        for stage, embedding in enumerate(self.embeddings):
            x = embedding(x)
            if stage == 0 and mix_box is not None:
                x = mix_boxes(x, mix_box * 2 ** (len(self.dims) - 1))
            x = self.end_stage(stage, self.run_blocks(stage, x, train))
            maps.append(x)
        return maps

    def dense(
        self, images: jax.Array, train: bool, head: Callable[[jax.Array], jax.Array]
    ) -> jax.Array:
        """Returns the map (B, ceil(H / 4), ceil(W / 4), D) of a head.

        The head sees the channels of all four maps at every place of the first one, the others
        bilinear between their own places (hypercolumns, Hariharan et al. 2015).

        Args:
          images: (B, H, W, 3) float, H and W from 32.
          train: as in :meth:`features`.
          head: (B, n, C) -> (B, n, D), C being the sum of ``dims``.
        """
        maps = self.features(images, train)
        batch, height, width, _ = maps[0].shape
        columns = [
            jax.image.resize(x, (batch, height, width, x.shape[-1]), "bilinear") for x in maps
        ]
        y = head(jnp.concatenate(columns, -1).reshape(batch, height * width, -1))
        return y.reshape(batch, height, width, -1)

    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Returns the logits (B, num_classes) in float32."""
        return self.classify(self.head(self.features(images, train)[-1], train), train)

    def dense_logits(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Returns the classifier's logits at every place of the last map, in float32.

        (B, ceil(H / 32), ceil(W / 32), num_classes); their mean over the places are the logits.
        """
        tokens = self.head(self.features(images, train)[-1], train)
        return self.classifier(tokens.astype(jnp.float32))

    def classify(self, tokens: jax.Array, train: bool) -> jax.Array:
        """Returns logits (B, num_classes) from the tokens (B, h, w, C) of the head."""
        x = self.head_dropout(tokens.mean((1, 2)), train)
        return self.classifier(x.astype(jnp.float32))
