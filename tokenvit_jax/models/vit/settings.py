"""Settings of a plain vision transformer, and the published sizes."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from tokenvit_jax.errors import UserError
from tokenvit_jax.layers import ACTIVATIONS
from tokenvit_jax.models.expedite import Expedite
from tokenvit_jax.models.reducers import TokenReducer
from tokenvit_jax.models.resnet_stem import ResNetStem
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
      patch_size: side of a patch [pixels]; with a stem, a multiple of its stride.
      stem: a :class:`ResNetStem` or its attributes by name, whose last map is divided into patches;
        None: the image is.
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

    parts: ClassVar[Mapping[str, type]] = {
        "token_reducer": TokenReducer, "expedite": Expedite, "stem": ResNetStem
    }  # fmt: skip

    valid: ClassVar[Rules] = {
        "dim": CHANNELS,
        "depth": whole(1, BLOCKS),
        "num_heads": HEADS,
        "mlp_ratio": EXPANSION,
        "patch_size": whole(1, 1024),
        "stem": Part(ResNetStem),
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
    stem: Any = None
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

    @property
    def stem_stride(self) -> int:
        """Stride of the map that is divided into patches [pixels]; 1: the image."""
        return self.stem.stride if self.stem else 1

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Returns the rows and columns of patches of an image whose size is in pixels."""
        return -(-height // self.patch_size), -(-width // self.patch_size)

    def check_relations(self) -> None:
        check_heads(self.num_heads, self.dim, f"dim={self.dim}")
        for part in filter(None, (self.token_reducer, self.expedite, self.stem)):
            part.check(self.depth)
        if self.distilled and self.pool != "token":
            raise UserError(f"pool={self.pool!r} is not valid with distilled=True; valid: 'token'")
        if self.token_reducer and self.pool == "mean":
            raise UserError("pool='mean' is not valid with a token_reducer; valid: 'token'")
        if self.token_reducer and self.expedite:
            raise UserError("expedite is not valid with a token_reducer; valid: one of the two")
        if self.patch_size % self.stem_stride:
            raise UserError(
                f"patch_size={self.patch_size} is not valid with a stem of stride "
                f"{self.stem_stride}; valid: multiples of {self.stem_stride}"
            )
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
    # The hybrid's published use at other sizes is DPT, which resizes positions bilinearly.
    "vit_b_r50": dataclasses.replace(
        _BASE, stem=ResNetStem(), position_size=(384, 384), position_resize="bilinear"
    ),
    "vit_l": ViTSettings(dim=1024, depth=24, num_heads=16),
    "vit_h": ViTSettings(dim=1280, depth=32, num_heads=16, patch_size=14),
}
