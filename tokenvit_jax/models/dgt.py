"""Dynamic Group Transformer (Liu et al. 2022), Figure 2 and Table 1."""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax

from tokenvit_jax import ops
from tokenvit_jax.layers import (
    KEPT,
    AddLayerNorm,
    ConditionalPositionEncoding,
    Conv3x3,
    CrossWindowAttention,
    DynamicGroupAttention,
    Factors,
    LayerNorm,
    Mlp,
    PatchEmbedding,
    StridedAttention,
    WindowAttention,
    advance_centroids,
    batch_norm,
    dense,
    drop_branch,
)
from tokenvit_jax.layers.conv import (
    FoldedBatchNorm,
    Weights,
    affine_product,
    conv_init,
    depthwise_init,
    product,
)
from tokenvit_jax.models.backbone import Variables
from tokenvit_jax.models.pyramid import Pyramid, PyramidSettings
from tokenvit_jax.models.settings import (
    CHANNELS,
    EXPANSION,
    BatchNormSettings,
    Rules,
    check_unused,
)
from tokenvit_jax.models.swin import windows_of
from tokenvit_jax.ops.batch_norm import SharedBy
from tokenvit_jax.valid import Flag, Number, OneOf, whole

CENTROID_RULES = ("literal", "swapped", "constant")
# Blocks that the paper compares (Table 4c). Sides of windows and stripes, and strides of keys and
# values, are those of Swin-T, CSWin-T and CMT; the last stage attends globally at 224 pixels.
BLOCKS = ("dgt", "swin", "cswin", "cmt")
WINDOW = 7
STRIPES = (1, 2, 7, 7)
STRIDES = (8, 4, 2, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DGTSettings(BatchNormSettings, PyramidSettings):
    """Settings of the Dynamic Group Transformer; the common ones are in :class:`PyramidSettings`.

    Attributes:
      stem_dim: channels of the stem.
      mlp_ratio: expansion of the IRFFN.
      num_groups: query groups per head in stages 1 to 3; stage 4 attends globally.
      top_k: number of keys that each group selects; attention is dense if this is at least H * W.
      post_norm_cosine: residual post-norm and cosine attention, as in DGT-S and DGT-B.
      head_dim: channels of the layer before pooling.
      centroid_rule: weight of the old centroid in Eq. 4: "literal" (0.1 x learning rate, the text
        of the paper), "swapped" (1 - 0.1 x learning rate) or "constant"
        (``centroid_old_weight``). The rule in the paper's text contradicts its stated purpose,
        stable centroids; experiments/dgt measures all three rules.
      centroid_old_weight: weight of the old centroid with the rule "constant", in [0, 1].
      block: "dgt", or a block with which the paper replaces it in DGT-T (Table 4c): "swin"
        (shifted windows of 7 x 7), "cswin" (cross-shaped windows) or "cmt" (attention to a shrunk
        map, between DGT's position encoding and IRFFN). Swin's and CSWin's blocks have an MLP.
    """

    valid: ClassVar[Rules] = {
        "stem_dim": CHANNELS,
        "mlp_ratio": EXPANSION,
        "num_groups": whole(1, 2**16),
        "top_k": whole(1, 2**24),
        "post_norm_cosine": Flag(),
        "head_dim": CHANNELS,
        "centroid_rule": OneOf(CENTROID_RULES),
        "centroid_old_weight": Number(0, 1),
        "block": OneOf(BLOCKS),
    }

    depths: tuple[int, ...] = (1, 2, 17, 2)
    stem_dim: int
    mlp_ratio: int = 4
    num_groups: int = 48
    top_k: int = 98
    post_norm_cosine: bool = False
    head_dim: int = 1280
    centroid_rule: str = "constant"
    centroid_old_weight: float = 0.9
    block: str = "dgt"

    def check_relations(self) -> None:
        super().check_relations()
        if self.centroid_rule != "constant":
            reason = f"centroid_rule={self.centroid_rule!r}"
            check_unused("", self, reason, ("centroid_old_weight",))
        if self.block != "dgt":
            reason = f"block={self.block!r}"
            names = ("num_groups", "top_k", "centroid_rule", "centroid_old_weight")
            check_unused("", self, reason, (*names, "post_norm_cosine"))


SIZES = {
    "dgt_t": DGTSettings(stem_dim=32, dims=(64, 128, 256, 512), num_heads=(2, 4, 8, 16)),
    "dgt_s": DGTSettings(
        stem_dim=48, dims=(96, 192, 384, 768), num_heads=(3, 6, 12, 24), post_norm_cosine=True
    ),
    "dgt_b": DGTSettings(
        stem_dim=64, dims=(128, 256, 512, 1024), num_heads=(4, 8, 16, 32), post_norm_cosine=True
    ),
}


class InvertedResidualFFN(nn.Module):
    """IRFFN of CMT (Guo et al. 2022): (B, H, W, C) -> (B, H, W, C) through ``ratio`` C channels."""

    ratio: int
    dtype: Any
    axis_name: SharedBy

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        channels, pixels = x.shape[-1], x.size // x.shape[-1]
        hidden = self.ratio * channels

        def norm(name, sums, channels=hidden, input_bias=None):
            layer = FoldedBatchNorm(axis_name=self.axis_name, name=name)
            return layer(sums, channels, pixels, input_bias, use_running_average=not train)

        # Each of the three steps on the hidden map reads and writes it once: GELU and norm1 are
        # taken along by the depthwise convolution, and norm2 by the kernel of "reduce".
        kernel, input_bias = Weights((channels, hidden), conv_init, name="expand")()
        x = product(x.astype(self.dtype), kernel)
        x, sums = ops.defer_gelu(x, input_bias, with_sums=train)
        factor, offset = norm("norm1", sums)
        kernel, bias = Weights((3, 3, hidden), depthwise_init, name="depthwise")()
        x, sums = ops.depthwise_block(
            x, kernel, bias, input_bias=input_bias, scale=factor, shift=offset,
            deferred=True, residual=True, activate=True, with_sums=train,
        )  # fmt: skip
        factor, offset = norm("norm2", sums)
        kernel, bias = Weights((hidden, channels), conv_init, name="reduce")()
        if not train:  # the kernel also takes norm3 along, whose statistics are known
            known, shift = norm("norm3", None, channels)
            x, bias = affine_product(x, known * kernel, known * bias, factor, offset)
            return x + (bias + shift).astype(x.dtype)
        x, bias = affine_product(x, kernel, bias, factor, offset)
        return ops.channel_affine(x, *norm("norm3", ops.channel_sums(x), channels, bias))


class DGTBlock(nn.Module):
    """Eqs. 8 to 10: conditional position encoding, dynamic group attention, IRFFN.

    With ``post_norm_cosine``, both branches are ``x + LN(f(x))`` with a LayerNorm that starts at
    zero, and attention is cosine attention (Swin v2; DGT-S and DGT-B). Otherwise they are
    ``x + f(LN(x))`` (DGT-T).

    Attributes:
      settings: the architecture.
      stage: stage of the block, from 0.
      index: index of the block in the network, from 0.
    """

    settings: DGTSettings
    stage: int
    index: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, factors: Factors = KEPT) -> jax.Array:
        settings = self.settings
        is_global = self.stage == len(settings.dims) - 1
        attention = DynamicGroupAttention(
            num_heads=settings.num_heads[self.stage],
            num_groups=0 if is_global else settings.num_groups,
            top_k=settings.top_k,
            cosine=settings.post_norm_cosine,
            dtype=settings.dtype,
            name="attention",
        )
        ffn = InvertedResidualFFN(
            settings.mlp_ratio, settings.dtype, settings.norm_axis, name="ffn"
        )

        def attend(x):
            tokens = x.reshape(x.shape[0], -1, x.shape[-1])  # (B, H * W, C)
            return attention(tokens, train).reshape(x.shape)

        x = ConditionalPositionEncoding(settings.dtype, name="cpe")(x)
        if settings.post_norm_cosine:
            zeros = nn.initializers.zeros
            y = LayerNorm(1e-6, settings.dtype, zeros, name="norm1")(attend(x))
            x = x + drop_branch(y, factors[0])
            y = LayerNorm(1e-6, settings.dtype, zeros, name="norm2")(ffn(x, train))
            return x + drop_branch(y, factors[1])
        x, y = AddLayerNorm(1e-6, settings.dtype, name="norm1")(x)
        x, y = AddLayerNorm(1e-6, settings.dtype, name="norm2")(x, attend(y), factors[0])
        return x + drop_branch(ffn(y, train), factors[1])


class WindowBlock(nn.Module):
    """Swin's or CSWin's block in a DGT: x + attention(LN(x)), x + MLP(LN(x)).

    The attributes are those of :class:`DGTBlock`.

    References:
      Liu et al. 2022, Table 4(c); Liu et al. 2021, "Swin Transformer"; Dong et al. 2022, "CSWin
      Transformer".
    """

    settings: DGTSettings
    stage: int
    index: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, factors: Factors = KEPT) -> jax.Array:
        settings = self.settings

        x, y = AddLayerNorm(1e-6, settings.dtype, name="norm1")(x)
        x, y = AddLayerNorm(1e-6, settings.dtype, name="norm2")(x, self._attend(y), factors[0])
        mlp = Mlp(settings.mlp_ratio, settings.dtype, name="mlp")
        return x + drop_branch(mlp(y), factors[1])

    def _attend(self, y):
        settings, heads = self.settings, self.settings.num_heads[self.stage]
        if settings.block == "cswin":
            stripe = STRIPES[self.stage]
            return CrossWindowAttention(heads, stripe, settings.dtype, name="attention")(y)
        shifted = (self.index - sum(settings.depths[: self.stage])) % 2 == 1
        window, shift = windows_of(y.shape[1:3], WINDOW, shifted)
        return WindowAttention(heads, WINDOW, settings.dtype, name="attention")(y, window, shift)


class CMTBlock(nn.Module):
    """CMT's block in a DGT: position encoding, attention to a shrunk map, IRFFN.

    The attributes are those of :class:`DGTBlock`.

    References:
      Liu et al. 2022, Table 4(c); Guo et al. 2022, "CMT".
    """

    settings: DGTSettings
    stage: int
    index: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, factors: Factors = KEPT) -> jax.Array:
        settings = self.settings
        attention = StridedAttention(
            settings.num_heads[self.stage], STRIDES[self.stage], settings.dtype,
            settings.axis_name, name="attention",
        )  # fmt: skip
        ffn = InvertedResidualFFN(
            settings.mlp_ratio, settings.dtype, settings.axis_name, name="ffn"
        )

        x = ConditionalPositionEncoding(settings.dtype, name="cpe")(x)
        x, y = AddLayerNorm(1e-6, settings.dtype, name="norm1")(x)
        y = attention(y, train)
        x, y = AddLayerNorm(1e-6, settings.dtype, name="norm2")(x, y, factors[0])
        return x + drop_branch(ffn(y, train), factors[1])


BLOCK_TYPES = {"dgt": DGTBlock, "swin": WindowBlock, "cswin": WindowBlock, "cmt": CMTBlock}


class Stem(nn.Module):
    """Three 3x3 convolutions, the first with stride 2, each followed by GELU and BatchNorm."""

    dim: int
    dtype: Any
    axis_name: SharedBy

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for i, stride in enumerate((2, 1, 1)):
            x = Conv3x3(self.dim, stride, self.dtype, name=f"conv{i}")(x)
            norm = batch_norm(
                dtype=self.dtype, axis_name=self.axis_name, with_gelu=True, name=f"norm{i}"
            )
            x = norm(x, use_running_average=not train)
        return x


class DGT(Pyramid):
    """Dynamic Group Transformer for images (B, H, W, 3) of any size from 32 x 32."""

    settings: DGTSettings

    head_modules = ("classifier", "head_conv", "head_norm")
    first_layer = "first_layers/conv0"

    @property
    def block_type(self) -> type[nn.Module]:
        """The class of the blocks."""
        return BLOCK_TYPES[self.settings.block]

    def setup(self):
        super().setup()
        settings = self.settings
        self.first_layers = Stem(settings.stem_dim, settings.dtype, settings.norm_axis)
        self.head_conv = dense(settings.head_dim, settings.dtype, init=conv_init)
        self.head_norm = batch_norm(dtype=settings.dtype, axis_name=settings.norm_axis)

    def stem(self, images: jax.Array, train: bool) -> jax.Array:
        return self.first_layers(images, train)

    def embedding(self, stage: int) -> nn.Module:
        return PatchEmbedding(self.settings.dims[stage], dtype=self.settings.dtype)

    def head(self, x: jax.Array, train: bool) -> jax.Array:
        return nn.swish(self.head_norm(self.head_conv(x), use_running_average=not train))

    @nn.nowrap
    def after_step(self, variables: Variables, learning_rate: jax.Array) -> Variables:
        """Moves the centroids by the sums of all micro-batches of the step (Eqs. 3 and 4)."""
        if "centroids" not in variables:  # there are no groups, or the step leaves them unchanged
            return variables
        moved = advance_centroids(
            variables["centroids"], self._old_weight(learning_rate), self.settings.axis_name
        )
        return {**variables, "centroids": moved}

    @nn.nowrap
    def _old_weight(self, learning_rate):
        match self.settings.centroid_rule:
            case "literal":
                return 0.1 * learning_rate
            case "swapped":
                return 1.0 - 0.1 * learning_rate
            case "constant":
                return self.settings.centroid_old_weight
