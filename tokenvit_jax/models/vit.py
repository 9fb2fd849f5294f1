"""Vision transformers with one map of tokens: ViT (Dosovitskiy et al. 2021), DeiT (Touvron 2021).

The parameters and the order of the operations are those of timm's models of the same names.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import truncated_normal

from tokenvit_jax.errors import UserError
from tokenvit_jax.layers import Attention, Dropout, DropPath, Mlp, dense
from tokenvit_jax.layers.stochastic import image_keys
from tokenvit_jax.models import reducers
from tokenvit_jax.models.expedite import Expedite
from tokenvit_jax.models.reducers import Patches, TokenReducer
from tokenvit_jax.models.registry import check_images, register
from tokenvit_jax.models.settings import read_settings

POOLS = ("token", "mean")
QK_NORMS = ("none", "fixed", "learned")
# Method of `jax.image.resize` -> whether it is antialiased.
POSITION_RESIZES = {"bicubic": True, "bilinear": False}


class Encoded(NamedTuple):
    """Tokens after the last block (B, T, C), and what makes (B, N, D) of all patches of what a head
    makes of those that are left, (B, n, D).
    """

    tokens: jax.Array
    restore: Callable[[jax.Array], jax.Array]


def _same(x):
    return x


class Origin(NamedTuple):
    """What the tokens of a block stand for.

    Attributes:
      size: patches of the image (B, T).
      home: for each patch of the image the token that stands for it (B, N) int32, counted without
        those in front; None: nobody will ask.
    """

    size: jax.Array
    home: jax.Array | None


class Block(nn.Module):
    """x + attention(LN(x)), the reducer, x + MLP(LN(x)): (B, T, C) -> (B, T', C).

    Attributes, beside those of :class:`VisionTransformer`:
      number: of the block, from 0.
      num_front: tokens in front of the patches, which are never reduced.
      num_trained: patches of the images that the position embeddings fit.
    """

    num_heads: int
    mlp_ratio: int
    qk_norm: str
    norm_epsilon: float
    init_std: float
    drop_path: float
    dtype: Any
    axis_name: str | None
    number: int
    num_front: int
    num_trained: int
    reducer: TokenReducer | None

    @nn.compact
    def __call__(
        self, x: jax.Array, origin: Origin, grid: tuple[int, int], train: bool
    ) -> tuple[jax.Array, Origin]:
        """Computes the block.

        Args:
          x: tokens (B, T, C).
          origin: what they stand for.
          grid: rows and columns of the map of patches, while they are one.
          train: whether dropout behaves as in training.

        Returns:
          Tokens that go on, and what they stand for.
        """
        reducer = self.reducer

        def norm(x, name):
            return nn.LayerNorm(self.norm_epsilon, dtype=self.dtype, name=name)(x)

        def drop(y):
            return DropPath(self.drop_path, self.axis_name)(y, train)

        attention = Attention(
            self.num_heads, self.qk_norm, self.init_std, self.dtype, name="attention"
        )
        acts = reducer is not None and reducer.acts(self.number, x.shape[1] - self.num_front)
        attended = attention(
            norm(x, "norm1"),
            scored_by=reducer.scored_by if acts else None,
            diagonal=reducer is None or reducer.diagonal,
            size=origin.size if reducer is not None and reducer.carry else None,
        )
        x = x + drop(attended.y)
        if acts:
            x, origin = self._reduce(x, attended, origin, grid, train)
        mlp = Mlp(self.mlp_ratio, self.dtype, truncated_normal(self.init_std), name="mlp")
        return x + drop(mlp(norm(x, "norm2"))), origin

    def _reduce(self, x, attended, origin, grid, train):
        tokens = Patches(x, attended.received, attended.keys, origin.size)
        home = origin.home
        front = jax.tree.map(lambda t: t[:, : self.num_front], tokens)
        patches = jax.tree.map(lambda t: t[:, self.num_front :], tokens)
        match self.reducer.method:
            case reducers.CONVOLUTION:
                x = reducers.HalveMap(self.dtype, name="halve_map")(patches.x, grid)
                size = jnp.ones(x.shape[:2], origin.size.dtype)
            case reducers.SEARCH:
                extract = reducers.SoftExtract(self.num_trained, name=reducers.SEARCH)
                x, size = extract(patches.x, patches.score), patches.size
            case _:
                num_kept = self.reducer.keep[self.number]
                if num_kept == 0:
                    return front.x, Origin(front.size, None)
                if train:
                    rngs = image_keys(self.make_rng("routing"), len(x), self.axis_name)
                else:  # what an image gives depends neither on its place in the batch nor on chance
                    rngs = jnp.broadcast_to(jax.random.key(self.number), len(x))
                x, size, new_home = reducers.reduce_tokens(
                    patches, num_kept, self.reducer, rngs, restorable=home is not None
                )
                if home is not None:
                    home = reducers.take(new_home, home)
        size = jnp.concatenate([front.size, size], 1)
        return jnp.concatenate([front.x, x], 1), Origin(size, home)


class VisionTransformer(nn.Module, kw_only=True):
    """Vision transformer for images (B, H, W, 3) of any size from 32 x 32.

    Images are padded with zeros below and on the right to whole patches; the position embeddings
    are resized where the map is not that of ``position_size``.

    Attributes:
      num_classes: of the classifier.
      dim: C, channels.
      depth: blocks.
      num_heads: heads of every block.
      mlp_ratio: expansion of the MLP.
      patch_size: side of a patch, pixels.
      position_size: height and width of the images whose map the position embeddings fit.
      position_resize: how they are resized: "bicubic", with antialiasing, as timm does, or
        "bilinear" without, as Segmenter (Strudel et al. 2021).
      pool: what is classified: the class "token" after the last LayerNorm, or the LayerNorm of the
        "mean" of the patches.
      distilled: with a distillation token beside the class token, and a classifier of its own
        (DeiT); the logits are the mean of both.
      token_reducer: reduces the patches between attention and MLP of the blocks: a
        :class:`TokenReducer` or its attributes by name; None: all patches stay.
      expedite: clusters the patches after some blocks and reconstructs them after others: an
        :class:`Expedite` or its attributes by name; None: all patches go through all blocks.
      qk_norm: of queries and keys: "none", "fixed" or "learned", see :class:`Attention`.
      norm_epsilon: of every LayerNorm: 1e-6 in the published classifiers, 1e-5 in Segmenter.
      init_std: standard deviation of the first weights: 0.02 in the published models, with which
        narrow ones (C = 64) hardly begin to learn; 1 / sqrt(C) suits them.
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
    position_resize: str = "bicubic"
    pool: str = "token"
    distilled: bool = False
    token_reducer: Any = None
    expedite: Any = None
    qk_norm: str = "none"
    norm_epsilon: float = 1e-6
    init_std: float = 0.02
    drop_path: float = 0.0
    dropout: float = 0.0
    remat: bool = False
    dtype: Any = jnp.float32
    axis_name: str | None = None

    def __post_init__(self):
        # Attributes by name would make a module that cannot be hashed.
        self.token_reducer = read_settings(
            TokenReducer, "token_reducer", self.token_reducer, self.depth
        )
        self.expedite = read_settings(Expedite, "expedite", self.expedite, self.depth)
        super().__post_init__()

    def setup(self):
        self._check()
        side, init = (self.patch_size, self.patch_size), truncated_normal(self.init_std)
        self.patches = nn.Conv(self.dim, side, side, "VALID", dtype=self.dtype, kernel_init=init)
        names = ["class_token", "distillation_token"][: 1 + self.distilled]
        self.front = [self.param(name, init, (1, self.dim)) for name in names]
        rows, columns = self._grid(*self.position_size)
        # Of the tokens in front, then of the patches, row by row.
        shape = (1 + self.distilled + rows * columns, self.dim)
        self.position = self.param("position", init, shape)
        cls = nn.remat(Block, static_argnums=(3, 4)) if self.remat else Block
        self.blocks = [
            cls(
                self.num_heads, self.mlp_ratio, self.qk_norm, self.norm_epsilon, self.init_std,
                self.drop_path * i / max(self.depth - 1, 1), self.dtype, self.axis_name, i,
                1 + self.distilled, rows * columns, self.token_reducer,
            )
            for i in range(self.depth)
        ]  # fmt: skip
        self.norm = nn.LayerNorm(self.norm_epsilon, dtype=self.dtype)
        self.head_dropout = Dropout(self.dropout, self.axis_name)
        self.classifier = dense(self.num_classes, jnp.float32, init=init)
        if self.distilled:
            self.distillation_classifier = dense(self.num_classes, jnp.float32, init=init)

    def _check(self):
        choices = {"pool": POOLS, "qk_norm": QK_NORMS, "position_resize": POSITION_RESIZES}
        for name, valid in choices.items():
            if (value := getattr(self, name)) not in valid:
                raise UserError(f"{name}={value!r} is not valid; valid: {', '.join(valid)}")
        if self.distilled and self.pool != "token":
            raise UserError(f"distilled=True needs pool='token', not {self.pool!r}")
        if self.token_reducer and self.pool == "mean":
            raise UserError("token_reducer goes with pool='token', not 'mean'")
        if self.token_reducer and self.expedite:
            raise UserError("expedite goes with token_reducer=None")
        if self.patch_size < 1:
            raise UserError(f"patch_size={self.patch_size} is not valid; valid: at least 1 pixel")
        if not self.norm_epsilon > 0:
            raise UserError(f"norm_epsilon={self.norm_epsilon} is not valid; valid: above 0")

    def _grid(self, height, width):
        return -(-height // self.patch_size), -(-width // self.patch_size)

    @property
    def dense_stride(self) -> int:
        """Pixels from one place of the map of :meth:`dense` to the next."""
        return self.patch_size

    def tokens(self, images: jax.Array, train: bool) -> jax.Array:
        """Returns the tokens after the last block, class and distillation token in front.

        (B, T, C): T is the number of patches that are left plus 1, or 2 if distilled.

        Args:
          images: (B, H, W, 3) float, H and W from 32.
          train: whether dropout behaves as in training.
        """
        return self._encode(images, train).tokens

    def _encode(self, images, train, restorable=False):
        check_images(images)
        grid = self._grid(*images.shape[1:3])
        if self.expedite is not None:
            return self._expedited(images, grid, train)
        return self._run(self.blocks, self._embed(images, grid), grid, train, restorable)

    def _embed(self, images, grid):
        """Patches, tokens in front of them and positions: (B, T, C)."""
        batch, *sizes, _ = images.shape
        padding = [(0, n * self.patch_size - size) for n, size in zip(grid, sizes, strict=True)]
        x = jnp.pad(images.astype(self.dtype), ((0, 0), *padding, (0, 0)))
        x = self.patches(x).reshape(batch, -1, self.dim)
        front = [jnp.broadcast_to(token, (batch, 1, self.dim)) for token in self.front]
        x = jnp.concatenate([*front, x], 1).astype(self.dtype)
        return x + self._positions(grid).astype(self.dtype)

    def _run(self, blocks, x, grid, train, restorable=False):
        home = None
        if restorable and self.token_reducer is not None:
            num_patches = x.shape[1] - 1 - self.distilled
            own = jnp.arange(num_patches, dtype=jnp.int32)
            home = jnp.broadcast_to(own, (len(x), num_patches))
        origin = Origin(jnp.ones(x.shape[:2], jnp.float32), home)
        for block in blocks:
            x, origin = block(x, origin, grid, train)
            if self.token_reducer is not None and self.token_reducer.halves(block.number):
                grid = (grid[0] // 2, grid[1] // 2)
        if origin.home is None:
            return Encoded(x, _same)
        return Encoded(x, functools.partial(reducers.take, index=origin.home))

    def _expedited(self, images, grid, train):
        """Blocks on all patches, on the centres of clusters of them, and on all again."""
        expedite, num_front = self.expedite, 1 + self.distilled
        expedite.check_grid(grid)
        first, last = expedite.alpha, expedite.alpha + expedite.beta
        if first == 0:
            x = self._embed(expedite.shrink(images, self.patch_size), expedite.clusters)
            restore = functools.partial(expedite.enlarge, grid=grid)
        else:
            x = self._run(self.blocks[:first], self._embed(images, grid), grid, train).tokens
            patches = x[:, num_front:]
            centers = expedite.cluster(patches, grid)
            x = jnp.concatenate([x[:, :num_front], centers], 1)
            restore = functools.partial(expedite.reconstruct, patches, centers, grid=grid)
        x = self._run(self.blocks[first:last], x, expedite.clusters, train).tokens
        if expedite.where == "logits":
            return Encoded(x, restore)
        x = jnp.concatenate([x[:, :num_front], restore(x[:, num_front:])], 1)
        return self._run(self.blocks[last:], x, grid, train)

    def _positions(self, grid):
        """Returns the position embeddings (T, C) of a map of ``grid`` patches."""
        trained = self._grid(*self.position_size)
        if grid == trained:
            return self.position
        front, patches = jnp.split(self.position, [1 + self.distilled])
        patches = patches.reshape(*trained, self.dim)
        method = self.position_resize
        patches = jax.image.resize(
            patches, (*grid, self.dim), method, antialias=POSITION_RESIZES[method]
        )
        return jnp.concatenate([front, patches.reshape(-1, self.dim)])

    def dense(
        self, images: jax.Array, train: bool, head: Callable[[jax.Array], jax.Array]
    ) -> jax.Array:
        """Returns the map (B, ceil(H / patch_size), ceil(W / patch_size), D) of a head.

        Where ``token_reducer`` reduces, a patch of the image gets what is made of the token that
        stands for it after all blocks: that of its cluster, or the nearest one that was kept.

        Args:
          images: (B, H, W, 3) float, H and W from 32.
          train: whether dropout behaves as in training.
          head: what is computed from the normed patches, (B, n, C) -> (B, n, D); where ``expedite``
            reconstructs logits it sees the centres, where ``token_reducer`` reduces the tokens
            that are left.

        Raises:
          UserError: the reducer convolves, or leaves no patch.
        """
        if self.token_reducer is not None:
            self.token_reducer.check_map()
        tokens, restore = self._encode(images, train, restorable=True)
        y = restore(head(self.norm(tokens[:, 1 + self.distilled :])))
        return y.reshape(len(y), *self._grid(*images.shape[1:3]), -1)

    def features(self, images: jax.Array, train: bool) -> list[jax.Array]:
        """Returns one map (B, ceil(H / patch_size), ceil(W / patch_size), C), normed.

        Arguments and errors are those of :meth:`dense`.
        """
        return [self.dense(images, train, _same)]

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
