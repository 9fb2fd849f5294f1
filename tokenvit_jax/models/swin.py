"""Swin Transformer (Liu et al. 2021) and Swin Transformer V2 (Liu et al. 2022).

Parameters and the order of operations match timm's models.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tokenvit_jax.errors import UserError
from tokenvit_jax.layers import (
    KEPT,
    AddLayerNorm,
    CosineWindowAttention,
    Factors,
    LayerNorm,
    Mlp,
    PatchEmbedding,
    WindowAttention,
    dense,
    drop_branch,
)
from tokenvit_jax.models.expedite import Expedite
from tokenvit_jax.models.pyramid import Pyramid, PyramidSettings
from tokenvit_jax.models.settings import EXPANSION, Part, Rules
from tokenvit_jax.ops.windows import pad_to_windows, to_map, to_windows, whole_windows
from tokenvit_jax.valid import Flag, Several, whole

EPSILON = 1e-5  # LayerNorm's
WINDOW = whole(1, 256)  # side of a window


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwinSettings(PyramidSettings):
    """Settings of the Swin Transformer; the common ones are in :class:`PyramidSettings`.

    Attributes:
      mlp_ratio: expansion of the MLP.
      window_size: rows and columns of a window. Maps are padded to multiples of the window; a map
        that is smaller than a window is one window.
      expedite: an :class:`Expedite` or its attributes by name; None: all tokens go through all
        blocks. The tokens of every unshifted window are clustered after some blocks of the deepest
        stage (the third stage of the published sizes) and reconstructed after others; in between,
        windows of cluster centres attend (Liang et al. 2022). Blocks count within that stage;
        clusters are at most the rows and columns of a window (on small maps: of the map).
      released_mask: whether shifted windows of centres use the mask for the shift of windows of
        tokens, as in the released code of Expedite; for parity with this code only. Some centres at
        a border then attend to centres at the opposite border, and not to all of their neighbours.
    """

    parts: ClassVar[Mapping[str, type]] = {"expedite": Expedite}
    valid: ClassVar[Rules] = {
        "mlp_ratio": EXPANSION,
        "window_size": WINDOW,
        "expedite": Part(Expedite),
        "released_mask": Flag(),
    }

    mlp_ratio: int = 4
    window_size: int = 7
    expedite: Any = None
    released_mask: bool = False

    @property
    def expedited_stage(self) -> int:
        """The stage that :attr:`expedite` acts in."""
        return self.depths.index(max(self.depths))

    def check_relations(self) -> None:
        super().check_relations()
        if self.expedite is None:
            if self.released_mask:
                raise UserError("released_mask=True is valid with expedite only")
            return
        self.expedite.check(max(self.depths))
        if self.expedite.alpha == 0:
            raise UserError(
                "expedite.alpha=0 is not valid in a Swin Transformer, whose first stages see all "
                "tokens; valid: from 1"
            )
        if self.expedite.where != "blocks":
            raise UserError(
                f"expedite.where={self.expedite.where!r} is not valid in a Swin Transformer, whose "
                "later stages need all tokens; valid: 'blocks'"
            )
        if max(self.expedite.clusters) > self.window_size:
            raise UserError(
                f"expedite.clusters={self.expedite.clusters} is not valid; valid: rows and columns "
                f"from 1 to those of the window, {self.window_size} x {self.window_size}"
            )
        if self.released_mask and min(self.expedite.clusters) <= self.window_size // 2:
            raise UserError(
                f"expedite.clusters={self.expedite.clusters} is not valid with released_mask=True; "
                f"valid: above the shift of windows of {self.window_size}, {self.window_size // 2}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwinV2Settings(SwinSettings):
    """Settings of Swin Transformer V2; the common ones are in :class:`SwinSettings`.

    Attributes:
      pretrained_window_sizes: sides of the windows that are the units of offsets, one per stage:
        the windows of the pretraining, which are not larger than its maps.
    """

    valid: ClassVar[Rules] = {"pretrained_window_sizes": Several(WINDOW)}

    window_size: int = 8
    pretrained_window_sizes: tuple[int, ...] = (8, 8, 8, 8)


_TINY = {"dims": (96, 192, 384, 768), "num_heads": (3, 6, 12, 24), "depths": (2, 2, 6, 2)}
_SMALL = _TINY | {"depths": (2, 2, 18, 2)}
_BASE = _SMALL | {"dims": (128, 256, 512, 1024), "num_heads": (4, 8, 16, 32)}
_LARGE = _SMALL | {"dims": (192, 384, 768, 1536), "num_heads": (6, 12, 24, 48)}

SIZES = {
    "swin_t": SwinSettings(**_TINY),
    "swin_s": SwinSettings(**_SMALL),
    "swin_b": SwinSettings(**_BASE),
    "swin_l": SwinSettings(**_LARGE),
}
V2_SIZES = {
    "swinv2_t": SwinV2Settings(**_TINY),
    "swinv2_s": SwinV2Settings(**_SMALL),
    "swinv2_b": SwinV2Settings(**_BASE),
    # Pretrained with windows of 12 on 192 x 192 pixels, where the last map has 6 x 6 tokens, then
    # fine-tuned with windows of 16 on 256 x 256 pixels.
    "swinv2_l": SwinV2Settings(**_LARGE, window_size=16, pretrained_window_sizes=(12, 12, 12, 6)),
}


class PatchMerging(nn.Module):
    """Joins 2 x 2 tokens: (B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), dim).

    Attributes:
      dim: channels of the result.
      norm_after: whether LayerNorm comes after the linear layer instead of before it.
    """

    dim: int
    norm_after: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = LayerNorm(EPSILON, self.dtype, name="norm")
        reduction = dense(self.dim, self.dtype, "reduction", use_bias=False)
        squares = to_windows(pad_to_windows(x, (2, 2)), (2, 2))  # (B, H / 2, W / 2, 2, 2, C)
        # The order within a square is column by column.
        x = squares.swapaxes(3, 4).reshape(*squares.shape[:3], -1)
        return norm(reduction(x)) if self.norm_after else reduction(norm(x))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class CenterWindows:
    """Windows of cluster centres, in place of windows of tokens.

    Attributes:
      size: rows and columns of a window of centres.
      tokens: rows and columns of the window of tokens that the centres stand for.
      released_mask: as in :class:`SwinSettings`.
    """

    size: tuple[int, int]
    tokens: tuple[int, int]
    released_mask: bool

    def attention_settings(self, shift: tuple[int, int]) -> dict[str, Any]:
        """Returns the arguments of window attention that differ from attention among tokens."""
        settings = {"table_window": self.tokens}
        if self.released_mask:
            pairs = zip(self.tokens, shift, strict=True)
            settings["mask_shift"] = tuple(side // 2 if moved else 0 for side, moved in pairs)
        return settings


class SwinBlock(nn.Module):
    """x + attention(LN(x)) within windows, x + MLP(LN(x)): (B, H, W, C) -> (B, H, W, C).

    Attributes:
      settings: the architecture.
      stage: stage of the block, from 0.
      index: index of the block in the network, from 0.
    """

    settings: SwinSettings
    stage: int
    index: int

    @property
    def shifted(self) -> bool:
        """Whether windows are shifted by half their size, in directions with several windows."""
        return (self.index - sum(self.settings.depths[: self.stage])) % 2 == 1

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        train: bool,
        factors: Factors = KEPT,
        centers: CenterWindows | None = None,
    ) -> jax.Array:
        """Computes the block.

        Args:
          x: (B, H, W, C), tokens or cluster centres.
          train: not used; blocks with BatchNorm or routing need it.
          factors: those of the attention and the MLP.
          centers: windows of the cluster centres; None: x are tokens.
        """
        settings = self.settings
        attention, mlp = self._attention(), Mlp(settings.mlp_ratio, settings.dtype, name="mlp")
        side = settings.window_size if centers is None else centers.size
        window, shift = windows_of(x.shape[1:3], side, self.shifted)
        changes = {} if centers is None else centers.attention_settings(shift)

        def attend(x):
            return attention(x, window, shift, **changes)

        return self._residual(x, attend, mlp, factors)

    def _attention(self):
        settings = self.settings
        return WindowAttention(
            settings.num_heads[self.stage], settings.window_size, settings.dtype, name="attention"
        )

    def _residual(self, x, attention, mlp, factors):
        x, y = AddLayerNorm(EPSILON, self.settings.dtype, name="norm1")(x)
        x, y = AddLayerNorm(EPSILON, self.settings.dtype, name="norm2")(x, attention(y), factors[0])
        return x + drop_branch(mlp(y), factors[1])


class SwinV2Block(SwinBlock):
    """x + LN(attention(x)) within windows, x + LN(MLP(x)); both LayerNorms start with scale 0."""

    settings: SwinV2Settings

    def _attention(self):
        settings = self.settings
        return CosineWindowAttention(
            settings.num_heads[self.stage], settings.window_size, settings.dtype,
            settings.pretrained_window_sizes[self.stage], name="attention",
        )  # fmt: skip

    def _residual(self, x, attention, mlp, factors):
        dtype, zeros = self.settings.dtype, nn.initializers.zeros
        y = LayerNorm(EPSILON, dtype, zeros, name="norm1")(attention(x))
        x = x + drop_branch(y, factors[0])
        y = LayerNorm(EPSILON, dtype, zeros, name="norm2")(mlp(x))
        return x + drop_branch(y, factors[1])


def windows_of(
    grid: tuple[int, int], window_size: int | tuple[int, int], shifted: bool
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns the rows and columns of the windows of a map, and their shift.

    A window is at most as large as the map; a direction with one window has no shift.

    Args:
      grid: rows and columns of the map.
      window_size: side of a window on large maps, or its rows and columns.
      shifted: whether the windows are shifted.
    """
    sides = (window_size,) * 2 if isinstance(window_size, int) else window_size
    window = tuple(map(min, grid, sides))
    pairs = zip(grid, sides, strict=True)
    shift = tuple(side // 2 if shifted and size > side else 0 for size, side in pairs)
    return window, shift


def to_window_tokens(x: jax.Array, window: tuple[int, int]) -> jax.Array:
    """Reshapes (B, rows h, columns w, C) to (B rows columns, h w, C); ``window``: (h, w)."""
    return to_windows(x, window).reshape(-1, window[0] * window[1], x.shape[-1])


def from_window_tokens(x: jax.Array, window: tuple[int, int], count: tuple[int, int]) -> jax.Array:
    """Undoes :func:`to_window_tokens`; ``count``: (rows, columns) of windows."""
    return to_map(x.reshape(-1, *count, *window, x.shape[-1]))


class Swin(Pyramid):
    """Swin Transformer for images (B, H, W, 3) of any size from 32 x 32.

    The maps of :meth:`features` come directly from the blocks, as in timm. Detection and
    segmentation models apply a LayerNorm to each map; this LayerNorm belongs to those models.
    """

    settings: SwinSettings

    block_type = SwinBlock
    head_modules = ("classifier", "head_norm")
    map_norm_epsilon = EPSILON
    norm_after_merging: ClassVar[bool] = False

    def setup(self):
        super().setup()
        self.head_norm = LayerNorm(EPSILON, self.settings.dtype)

    @nn.nowrap
    def fit_parameter(self, path: str, value: np.ndarray, theirs: Pyramid) -> np.ndarray:
        """Resizes the position biases of a window to this window, bicubically as in Swin's code."""
        side = 2 * self.settings.window_size - 1
        if not path.endswith("relative_position_bias") or len(value) == side:
            return value
        shape = (side, side, value.shape[-1])
        return np.asarray(jax.image.resize(value, shape, "bicubic", antialias=False))

    def embedding(self, stage: int) -> nn.Module:
        dim, dtype = self.settings.dims[stage], self.settings.dtype
        if stage == 0:
            return PatchEmbedding(dim, 4, 4, 0, EPSILON, dtype)
        return PatchMerging(dim, self.norm_after_merging, dtype)

    def run_blocks(
        self, stage: int, x: jax.Array, train: bool, factors: list[Factors]
    ) -> jax.Array:
        expedite = self.settings.expedite
        if expedite is None or stage != self.settings.expedited_stage:
            return super().run_blocks(stage, x, train, factors)
        blocks, first = self.stages[stage], expedite.alpha
        last = first + expedite.beta
        for block in blocks[:first]:
            x = block(x, train, factors[block.index])
        x = self._run_on_centers(blocks[first:last], x, train, factors)
        for block in blocks[last:]:
            x = block(x, train, factors[block.index])
        return x

    def _run_on_centers(self, blocks, x, train, factors):
        """Runs blocks on the cluster centres of every window of x (B, H, W, C)."""
        settings, expedite = self.settings, self.settings.expedite
        size = expedite.clusters
        _, height, width, _ = x.shape
        window, _ = windows_of((height, width), settings.window_size, False)
        if any(side > most for side, most in zip(size, window, strict=True)):
            raise UserError(  # the position biases of the window are resized to fewer offsets
                f"expedite.clusters={size} is not valid; valid: rows and columns from 1 to those "
                f"of the window, {window[0]} x {window[1]}"
            )
        count = whole_windows((height, width), window)
        tokens = to_window_tokens(pad_to_windows(x, window), window)
        # One temperature for the map: the distances within a single window vary more.
        temperature = expedite.temperature_for(x)
        if isinstance(temperature, jax.Array):
            temperature = jnp.tile(temperature[:, None], (1, count[0] * count[1])).reshape(-1)
        centers = expedite.cluster(tokens, window, temperature)
        x = from_window_tokens(centers, size, count)
        windows = CenterWindows(size, window, settings.released_mask)
        for block in blocks:
            x = block(x, train, factors[block.index], windows)
        refined = to_window_tokens(x, size)
        tokens = expedite.reconstruct(tokens, centers, refined, window, temperature)
        return from_window_tokens(tokens, window, count)[:, :height, :width]

    def head(self, x: jax.Array, train: bool) -> jax.Array:
        return self.head_norm(x)


class SwinV2(Swin):
    """Swin Transformer V2: norms after the branches, cosine attention, biases from an MLP."""

    settings: SwinV2Settings

    block_type = SwinV2Block
    norm_after_merging = True
