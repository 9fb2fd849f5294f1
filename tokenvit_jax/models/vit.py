"""Vision transformers with one map of tokens: ViT (Dosovitskiy et al. 2021), DeiT (Touvron 2021).

Parameters and the order of operations match timm's models of the same names. Settings add what
DINOv2 (Oquab et al. 2023; registers: Darcet et al. 2024) and the image towers of CLIP (Radford et
al. 2021) have in addition.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import truncated_normal

from tokenvit_jax import ops
from tokenvit_jax.errors import UserError
from tokenvit_jax.layers import (
    ACTIVATIONS,
    AddLayerNorm,
    Attention,
    Dropout,
    DropPath,
    LayerNorm,
    Mlp,
    dense,
)
from tokenvit_jax.layers.self_attention import WEIGHTS
from tokenvit_jax.layers.stochastic import image_keys
from tokenvit_jax.models import reducers
from tokenvit_jax.models.backbone import Backbone, Encoded, Tap, Variables
from tokenvit_jax.models.expedite import Expedite, auto_temperature
from tokenvit_jax.models.reducers import Kept, Patches, TokenReducer
from tokenvit_jax.models.settings import (
    BLOCKS,
    CHANNELS,
    EXPANSION,
    HEADS,
    SIDE,
    BackboneSettings,
    Part,
    Rules,
    check_heads,
)
from tokenvit_jax.ops.gather import take
from tokenvit_jax.ops.resize import resize_bicubic
from tokenvit_jax.ops.windows import pad_to_windows
from tokenvit_jax.valid import Flag, Number, OneOf, Several, ZeroOr, whole

POOLS = ("token", "mean")
QK_NORMS = ("none", "fixed", "learned")
POSITION_RESIZES = ("bicubic_antialias", "bicubic", "bilinear")
MOST_POSITIONS = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTSettings(BackboneSettings):
    """Settings of a plain vision transformer; the common ones are in :class:`BackboneSettings`.

    Attributes:
      dim: C, number of channels.
      depth: number of blocks.
      num_heads: number of attention heads of every block.
      mlp_ratio: expansion of the MLP.
      patch_size: side of a patch [pixels].
      position_size: height and width of the images whose map fits the position embeddings [pixels].
      position_resize: how position embeddings are resized: "bicubic_antialias" as in timm;
        "bicubic" without antialiasing as in DINOv2; "bilinear" without antialiasing as in Segmenter
        (Strudel et al. 2021).
      front_position: whether the tokens in front of the patches have position embeddings, too.
        Registers never have.
      num_registers: number of registers, learnt tokens between the class token and the patches.
      pre_norm: whether a LayerNorm precedes the blocks.
      patch_bias: whether the patch embedding has a bias.
      layer_scale: initial value of a factor per channel on the output of attention and MLP
        (Touvron et al. 2021, "Going deeper with Image Transformers"); 0: no factors.
      activation: activation of the MLP, "gelu" or "quick_gelu" (x times sigmoid of 1.702 x).
      projection: channels of a linear layer without bias between the last LayerNorm and the
        classifier; 0: no such layer.
      pool: what is classified: the class "token" after the last LayerNorm, or the LayerNorm of the
        "mean" of the patches.
      distilled: whether to add a distillation token with its own classifier (DeiT); the logits are
        then the mean of both classifiers.
      token_reducer: a :class:`TokenReducer` or its attributes by name, which reduces the patches
        between attention and MLP of the blocks ("dynamicvit": before attention); None: all patches
        stay.
      expedite: an :class:`Expedite` or its attributes by name, which clusters the patches after
        some blocks and reconstructs them after others; None: all patches go through all blocks.
      qk_norm: normalisation of queries and keys: "none", "fixed" or "learned", see
        :class:`Attention`.
      norm_epsilon: epsilon of every LayerNorm: 1e-6 in the published classifiers, 1e-5 in
        Segmenter.
      init_std: standard deviation of the initial weights: 0.02 in the published models. Narrow
        models (C = 64) hardly begin to learn with 0.02; 1 / sqrt(C) suits them.
    """

    parts: ClassVar[Mapping[str, type]] = {"token_reducer": TokenReducer, "expedite": Expedite}

    valid: ClassVar[Rules] = {
        "dim": CHANNELS,
        "depth": whole(1, BLOCKS),
        "num_heads": HEADS,
        "mlp_ratio": EXPANSION,
        "patch_size": whole(1, 1024),
        "position_size": Several(SIDE, 2),
        "position_resize": OneOf(POSITION_RESIZES),
        "front_position": Flag(),
        "num_registers": whole(0, 4096),
        "pre_norm": Flag(),
        "patch_bias": Flag(),
        "layer_scale": ZeroOr(Number(1e-12, 100)),
        "activation": OneOf(tuple(ACTIVATIONS)),
        "projection": whole(0, 2**16),
        "pool": OneOf(POOLS),
        "distilled": Flag(),
        "token_reducer": Part(TokenReducer),
        "expedite": Part(Expedite),
        "qk_norm": OneOf(QK_NORMS),
        "norm_epsilon": Number(1e-12, 1),
        "init_std": Number(1e-8, 10),
    }

    dim: int
    depth: int = 12
    num_heads: int
    mlp_ratio: int = 4
    patch_size: int = 16
    position_size: tuple[int, int] = (224, 224)
    position_resize: str = "bicubic_antialias"
    front_position: bool = True
    num_registers: int = 0
    pre_norm: bool = False
    patch_bias: bool = True
    layer_scale: float = 0.0
    activation: str = "gelu"
    projection: int = 0
    pool: str = "token"
    distilled: bool = False
    token_reducer: Any = None
    expedite: Any = None
    qk_norm: str = "none"
    norm_epsilon: float = 1e-6
    init_std: float = 0.02

    @property
    def num_blocks(self) -> int:
        return self.depth

    @property
    def num_front(self) -> int:
        """Number of tokens before the patches: class token, distillation token and registers."""
        return self.num_classified + self.num_registers

    @property
    def num_classified(self) -> int:
        """Number of tokens that have a classifier: class token and distillation token."""
        return 1 + self.distilled

    @property
    def num_positioned(self) -> int:
        """Number of position embeddings before the patches'."""
        return self.num_classified if self.front_position else 0

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Returns the rows and columns of patches of an image whose size is in pixels."""
        return -(-height // self.patch_size), -(-width // self.patch_size)

    def check_relations(self) -> None:
        check_heads(self.num_heads, self.dim, f"dim={self.dim}")
        for part in filter(None, (self.token_reducer, self.expedite)):
            part.check(self.depth)
        if self.distilled and self.pool != "token":
            raise UserError(f"pool={self.pool!r} is not valid with distilled=True; valid: 'token'")
        if self.token_reducer and self.pool == "mean":
            raise UserError("pool='mean' is not valid with a token_reducer; valid: 'token'")
        if self.token_reducer and self.expedite:
            raise UserError("expedite is not valid with a token_reducer; valid: one of the two")
        longest, rows_columns = max(self.position_size), self.grid(*self.position_size)
        if self.patch_size > longest:
            raise UserError(
                f"patch_size={self.patch_size} is not valid with position_size="
                f"{self.position_size}; valid: 1 to {longest}"
            )
        if math.prod(rows_columns) > MOST_POSITIONS:
            raise UserError(
                f"position_size={self.position_size} has {math.prod(rows_columns)} patches with "
                f"patch_size={self.patch_size}; valid: at most {MOST_POSITIONS}"
            )


_TINY = ViTSettings(dim=192, num_heads=3)
_SMALL = ViTSettings(dim=384, num_heads=6)
_BASE = ViTSettings(dim=768, num_heads=12)

SIZES = {
    "deit_ti": _TINY,
    "deit_s": _SMALL,
    "deit_e318": ViTSettings(dim=318, num_heads=6),
    "deit_e252": ViTSettings(dim=252, num_heads=6),
    "deit_b": _BASE,
    "vit_ti": _TINY,
    "vit_s": _SMALL,
    "vit_b": _BASE,
    "vit_l": ViTSettings(dim=1024, depth=24, num_heads=16),
    "vit_h": ViTSettings(dim=1280, depth=32, num_heads=16, patch_size=14),
}


def resize_positions(
    table: jax.Array,
    num_front: int,
    trained: tuple[int, int],
    grid: tuple[int, int],
    method: str,
) -> jax.Array:
    """Returns position embeddings for a map of another size.

    Args:
      table: (num_front + rows * columns, C) for a map of ``trained`` (rows, columns).
      num_front: number of tokens in front of the patches, whose embeddings stay as they are.
      trained: rows and columns of the map that the table is for.
      grid: rows and columns of the new map.
      method: one of :data:`POSITION_RESIZES`.

    Returns:
      (num_front + grid[0] * grid[1], C).
    """
    if grid == trained:
        return table
    front, patches = jnp.split(table, [num_front])
    patches = patches.reshape(*trained, -1)
    shape = (*grid, patches.shape[-1])
    if method == "bicubic":
        patches = resize_bicubic(patches, grid)
    else:
        kind, antialias = method.removesuffix("_antialias"), method.endswith("_antialias")
        patches = jax.image.resize(patches, shape, kind, antialias=antialias)
    return jnp.concatenate([front, patches.reshape(-1, shape[-1])])


class Origin(NamedTuple):
    """Which patches the tokens of a block stand for.

    Attributes:
      size: number of patches that each token stands for (B, T).
      home: the token that stands for each patch of the image (B, N) int32, counted without the
        tokens in front; None: not recorded, because no map is needed.
      before: what reconstructs the patches instead, after the first reduction; None: ``home``.
      kept: which patches are left in training with "dynamicvit", where all tokens stay in the
        sequence; None: all. It has its own way back to the map.
    """

    size: jax.Array
    home: jax.Array | None
    before: "Before | None" = None
    kept: Kept | None = None

    def restore(self, tokens: jax.Array, neighbors: int = 1) -> jax.Array:
        """Maps the remaining tokens (B, n, D) back to all patches (B, N, D).

        Args:
          tokens: values of the remaining tokens (B, n, D).
          neighbors: number of tokens from which a patch is reconstructed, if there is ``before``.
        """
        if self.before is not None:
            patches, remaining, temperature = self.before
            return ops.reconstruct_tokens(
                patches, remaining, tokens, neighbors=neighbors, temperature=temperature
            )
        if self.kept is not None:
            return self.kept.restore(tokens)
        return tokens if self.home is None else take(tokens, self.home)


class Before(NamedTuple):
    """The tokens before the first reduction, from whose distances a map is reconstructed.

    Attributes:
      patches: all patches (B, N, C).
      remaining: the patches that are left (B, n, C); a fused token is fused here, too.
      temperature: tau of the softmax, for each map (B,).
    """

    patches: jax.Array
    remaining: jax.Array
    temperature: jax.Array


class Block(nn.Module):
    """x + attention(LN(x)), the reducer, x + MLP(LN(x)): (B, T, C) -> (B, T', C).

    The predictor of "dynamicvit" comes first. Layer scale multiplies the outputs of attention and
    MLP.

    Attributes:
      settings: the architecture.
      index: number of the block, from 0.
    """

    settings: ViTSettings
    index: int

    @nn.compact
    def __call__(
        self, x: jax.Array, origin: Origin, grid: tuple[int, int], train: bool
    ) -> tuple[jax.Array, Origin]:
        """Computes the block.

        Args:
          x: tokens (B, T, C).
          origin: the patches that the tokens stand for.
          grid: rows and columns of the map of patches, as long as the patches form one.
          train: whether stochastic depth and routing behave as in training.

        Returns:
          The remaining tokens, and the patches that they stand for.
        """
        settings, reducer = self.settings, self.settings.token_reducer
        init = truncated_normal(settings.init_std)

        def norm(name):
            return AddLayerNorm(settings.norm_epsilon, settings.dtype, name=name)

        def drop(y, name):
            if settings.layer_scale:
                scale = nn.initializers.constant(settings.layer_scale)
                y = y * self.param(name, scale, (settings.dim,)).astype(y.dtype)
            return DropPath(settings.drop_path_of(self.index), settings.axis_name)(y, train)

        attention = Attention(
            settings.num_heads, settings.qk_norm, settings.init_std, settings.dtype,
            name="attention",
        )  # fmt: skip
        predicts = reducer is not None and reducer.predicts(
            self.index, math.prod(settings.grid(*settings.position_size))
        )
        if predicts:
            x, origin = self._predict(x, origin, grid, train)
        acts = (
            reducer is not None
            and reducer.method != reducers.DYNAMICVIT
            and reducer.acts(self.index, x.shape[1] - settings.num_front)
        )
        clusters_queries = acts and reducer.method == reducers.ACT
        carries = reducer is not None and (reducer.carry or origin.kept is not None)
        x, y = norm("norm1")(x)
        attended = attention(
            y,
            scored_by=reducer.scored_by if acts else None,
            diagonal=reducer is None or reducer.diagonal,
            size=origin.size if carries else None,
            prototypes=reducer.keep[self.index] if clusters_queries else None,
            num_alone=settings.num_front,
        )
        branch = drop(attended.y, "scale1")
        if acts and not clusters_queries:
            x = x + branch
            tokens = Patches(x, attended.received, attended.keys, origin.size)
            x, origin = self._reduce(tokens, origin, grid, train)
            branch = None
        x, y = norm("norm2")(x, branch)
        mlp = Mlp(settings.mlp_ratio, settings.dtype, init, settings.activation, name="mlp")
        return x + drop(mlp(y), "scale2"), origin

    def _predict(self, x, origin, grid, train):
        """Drops the patches that the predictor does not keep; in training it masks them."""
        settings, reducer = self.settings, self.settings.token_reducer
        patches = x[:, settings.num_front :]
        left = jnp.ones(patches.shape[:2]) if origin.kept is None else origin.kept.policy
        init = truncated_normal(settings.init_std)
        predictor = reducers.KeepPredictor(settings.dtype, init, name="keep_predictor")
        scores = predictor(patches, left)
        num_kept, num_patches = reducer.keep[self.index], patches.shape[1]
        if num_kept >= num_patches:  # a smaller image
            return x, origin
        if not train:
            scores = jnp.pad(scores[..., 0], ((0, 0), (settings.num_front, 0)))
            return self._reduce(Patches(x, scores, None, origin.size), origin, grid, train)
        policy = reducers.sample_kept(scores, left, self._routing_keys(x.shape[0], train))
        penalty = reducer.penalty_of(self.index)
        if penalty is not None and not self.is_initializing():
            loss = reducers.ratio_loss(policy, num_kept / num_patches)
            self.sow("losses", "ratio", penalty * loss)
        home = origin.home
        if home is not None:
            home = take(reducers.nearest_kept(patches, policy), home)
        size = reducers.DROPPED + (1 - reducers.DROPPED) * policy
        size = jnp.concatenate([origin.size[:, : settings.num_front], size], 1)
        return x, Origin(size, home, kept=Kept(policy, home))

    def _reduce(self, tokens, origin, grid, train):
        """Reduces the patches; ``tokens`` also has the tokens in front."""
        settings, reducer = self.settings, self.settings.token_reducer
        home, before = origin.home, origin.before
        front = jax.tree.map(lambda t: t[:, : settings.num_front], tokens)
        patches = jax.tree.map(lambda t: t[:, settings.num_front :], tokens)
        match reducer.method:
            case reducers.CONVOLUTION:
                x = reducers.HalveMap(settings.dtype, name="halve_map")(patches.x, grid)
                size = jnp.ones(x.shape[:2], origin.size.dtype)
            case reducers.SEARCH:
                rows, columns = settings.grid(*settings.position_size)
                extract = reducers.SoftExtract(
                    rows * columns, reducer.penalty_of(self.index), name=reducers.SEARCH
                )
                x, size = extract(patches.x, patches.score, train), patches.size
            case _:
                num_kept = reducer.keep[self.index]
                if num_kept == 0:
                    return front.x, Origin(front.size, None)
                if home is not None and reducer.neighbors > 1:
                    before = before or self._before(patches.x, grid)
                    joined = jnp.concatenate([patches.x, before.remaining], -1)
                    patches = patches._replace(x=joined)
                x, size, new_home = reducers.reduce_tokens(
                    patches, num_kept, reducer, self._routing_keys(tokens.x.shape[0], train),
                    restorable=home is not None and before is None,
                )  # fmt: skip
                if before is not None:
                    x, remaining = jnp.split(x, 2, -1)
                    before = before._replace(remaining=remaining)
                elif home is not None:
                    home = take(new_home, home)
        size = jnp.concatenate([front.size, size], 1)
        return jnp.concatenate([front.x, x], 1), Origin(size, home, before)

    def _before(self, patches, grid):
        maps = patches.reshape(patches.shape[0], *grid, patches.shape[-1])
        return Before(patches, patches, auto_temperature(maps))

    def _routing_keys(self, batch, train):
        if train:
            return image_keys(self.make_rng("routing"), batch, self.settings.axis_name)
        # The result of an image must depend neither on its place in the batch nor on chance.
        return jnp.broadcast_to(jax.random.key(self.index), batch)


class VisionTransformer(Backbone):
    """Vision transformer for images (B, H, W, 3) of any size from 32 x 32.

    Images are padded with zeros below and on the right to whole patches; the position embeddings
    are resized if the map differs from the map of ``position_size``.
    """

    settings: ViTSettings

    head_modules = ("classifier", "distillation_classifier")
    first_layer = "patches"
    optional_parameters = (*reducers.OPTIONAL_PARAMETERS, "attention/alpha")

    def setup(self):
        settings = self.settings
        side, init = (settings.patch_size, settings.patch_size), truncated_normal(settings.init_std)
        self.patches = nn.Conv(
            settings.dim, side, side, "VALID", dtype=settings.dtype, kernel_init=init,
            use_bias=settings.patch_bias,
        )  # fmt: skip
        names = ["class_token", "distillation_token"][: settings.num_classified]
        self.front = [self.param(name, init, (1, settings.dim)) for name in names]
        if settings.num_registers:
            shape = (settings.num_registers, settings.dim)
            self.registers = self.param("register_token", init, shape)
        rows, columns = settings.grid(*settings.position_size)
        # The tokens in front, then the patches row by row.
        shape = (settings.num_positioned + rows * columns, settings.dim)
        self.position = self.param("position", init, shape)
        if settings.pre_norm:
            self.pre_norm = LayerNorm(settings.norm_epsilon, settings.dtype)
        cls = nn.remat(Block, static_argnums=(3, 4)) if settings.remat else Block
        self.blocks = [cls(settings, index) for index in range(settings.depth)]
        self.norm = LayerNorm(settings.norm_epsilon, settings.dtype)
        if settings.projection:
            self.projection = dense(settings.projection, settings.dtype, init=init, use_bias=False)
        self.head_dropout = Dropout(settings.dropout, settings.axis_name)
        self.classifier = self.make_classifier(init)
        if settings.distilled:
            self.distillation_classifier = self.make_classifier(init)

    @property
    def strides(self) -> tuple[int, ...]:
        """The only stride: the side of a patch [pixels]."""
        return (self.settings.patch_size,)

    @nn.nowrap
    def layer_of(self, path: str) -> int:
        """Returns 0 for patches, positions and front tokens, then the blocks from 1 (MAE, BEiT)."""
        module, _, number = path.split("/")[0].partition("_")
        if module == "blocks":
            return int(number) + 1
        in_front = (
            "patches", "position", "class_token", "distillation_token", "register_token",
            "pre_norm",
        )  # fmt: skip
        return 0 if path.split("/")[0] in in_front else self.num_layers - 1

    @nn.nowrap
    def fit_parameter(self, path: str, value: np.ndarray, theirs: Backbone) -> np.ndarray:
        if path != "position":
            return value
        settings, other = self.settings, theirs.settings
        grid = settings.grid(*settings.position_size)
        trained = other.grid(*other.position_size)
        return np.asarray(
            resize_positions(value, other.num_positioned, trained, grid, settings.position_resize)
        )

    def tokens(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Returns the tokens after the last block, with ``settings.num_front`` before the patches.

        The shape is (B, T, C), where T is the number of remaining patches plus ``num_front``: class
        token, distillation token and registers.

        Args:
          images: (B, H, W, 3) float, H and W from 32.
          train: whether dropout behaves as in training.
        """
        return self._forward(images, train)[0]

    def _forward(self, images, train, restorable=False, visit=None):
        """Returns the tokens after the last block and the function back to all patches."""
        self.check_images(images)
        grid = self.settings.grid(*images.shape[1:3])
        if self.settings.expedite is not None:
            return self._expedited(images, grid, train, visit)
        return self._run(self.blocks, self._embed(images, grid), grid, train, restorable, visit)

    def _embed(self, images, grid):
        """Returns the patches with tokens in front, plus position embeddings: (B, T, C)."""
        settings, dtype = self.settings, self.settings.dtype
        x = pad_to_windows(images.astype(dtype), (settings.patch_size,) * 2)
        x = self.patches(x).reshape(images.shape[0], -1, settings.dim).astype(dtype)
        position = self._positions(grid).astype(dtype)
        front = jnp.concatenate(self.front).astype(dtype)
        if settings.front_position:
            front = front + position[: settings.num_classified]
        if settings.num_registers:
            front = jnp.concatenate([front, self.registers.astype(dtype)])
        front = jnp.broadcast_to(front, (images.shape[0], *front.shape))
        x = jnp.concatenate([front, x + position[settings.num_positioned :]], 1)
        return self.pre_norm(x) if settings.pre_norm else x

    def _run(self, blocks, x, grid, train, restorable=False, visit=None):
        """Returns the tokens after some blocks, and their way back to all patches.

        After every block it calls `visit(index, x, restore)`, where it is given.
        """
        reducer, home = self.settings.token_reducer, None
        if restorable and reducer is not None:
            num_patches = x.shape[1] - self.settings.num_front
            own = jnp.arange(num_patches, dtype=jnp.int32)
            home = jnp.broadcast_to(own, (x.shape[0], num_patches))
        origin = Origin(jnp.ones(x.shape[:2], jnp.float32), home)
        neighbors = 1 if reducer is None else reducer.neighbors
        restore_of = lambda origin: functools.partial(origin.restore, neighbors=neighbors)  # noqa: E731
        for block in blocks:
            x, origin = block(x, origin, grid, train)
            if reducer is not None and reducer.halves(block.index):
                grid = (grid[0] // 2, grid[1] // 2)
            if visit is not None:
                visit(block.index, x, restore_of(origin))
        return x, restore_of(origin)

    def _expedited(self, images, grid, train, visit):
        """Runs blocks on all patches, then on their cluster centres, then on all patches again."""
        settings, expedite = self.settings, self.settings.expedite
        num_front = settings.num_front
        expedite.check_grid(grid)
        first, last = expedite.alpha, expedite.alpha + expedite.beta
        if first == 0:
            x = self._embed(expedite.shrink(images, settings.patch_size), expedite.clusters)
            restore = functools.partial(expedite.enlarge, grid=grid)
        else:
            x = self._embed(images, grid)
            x, _ = self._run(self.blocks[:first], x, grid, train, visit=visit)
            patches = x[:, num_front:]
            centers = expedite.cluster(patches, grid)
            x = jnp.concatenate([x[:, :num_front], centers], 1)
            restore = functools.partial(expedite.reconstruct, patches, centers, grid=grid)
        visit_centers = visit and (lambda index, x, _: visit(index, x, restore))
        x, _ = self._run(self.blocks[first:last], x, expedite.clusters, train, visit=visit_centers)
        if expedite.where == "logits":
            return x, restore
        x = jnp.concatenate([x[:, :num_front], restore(x[:, num_front:])], 1)
        return self._run(self.blocks[last:], x, grid, train, visit=visit)

    def _positions(self, grid):
        """Returns the position embeddings (T, C) for a map of ``grid`` patches."""
        settings = self.settings
        trained = settings.grid(*settings.position_size)
        method = settings.position_resize
        return resize_positions(self.position, settings.num_positioned, trained, grid, method)

    def encode(self, images: jax.Array, train: bool = False) -> Encoded:
        """Returns the normed patches after the last block, and the function back to the map.

        If ``expedite`` reconstructs logits, the tokens are cluster centres. If ``token_reducer``
        reduces, they are the remaining tokens; a patch of the map then gets the output for the
        token that stands for it after all blocks (its cluster, or the nearest kept token), or is
        reconstructed from several kept tokens (``token_reducer.neighbors``).

        Args:
          images: (B, H, W, 3) float, H and W from 32.
          train: whether dropout behaves as in training.

        Returns:
          Tokens (B, n, C), and a function
          (B, n, D) -> (B, ceil(H / patch_size), ceil(W / patch_size), D).

        Raises:
          UserError: the reducer convolves, or leaves no patch.
        """
        self._check_map()
        tokens, restore = self._forward(images, train, restorable=True)
        tokens = self.norm(tokens[:, self.settings.num_front :])
        return Encoded(tokens, functools.partial(self._to_map, restore, images.shape))

    def taps(
        self,
        images: jax.Array,
        train: bool = False,
        blocks: Sequence[int] | None = None,
        stages: Sequence[int] = (),
    ) -> list[Tap]:
        """Returns the tokens after some blocks, before any LayerNorm.

        Maps have all patches: if ``expedite`` or ``token_reducer`` leaves fewer tokens, each map is
        restored as in :meth:`encode`.

        Args:
          images: (B, H, W, 3) float, H and W from 32.
          train: whether dropout behaves as in training.
          blocks: the blocks, counted from 0; None: all.

        Returns:
          For each block, the patches (B, ceil(H / patch_size), ceil(W / patch_size), C) and the
          ``settings.num_front`` tokens in front of them (B, num_front, C).

        Raises:
          UserError: there is no such block, the reducer convolves, or it leaves no patch.
        """
        if stages:
            raise UserError(f"stages={tuple(stages)} is not valid without a stem; valid: ()")
        blocks = range(self.settings.depth) if blocks is None else blocks
        for block in blocks:
            if not 0 <= block < self.settings.depth:
                raise UserError(f"block={block} has no tap; valid: 0 to {self.settings.depth - 1}")
        num_front, found = self.settings.num_front, {}

        def visit(index, x, restore):
            if index in blocks:
                patches = self._to_map(restore, images.shape, x[:, num_front:])
                found[index] = Tap(patches, x[:, :num_front])

        self._check_map()
        self._forward(images, train, restorable=True, visit=visit)
        return [found[block] for block in blocks]

    @nn.nowrap
    def _check_map(self) -> None:
        """Raises UserError where a patch may have no token that stands for it."""
        if self.settings.token_reducer is not None:
            self.settings.token_reducer.check_map()

    @nn.nowrap
    def _to_map(self, restore, image_shape, tokens):
        y = restore(tokens)
        return y.reshape(y.shape[0], *self.settings.grid(*image_shape[1:3]), -1)

    def features(self, images: jax.Array, train: bool = False) -> list[jax.Array]:
        """Returns one normed map (B, ceil(H / patch_size), ceil(W / patch_size), C).

        Args:
          images: (B, H, W, 3) float, H and W from 32.
          train: whether dropout behaves as in training.

        Raises:
          UserError: the reducer convolves, or leaves no patch.
        """
        tokens, restore = self.encode(images, train)
        return [restore(tokens)]

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Returns the logits (B, num_classes) in float32; without classes, :meth:`pooled`."""
        if self.settings.distilled:
            return sum(self.distillation_logits(images, train)) / 2
        (pooled,) = self._pooled(images, train)
        return self.classify(pooled, train)

    def distillation_logits(
        self, images: jax.Array, train: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the logits of both classifiers of a distilled model, (B, num_classes) each.

        Args:
          images: (B, H, W, C) float, H and W from 32.
          train: whether dropout behaves as in training.

        Returns:
          The logits of the class token, which learns from labels, and of the distillation token,
          which learns from a teacher (Touvron et al. 2021, Section 4).
        """
        token, distillation = self._pooled(images, train)
        classifiers = (self.classifier, self.distillation_classifier)
        pairs = zip((token, distillation), classifiers, strict=True)
        return tuple(self.classify(x, train, classifier) for x, classifier in pairs)

    def pooled(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Returns the features that the classifier reads, (B, C) in float32.

        Two classifiers (``distilled``) read one token each; the result is the mean of both.

        Args:
          images: (B, H, W, 3) float, H and W from 32.
          train: whether dropout behaves as in training.
        """
        pooled = self._pooled(images, train)
        return sum(pooled) / len(pooled)

    def _pooled(self, images, train):
        """Returns the features (B, C) that each classifier reads."""
        x = self.tokens(images, train)
        if self.settings.pool == "mean":
            x = self.norm(x[:, self.settings.num_front :].mean(1))[:, None]
        else:
            x = self.norm(x[:, : self.settings.num_classified])
        x = self.projection(x) if self.settings.projection else x
        return list(x.astype(jnp.float32).swapaxes(0, 1))

    @nn.nowrap
    def attention(self, variables: Variables, images: jax.Array) -> list[jax.Array]:
        """Returns the attention of every block, (B, heads, T, T); see :meth:`Backbone.attention`.

        With ``expedite``, the blocks in the middle attend among cluster centres; with
        ``token_reducer``, each block attends among the tokens that the blocks before it left.
        """
        _, state = self.apply(variables, images, method="tokens", mutable=[WEIGHTS])
        blocks = (state[WEIGHTS][f"blocks_{index}"] for index in range(self.settings.depth))
        return [block["attention"]["weights"] for block in blocks]

    @nn.nowrap
    def _searches(self) -> bool:
        reducer = self.settings.token_reducer
        return reducer is not None and reducer.method == reducers.SEARCH

    @nn.nowrap
    def after_step(self, variables: Variables, learning_rate: jax.Array) -> Variables:
        """Clips the retention parameters of a search to [0, 1]."""
        del learning_rate
        if not self._searches():
            return variables
        return {**variables, "params": reducers.clip_retention(variables["params"])}

    @nn.nowrap
    def learning_rate_factors(self, params: Any) -> Any:
        """Returns a search's factor for its retention parameters, 1 for all others."""
        if not self._searches():
            return None
        factor = self.settings.token_reducer.learning_rate_factor
        return jax.tree_util.tree_map_with_path(
            lambda path, _: factor if reducers.is_retention(path) else 1.0, params
        )

    @nn.nowrap
    def monitor(self, params: Any) -> dict[str, jax.Array]:
        """Returns "retention/tokens" of a search: the sum of its retention parameters."""
        if not self._searches():
            return {}
        return {"retention/tokens": reducers.retention_mass(params).sum()}
