"""Swin Transformer (Liu et al. 2021) and Swin Transformer V2 (Liu et al. 2022).

The parameters and the order of the operations are those of timm's models.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tokenvit_jax.errors import UserError
from tokenvit_jax.layers import (
    CosineWindowAttention,
    DropPath,
    Mlp,
    PatchEmbedding,
    WindowAttention,
)
from tokenvit_jax.layers.conv import linear_init
from tokenvit_jax.models.expedite import Expedite
from tokenvit_jax.models.pyramid import Pyramid
from tokenvit_jax.models.registry import register
from tokenvit_jax.models.settings import read_settings

EPSILON = 1e-5  # of LayerNorm


class PatchMerging(nn.Module):
    """Squares of 2 x 2 tokens become one: (B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), dim).

    Attributes:
      dim: channels of the result.
      norm_after: whether LayerNorm comes after the linear layer, not before it.
    """

    dim: int
    norm_after: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = nn.LayerNorm(EPSILON, dtype=self.dtype, name="norm")
        reduction = nn.Dense(
            self.dim, use_bias=False, dtype=self.dtype, kernel_init=linear_init, name="reduction"
        )
        x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
        batch, height, width, channels = x.shape
        x = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
        # Column by column within a square.
        x = x.transpose(0, 1, 3, 4, 2, 5).reshape(batch, height // 2, width // 2, 4 * channels)
        return norm(reduction(x)) if self.norm_after else reduction(norm(x))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class CenterWindows:
    """Windows of the centres of clusters, in place of windows of tokens.

    Attributes:
      size: rows and columns of a window of centres.
      tokens: rows and columns of the window of tokens that they stand for.
      released_mask: as in :class:`Swin`.
    """

    size: tuple[int, int]
    tokens: tuple[int, int]
    released_mask: bool

    def attention_settings(self, shift: tuple[int, int]) -> dict[str, Any]:
        """Returns the arguments by which attention within them differs from that of tokens."""
        settings = {"table_window": self.tokens}
        if self.released_mask:
            pairs = zip(self.tokens, shift, strict=True)
            settings["mask_shift"] = tuple(side // 2 if moved else 0 for side, moved in pairs)
        return settings


class SwinBlock(nn.Module):
    """x + attention(LN(x)) within windows, x + MLP(LN(x)): (B, H, W, C) -> (B, H, W, C).

    Attributes, beside those of :class:`Swin`:
      shifted: whether the windows are moved by half their size, in a direction that has several.
    """

    num_heads: int
    window_size: int
    shifted: bool
    mlp_ratio: int
    drop_path: float
    dtype: Any
    axis_name: str | None

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool, centers: CenterWindows | None = None
    ) -> jax.Array:
        """Computes the block.

        Args:
          x: (B, H, W, C), tokens or centres of clusters.
          train: whether dropout behaves as in training.
          centers: their windows; None: x are tokens.
        """
        attention, mlp = self._attention(), Mlp(self.mlp_ratio, self.dtype, name="mlp")
        side = self.window_size if centers is None else centers.size
        window, shift = windows_of(x.shape[1:3], side, self.shifted)
        settings = {} if centers is None else centers.attention_settings(shift)

        def drop(y):
            return DropPath(self.drop_path, self.axis_name)(y, train)

        x = x + drop(self._normed(lambda x: attention(x, window, shift, **settings), x, "norm1"))
        return x + drop(self._normed(mlp, x, "norm2"))

    def _attention(self):
        return WindowAttention(self.num_heads, self.window_size, self.dtype, name="attention")

    def _normed(self, branch, x, name):
        return branch(nn.LayerNorm(EPSILON, dtype=self.dtype, name=name)(x))


class SwinV2Block(SwinBlock):
    """x + LN(attention(x)) within windows, x + LN(MLP(x)); the first LayerNorms have scale 0."""

    pretrained_window_size: int

    def _attention(self):
        return CosineWindowAttention(
            self.num_heads, self.window_size, self.dtype, self.pretrained_window_size,
            name="attention",
        )  # fmt: skip

    def _normed(self, branch, x, name):
        norm = nn.LayerNorm(EPSILON, dtype=self.dtype, scale_init=nn.initializers.zeros, name=name)
        return norm(branch(x))


def windows_of(
    grid: tuple[int, int], window_size: int | tuple[int, int], shifted: bool
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns the rows and columns of the windows of a map, and by how many they are shifted.

    A window is at most as large as the map, and nothing is shifted in a direction with one window.

    Args:
      grid: rows and columns of the map.
      window_size: side of a window on large maps, or its rows and columns.
      shifted: whether there is a shift at all.
    """
    sides = (window_size,) * 2 if isinstance(window_size, int) else window_size
    window = tuple(map(min, grid, sides))
    pairs = zip(grid, sides, strict=True)
    shift = tuple(side // 2 if shifted and size > side else 0 for size, side in pairs)
    return window, shift


def to_windows(x: jax.Array, window: tuple[int, int]) -> jax.Array:
    """(B, rows h, columns w, C) -> (B rows columns, h w, C); ``window``: (h, w)."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // window[0], window[0], width // window[1], window[1], channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, window[0] * window[1], channels)


def to_map(x: jax.Array, window: tuple[int, int], count: tuple[int, int]) -> jax.Array:
    """(B rows columns, h w, C) -> (B, rows h, columns w, C); ``count``: (rows, columns)."""
    x = x.reshape(-1, *count, *window, x.shape[-1]).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(x.shape[0], count[0] * window[0], count[1] * window[1], -1)


class Swin(Pyramid, kw_only=True):
    """Swin Transformer for images (B, H, W, 3) of any size from 32 x 32.

    The maps of :meth:`features` are those that the blocks leave, as timm gives them. Those of
    detection and segmentation models go through a LayerNorm each, which belongs to such a model.

    Attributes, beside those of :class:`Pyramid`:
      mlp_ratio: expansion of the MLP.
      window_size: rows and columns of a window; maps are padded to multiples of it, but where they
        are smaller than a window they are one.
      expedite: clusters the tokens of every unshifted window after some blocks of the stage with
        most blocks, the third one of the published sizes, and reconstructs them after others; in
        between, centres attend within windows of as many as a window has (Liang et al. 2022). An
        :class:`Expedite`, whose blocks are those of that stage, and whose clusters are no more than
        the rows and columns of a window, which on small maps are those of the map; or its
        attributes by name; None: all tokens go through all blocks.
      released_mask: where windows of centres are shifted, mask for the shift of windows of tokens,
        as the released code of Expedite does: for parity with it only. Some centres at a border
        then attend to those of the opposite one, and not to all beside them.
    """

    mlp_ratio: int = 4
    window_size: int = 7
    expedite: Any = None
    released_mask: bool = False

    def __post_init__(self):
        # Attributes by name would make a module that cannot be hashed.
        self.expedite = read_settings(Expedite, "expedite", self.expedite, max(self.depths))
        self._check()
        super().__post_init__()

    def _check(self):
        if self.expedite is None:
            if self.released_mask:
                raise UserError("released_mask=True goes with expedite")
            return
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
        if self.released_mask and min(self.expedite.clusters) <= self.window_size // 2:
            raise UserError(
                f"expedite.clusters={self.expedite.clusters} is not valid with released_mask=True; "
                f"valid: above the shift of windows of {self.window_size}, {self.window_size // 2}"
            )

    def setup(self):
        super().setup()
        self.head_norm = nn.LayerNorm(EPSILON, dtype=self.dtype)

    def embedding(self, stage: int) -> nn.Module:
        if stage == 0:
            return PatchEmbedding(self.dims[0], 4, 4, 0, EPSILON, self.dtype)
        return PatchMerging(self.dims[stage], isinstance(self, SwinV2), self.dtype)

    def block(self, stage: int, index: int) -> tuple[type[nn.Module], dict[str, Any]]:
        return SwinBlock, {
            "num_heads": self.num_heads[stage],
            "window_size": self.window_size,
            "shifted": (index - sum(self.depths[:stage])) % 2 == 1,
            "mlp_ratio": self.mlp_ratio,
            "dtype": self.dtype,
            "axis_name": self.axis_name,
        }

    def run_blocks(self, stage: int, x: jax.Array, train: bool) -> jax.Array:
        if self.expedite is None or stage != self.depths.index(max(self.depths)):
            return super().run_blocks(stage, x, train)
        blocks, first = self.stages[stage], self.expedite.alpha
        last = first + self.expedite.beta
        for block in blocks[:first]:
            x = block(x, train)
        x = self._run_on_centers(blocks[first:last], x, train)
        for block in blocks[last:]:
            x = block(x, train)
        return x

    def _run_on_centers(self, blocks, x, train):
        """Clusters the tokens (B, H, W, C) of every window, and reconstructs them after blocks."""
        expedite, size = self.expedite, self.expedite.clusters
        _, height, width, _ = x.shape
        window, _ = windows_of((height, width), self.window_size, False)
        if any(side > most for side, most in zip(size, window, strict=True)):
            raise UserError(  # position biases are those of the window, resized
                f"expedite.clusters={size} is not valid; valid: rows and columns from 1 to those "
                f"of the window, {window[0]} x {window[1]}"
            )
        count = (-(-height // window[0]), -(-width // window[1]))
        below, right = count[0] * window[0] - height, count[1] * window[1] - width
        tokens = to_windows(jnp.pad(x, ((0, 0), (0, below), (0, right), (0, 0))), window)
        centers = expedite.cluster(tokens, window)
        x = to_map(centers, size, count)
        for block in blocks:
            x = block(x, train, CenterWindows(size, window, self.released_mask))
        tokens = expedite.reconstruct(tokens, centers, to_windows(x, size), window)
        return to_map(tokens, window, count)[:, :height, :width]

    def head(self, x: jax.Array, train: bool) -> jax.Array:
        return self.head_norm(x)


class SwinV2(Swin, kw_only=True):
    """Swin Transformer V2: norms after the branches, cosine attention, position biases of an MLP.

    Attributes, beside those of :class:`Swin`:
      pretrained_window_sizes: sides of the windows of the four stages by which offsets are
        measured: those of the first training, not larger than the maps were then.
    """

    window_size: int = 8
    pretrained_window_sizes: tuple[int, ...] = (8, 8, 8, 8)

    def block(self, stage: int, index: int) -> tuple[type[nn.Module], dict[str, Any]]:
        _, settings = super().block(stage, index)
        own = {"pretrained_window_size": self.pretrained_window_sizes[stage]}
        return SwinV2Block, settings | own


TINY = {"dims": (96, 192, 384, 768), "num_heads": (3, 6, 12, 24), "depths": (2, 2, 6, 2)}
SMALL = TINY | {"depths": (2, 2, 18, 2)}
BASE = SMALL | {"dims": (128, 256, 512, 1024), "num_heads": (4, 8, 16, 32)}
LARGE = SMALL | {"dims": (192, 384, 768, 1536), "num_heads": (6, 12, 24, 48)}


@register
def swin_t(**kwargs) -> Swin:
    return Swin(**TINY | kwargs)


@register
def swin_s(**kwargs) -> Swin:
    return Swin(**SMALL | kwargs)


@register
def swin_b(**kwargs) -> Swin:
    return Swin(**BASE | kwargs)


@register
def swin_l(**kwargs) -> Swin:
    return Swin(**LARGE | kwargs)


@register
def swinv2_t(**kwargs) -> SwinV2:
    return SwinV2(**TINY | kwargs)


@register
def swinv2_s(**kwargs) -> SwinV2:
    return SwinV2(**SMALL | kwargs)


@register
def swinv2_b(**kwargs) -> SwinV2:
    return SwinV2(**BASE | kwargs)


@register
def swinv2_l(**kwargs) -> SwinV2:
    # Published with windows of 12 for 192 x 192 pixels, of which the last map has 6 x 6, and then
    # fine-tuned with windows of 16 for 256 x 256.
    windows = {"window_size": 16, "pretrained_window_sizes": (12, 12, 12, 6)}
    return SwinV2(**LARGE | windows | kwargs)
