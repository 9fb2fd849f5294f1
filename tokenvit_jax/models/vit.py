"""Vision transformers with one map of tokens: ViT (Dosovitskiy et al. 2021), DeiT (Touvron 2021).

The parameters and the order of the operations are those of timm's models of the same names.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tokenvit_jax import ops
from tokenvit_jax.errors import UserError
from tokenvit_jax.layers import Dropout, DropPath, Mlp, dense
from tokenvit_jax.layers.conv import linear_init
from tokenvit_jax.layers.stochastic import image_keys
from tokenvit_jax.models.reducers import TokenReducer, make_reducer, reduce_tokens
from tokenvit_jax.models.registry import check_images, register

POOLS = ("token", "mean")


class Attention(nn.Module):
    """Multi-head attention of all tokens: (B, T, C) -> (B, T, C).

    With ``scored`` also returns the attention that each token received, (B, T); ``size`` (B, T) is
    the number of patches that each token stands for.
    """

    num_heads: int
    dtype: Any

    @nn.compact
    def __call__(
        self, x: jax.Array, scored: bool = False, size: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        channels = x.shape[-1]
        if channels % self.num_heads:
            raise UserError(f"num_heads={self.num_heads} does not divide {channels} channels")
        qkv = dense(3 * channels, self.dtype, "qkv")(x)
        qkv = qkv.reshape(*x.shape[:2], 3, self.num_heads, channels // self.num_heads)
        q, k, v = jnp.moveaxis(qkv, 2, 0)  # (B, T, heads, D)
        received = None
        if scored or size is not None:
            y, received = ops.scored_attention(q, k, v, size)
        else:
            y = ops.dot_product_attention(q, k, v)
        return dense(channels, self.dtype, "proj")(y.reshape(x.shape)), received


class Block(nn.Module):
    """x + attention(LN(x)), the reducer, x + MLP(LN(x)): (B, T, C) -> (B, T', C).

    Attributes, beside those of :class:`VisionTransformer`:
      num_front: tokens in front of the patches, which are never reduced.
      keep: most patches that go on; None: all.
    """

    num_heads: int
    mlp_ratio: int
    drop_path: float
    dtype: Any
    axis_name: str | None
    num_front: int
    reducer: TokenReducer | None
    keep: int | None

    @nn.compact
    def __call__(self, x: jax.Array, size: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
        """Takes and returns, beside the tokens, how many patches each stands for (B, T)."""

        def norm(x, name):
            return nn.LayerNorm(1e-6, dtype=self.dtype, name=name)(x)

        def drop(y):
            return DropPath(self.drop_path, self.axis_name)(y, train)

        reduces = self.keep is not None and self.keep < x.shape[1] - self.num_front
        attention = Attention(self.num_heads, self.dtype, name="attention")
        carried = size if self.reducer is not None and self.reducer.carry else None
        y, received = attention(norm(x, "norm1"), reduces, carried)
        x = x + drop(y)
        if reduces:
            x, size = self._reduce(x, received, size, train)
        return x + drop(Mlp(self.mlp_ratio, self.dtype, name="mlp")(norm(x, "norm2"))), size

    def _reduce(self, x, received, size, train):
        front, patches = jnp.split(x, [self.num_front], axis=1)
        front_size, patch_size = jnp.split(size, [self.num_front], axis=1)
        if self.keep == 0:
            return front, front_size
        # Evaluation draws the same numbers every time, but others in every block.
        rng = self.make_rng("routing") if train else jax.random.key(x.shape[1])
        patches, patch_size = reduce_tokens(
            patches, received[:, self.num_front :], patch_size, self.keep, self.reducer,
            image_keys(rng, len(x), self.axis_name),
        )  # fmt: skip
        return (
            jnp.concatenate([front, patches], 1),
            jnp.concatenate([front_size, patch_size], 1),
        )


class VisionTransformer(nn.Module, kw_only=True):
    """Vision transformer for images (B, H, W, 3) of any size from 32 x 32.

    Images are padded with zeros below and on the right to whole patches; the position embeddings
    are resized (bicubic, antialiased) where the map is not that of ``position_size``.

    Attributes:
      num_classes: of the classifier.
      dim: C, channels.
      depth: blocks.
      num_heads: heads of every block.
      mlp_ratio: expansion of the MLP.
      patch_size: side of a patch, pixels.
      position_size: height and width of the images whose map the position embeddings fit.
      pool: what is classified: the class "token" after the last LayerNorm, or the LayerNorm of the
        "mean" of the patches.
      distilled: with a distillation token beside the class token, and a classifier of its own
        (DeiT); the logits are the mean of both.
      token_reducer: reduces the patches between attention and MLP of the blocks: a
        :class:`TokenReducer` or its attributes by name; None: all patches stay.
      drop_path: stochastic depth of the last block, growing linearly from 0.
      dropout: before the classifier.
      remat: compute the blocks again in the backward pass instead of keeping what is inside.
      dtype: of the computation; parameters are float32.
      axis_name: mapped axis that the batch is divided over, for pmap; None under jit.
    """

    num_classes: int
    dim: int
    depth: int = 12
    num_heads: int
    mlp_ratio: int = 4
    patch_size: int = 16
    position_size: tuple[int, int] = (224, 224)
    pool: str = "token"
    distilled: bool = False
    token_reducer: Any = None
    drop_path: float = 0.0
    dropout: float = 0.0
    remat: bool = False
    dtype: Any = jnp.float32
    axis_name: str | None = None

    def setup(self):
        self._check()
        side = (self.patch_size, self.patch_size)
        self.patches = nn.Conv(
            self.dim, side, side, "VALID", dtype=self.dtype, kernel_init=linear_init
        )
        names = ["class_token", "distillation_token"][: 1 + self.distilled]
        self.front = [self.param(name, linear_init, (1, self.dim)) for name in names]
        rows, columns = self._grid(*self.position_size)
        # Of the tokens in front, then of the patches, row by row.
        shape = (1 + self.distilled + rows * columns, self.dim)
        self.position = self.param("position", linear_init, shape)
        cls = nn.remat(Block, static_argnums=(3,)) if self.remat else Block
        reducer = make_reducer(self.token_reducer, self.depth)
        self.blocks = [
            cls(
                self.num_heads, self.mlp_ratio, self.drop_path * i / max(self.depth - 1, 1),
                self.dtype, self.axis_name, 1 + self.distilled, reducer,
                None if reducer is None else reducer.keep[i],
            )
            for i in range(self.depth)
        ]  # fmt: skip
        self.norm = nn.LayerNorm(1e-6, dtype=self.dtype)
        self.head_dropout = Dropout(self.dropout, self.axis_name)
        self.classifier = dense(self.num_classes, jnp.float32)
        if self.distilled:
            self.distillation_classifier = dense(self.num_classes, jnp.float32)

    def _check(self):
        if self.pool not in POOLS:
            raise UserError(f"pool={self.pool!r} is not valid; valid: {', '.join(POOLS)}")
        if self.distilled and self.pool != "token":
            raise UserError(f"distilled=True needs pool='token', not {self.pool!r}")
        if self.token_reducer and self.pool == "mean":
            raise UserError("token_reducer goes with pool='token', not 'mean'")
        if self.patch_size < 1:
            raise UserError(f"patch_size={self.patch_size} is not valid; valid: at least 1 pixel")

    def _grid(self, height, width):
        return -(-height // self.patch_size), -(-width // self.patch_size)

    def tokens(self, images: jax.Array, train: bool) -> jax.Array:
        """Returns the tokens after the last block, class and distillation token in front.

        (B, T, C): T is the number of patches that are left plus 1, or 2 if distilled.

        Args:
          images: (B, H, W, 3) float, H and W from 32.
          train: whether dropout behaves as in training.
        """
        check_images(images)
        batch, height, width, _ = images.shape
        grid = self._grid(height, width)
        padding = [
            (0, n * self.patch_size - size) for n, size in zip(grid, (height, width), strict=True)
        ]
        x = jnp.pad(images.astype(self.dtype), ((0, 0), *padding, (0, 0)))
        x = self.patches(x).reshape(batch, -1, self.dim)
        front = [jnp.broadcast_to(token, (batch, 1, self.dim)) for token in self.front]
        x = jnp.concatenate([*front, x], 1).astype(self.dtype)
        x = x + self._positions(grid).astype(self.dtype)
        size = jnp.ones(x.shape[:2], jnp.float32)
        for block in self.blocks:
            x, size = block(x, size, train)
        return x

    def _positions(self, grid):
        """Returns the position embeddings (T, C) of a map of ``grid`` patches."""
        trained = self._grid(*self.position_size)
        if grid == trained:
            return self.position
        front, patches = jnp.split(self.position, [1 + self.distilled])
        patches = patches.reshape(*trained, self.dim)
        patches = jax.image.resize(patches, (*grid, self.dim), "bicubic", antialias=True)
        return jnp.concatenate([front, patches.reshape(-1, self.dim)])

    def features(self, images: jax.Array, train: bool) -> list[jax.Array]:
        """Returns one map (B, ceil(H / patch_size), ceil(W / patch_size), C), normed.

        Args:
          images: (B, H, W, 3) float, H and W from 32.
          train: whether dropout behaves as in training.

        Raises:
          UserError: the model reduces its tokens.
        """
        if self.token_reducer:
            raise UserError("token_reducer: reduced tokens are no map; valid: None")
        x = self.norm(self.tokens(images, train)[:, 1 + self.distilled :])
        return [x.reshape(len(x), *self._grid(*images.shape[1:3]), self.dim)]

    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Returns the logits (B, num_classes) in float32."""
        x = self.tokens(images, train)
        if self.pool == "mean":
            return self._classify(self.classifier, self.norm(x[:, 1:].mean(1)), train)
        x = self.norm(x[:, : 1 + self.distilled])
        logits = self._classify(self.classifier, x[:, 0], train)
        if not self.distilled:
            return logits
        return (logits + self._classify(self.distillation_classifier, x[:, 1], train)) / 2

    def _classify(self, classifier, x, train):
        return classifier(self.head_dropout(x, train).astype(jnp.float32))


@register
def deit_ti(**kwargs) -> VisionTransformer:
    return VisionTransformer(**{"dim": 192, "num_heads": 3} | kwargs)


@register
def deit_s(**kwargs) -> VisionTransformer:
    return VisionTransformer(**{"dim": 384, "num_heads": 6} | kwargs)


@register
def deit_e318(**kwargs) -> VisionTransformer:
    return VisionTransformer(**{"dim": 318, "num_heads": 6} | kwargs)


@register
def deit_e252(**kwargs) -> VisionTransformer:
    return VisionTransformer(**{"dim": 252, "num_heads": 6} | kwargs)


@register
def deit_b(**kwargs) -> VisionTransformer:
    return VisionTransformer(**{"dim": 768, "num_heads": 12} | kwargs)


@register
def vit_ti(**kwargs) -> VisionTransformer:
    return VisionTransformer(**{"dim": 192, "num_heads": 3} | kwargs)


@register
def vit_s(**kwargs) -> VisionTransformer:
    return VisionTransformer(**{"dim": 384, "num_heads": 6} | kwargs)


@register
def vit_b(**kwargs) -> VisionTransformer:
    return VisionTransformer(**{"dim": 768, "num_heads": 12} | kwargs)


@register
def vit_l(**kwargs) -> VisionTransformer:
    return VisionTransformer(**{"dim": 1024, "depth": 24, "num_heads": 16} | kwargs)


@register
def vit_h(**kwargs) -> VisionTransformer:
    return VisionTransformer(
        **{"dim": 1280, "depth": 32, "num_heads": 16, "patch_size": 14} | kwargs
    )
