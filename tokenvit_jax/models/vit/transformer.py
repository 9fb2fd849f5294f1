"""The backbone: patches, blocks, and what other tasks read."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import truncated_normal

from tokenvit_jax.errors import UserError
from tokenvit_jax.layers import Dropout, DropPaths, LayerNorm, dense
from tokenvit_jax.layers.self_attention import WEIGHTS
from tokenvit_jax.models import reducers
from tokenvit_jax.models.backbone import Backbone, Encoded, Tap, Variables
from tokenvit_jax.models.resnet_stem import ResNet
from tokenvit_jax.models.vit.block import Block, Origin
from tokenvit_jax.models.vit.settings import ViTSettings
from tokenvit_jax.ops.resize import resize_bicubic, resize_bilinear
from tokenvit_jax.ops.windows import pad_to_windows


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
    elif method == "bilinear":
        patches = resize_bilinear(patches[None], grid)
    else:
        patches = jax.image.resize(patches, shape, "bicubic")
    return jnp.concatenate([front, patches.reshape(-1, shape[-1])])


class Recorder(NamedTuple):
    """Keeps what :meth:`VisionTransformer.taps` returns during a forward pass.

    Attributes:
      end: number of blocks that run: those up to the last tap.
      maps: the maps of the stem, once they are computed.
      tokens: by block, the tokens after it and the function from patches to all patches.
    """

    end: int
    maps: list[jax.Array]
    tokens: dict[int, tuple[jax.Array, Any]]


class VisionTransformer(Backbone):
    """Vision transformer for images (B, H, W, 3) of any size from 32 x 32.

    Images are padded with zeros below and on the right to whole patches; the position embeddings
    are resized if the map differs from the map of ``position_size``.
    """

    settings: ViTSettings

    head_modules = ("classifier", "distillation_classifier")
    standardized_kernels = "stem/"
    optional_parameters = (*reducers.OPTIONAL_PARAMETERS, "attention/alpha")

    def setup(self):
        settings = self.settings
        init = truncated_normal(settings.init_std)
        side = (settings.patch_size // settings.stem_stride,) * 2
        if settings.stem:
            self.stem = ResNet(settings.stem, settings.remat, settings.dtype)
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
        self.drop_paths = DropPaths(settings.drop_path, settings.depth, settings.axis_name)
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

    @property
    def first_layer(self) -> str:
        return "stem/conv" if self.settings.stem else "patches"

    @nn.nowrap
    def layer_of(self, path: str) -> int:
        """Returns 0 for patches, positions and front tokens, then the blocks from 1 (MAE, BEiT)."""
        module, _, number = path.split("/")[0].partition("_")
        if module == "blocks":
            return int(number) + 1
        in_front = (
            "patches", "position", "class_token", "distillation_token", "register_token",
            "pre_norm", "stem",
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

    def _forward(self, images, train, restorable=False, record=None):
        """Returns the tokens after the last block and the function back to all patches.

        A :class:`Recorder` ends the pass after its last block.
        """
        self.check_images(images)
        grid = self.settings.grid(*images.shape[1:3])
        if self.settings.expedite is not None:
            return self._expedited(images, grid, train, record)
        blocks = self.blocks if record is None else self.blocks[: record.end]
        return self._run(blocks, self._embed(images, grid, record), grid, train, restorable, record)

    def _embed(self, images, grid, record=None):
        """Returns the patches with tokens in front, plus position embeddings: (B, T, C)."""
        settings, dtype = self.settings, self.settings.dtype
        x = pad_to_windows(images.astype(dtype), (settings.patch_size,) * 2)
        if settings.stem:
            maps = self.stem(x)
            x = maps[-1]
            if record is not None:
                record.maps.extend(maps)
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

    def _run(self, blocks, x, grid, train, restorable=False, record=None, restore=None):
        """Returns the tokens after some blocks, and their way back to all patches.

        Args:
          blocks: the blocks.
          x: tokens (B, T, C).
          grid: rows and columns of the map of patches.
          train: whether the blocks behave as in training.
          restorable: whether the way back is recorded where a reducer leaves fewer tokens.
          record: a :class:`Recorder`, or None.
          restore: the way back of the tokens in ``record``; None: what the blocks recorded.
        """
        reducer, home = self.settings.token_reducer, None
        if restorable and reducer is not None:
            num_patches = x.shape[1] - self.settings.num_front
            own = jnp.arange(num_patches, dtype=jnp.int32)
            home = jnp.broadcast_to(own, (x.shape[0], num_patches))
        origin = Origin(jnp.ones(x.shape[:2], jnp.float32), home)
        neighbors = 1 if reducer is None else reducer.neighbors
        restore_of = lambda origin: functools.partial(origin.restore, neighbors=neighbors)  # noqa: E731
        factors = self.drop_paths(x.shape[0], train)
        for block in blocks:
            x, origin = block(x, origin, grid, train, factors[block.index])
            if reducer is not None and reducer.halves(block.index):
                grid = (grid[0] // 2, grid[1] // 2)
            if record is not None:
                record.tokens[block.index] = (x, restore or restore_of(origin))
        return x, restore_of(origin)

    def _expedited(self, images, grid, train, record):
        """Runs blocks on all patches, then on their cluster centres, then on all patches again.

        Taps are restored one by one. If a :class:`Recorder` ends the pass among the centres, the
        tokens are not.
        """
        settings, expedite = self.settings, self.settings.expedite
        num_front = settings.num_front
        expedite.check_grid(grid)
        first, last = expedite.alpha, expedite.alpha + expedite.beta
        end = settings.depth if record is None else record.end
        if first == 0:
            shrunk = expedite.shrink(images, settings.patch_size)
            x = self._embed(shrunk, expedite.clusters, record)
            restore = functools.partial(expedite.enlarge, grid=grid)
        else:
            x = self._embed(images, grid, record)
            x, restore = self._run(self.blocks[: min(first, end)], x, grid, train, record=record)
            if end <= first:
                return x, restore
            patches = x[:, num_front:]
            centers = expedite.cluster(patches, grid)
            x = jnp.concatenate([x[:, :num_front], centers], 1)
            restore = functools.partial(expedite.reconstruct, patches, centers, grid=grid)
        blocks, clusters = self.blocks[first : min(last, end)], expedite.clusters
        x, _ = self._run(blocks, x, clusters, train, record=record, restore=restore)
        if expedite.where == "logits" or (record is not None and end <= last):
            return x, restore
        x = jnp.concatenate([x[:, :num_front], restore(x[:, num_front:])], 1)
        return self._run(self.blocks[last:end], x, grid, train, record=record)

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
        """Returns maps of the stem, and the tokens after some blocks, before any LayerNorm.

        Maps have all patches: if ``expedite`` or ``token_reducer`` leaves fewer tokens, each map is
        restored as in :meth:`encode`. Blocks after the last tap do not run.

        Args:
          images: (B, H, W, 3) float, H and W from 32.
          train: whether dropout behaves as in training.
          blocks: the blocks, counted from 0; None: all.
          stages: the stages of the stem, counted from 0.

        Returns:
          For each stage, its map (B, h, w, width) for the image that is padded to whole patches,
          and None. Then for each block, the patches
          (B, ceil(H / patch_size), ceil(W / patch_size), C) and the ``settings.num_front`` tokens
          in front of them (B, num_front, C).

        Raises:
          UserError: there is no such block or stage, the reducer convolves, or it leaves no patch.
        """
        settings = self.settings
        blocks = range(settings.depth) if blocks is None else blocks
        _check_numbers("block", blocks, settings.depth)
        _check_numbers("stage", stages, len(settings.stem.widths) if settings.stem else 0)
        record = Recorder(max(blocks, default=-1) + 1, [], {})
        grid = settings.grid(*images.shape[1:3])
        self._check_map()
        self._forward(images, train, restorable=True, record=record)
        taps = []
        for stage in stages:
            cells = settings.patch_size // (4 * 2**stage)  # of a patch, along a side
            size = (grid[0] * cells, grid[1] * cells)
            # Without tokens before the clustering, the maps are those of a smaller image.
            taps.append(Tap(resize_bilinear(record.maps[stage], size), None))
        for block in blocks:
            x, restore = record.tokens[block]
            patches, front = x[:, settings.num_front :], x[:, : settings.num_front]
            taps.append(Tap(self._to_map(restore, images.shape, patches), front))
        return taps

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


def _check_numbers(name, numbers, count):
    """Raises UserError unless blocks or stages exist."""
    for number in numbers:
        if not 0 <= number < count:
            valid = f"0 to {count - 1}" if count else "none, without a stem"
            raise UserError(f"{name}={number} has no tap; valid: {valid}")
