"""Dynamic Group Transformer (Liu et al. 2022), Figure 2 and Table 1."""

from typing import Any

import flax.linen as nn
import jax

from tokenvit_jax.layers import (
    ConditionalPositionEncoding,
    Conv3x3,
    DepthwiseConv3x3,
    DropPath,
    DynamicGroupAttention,
    PatchEmbedding,
    batch_norm,
    gelu,
)
from tokenvit_jax.layers.conv import conv_init
from tokenvit_jax.models.pyramid import Pyramid
from tokenvit_jax.models.registry import register


class InvertedResidualFFN(nn.Module):
    """IRFFN of CMT (Guo et al. 2022): (B, H, W, C) -> (B, H, W, C) through ``ratio`` C channels."""

    ratio: int
    dtype: Any
    axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        channels = x.shape[-1]

        def norm(x, name):
            layer = batch_norm(dtype=self.dtype, axis_name=self.axis_name, name=name)
            return layer(x, use_running_average=not train)

        def conv1x1(x, dim, name):
            return nn.Dense(dim, dtype=self.dtype, kernel_init=conv_init, name=name)(x)

        x = norm(gelu(conv1x1(x, self.ratio * channels, "expand")), "norm1")
        x = x + DepthwiseConv3x3(dtype=self.dtype, name="depthwise")(x)
        x = norm(gelu(x), "norm2")
        return norm(conv1x1(x, channels, "reduce"), "norm3")


class DGTBlock(nn.Module):
    """Eqs. 8 to 10: conditional position encoding, dynamic group attention, IRFFN.

    With ``post_norm_cosine`` both branches are ``x + LN(f(x))`` with LN starting at zero, and
    attention is cosine attention (Swin v2; DGT-S and DGT-B), else ``x + f(LN(x))`` (DGT-T).
    """

    num_heads: int
    num_groups: int
    top_k: int
    mlp_ratio: int
    drop_path: float
    post_norm_cosine: bool
    dtype: Any
    axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        attention = DynamicGroupAttention(
            self.num_heads, self.num_groups, self.top_k, self.post_norm_cosine, self.dtype,
            name="attention",
        )  # fmt: skip
        ffn = InvertedResidualFFN(self.mlp_ratio, self.dtype, self.axis_name, name="ffn")

        def attend(x):
            tokens = x.reshape(x.shape[0], -1, x.shape[-1])  # (B, H * W, C)
            return attention(tokens, train).reshape(x.shape)

        x = ConditionalPositionEncoding(self.dtype, name="cpe")(x)
        x = self._residual(x, attend, "norm1", train)
        return self._residual(x, lambda x: ffn(x, train), "norm2", train)

    def _residual(self, x, branch, norm_name, train):
        scale_init = nn.initializers.zeros if self.post_norm_cosine else nn.initializers.ones
        norm = nn.LayerNorm(1e-6, dtype=self.dtype, scale_init=scale_init, name=norm_name)
        y = norm(branch(x)) if self.post_norm_cosine else branch(norm(x))
        return x + DropPath(self.drop_path, self.axis_name)(y, train)


class Stem(nn.Module):
    """Three 3x3 convolutions, the first of stride 2, each followed by GELU and BatchNorm."""

    dim: int
    dtype: Any
    axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for i, stride in enumerate((2, 1, 1)):
            x = gelu(Conv3x3(self.dim, stride, self.dtype, name=f"conv{i}")(x))
            norm = batch_norm(dtype=self.dtype, axis_name=self.axis_name, name=f"norm{i}")
            x = norm(x, use_running_average=not train)
        return x


class DGT(Pyramid, kw_only=True):
    """Dynamic Group Transformer for images (B, H, W, 3) of any size from 32 x 32.

    Attributes, beside those of :class:`Pyramid`:
      stem_dim: channels of the stem.
      mlp_ratio: expansion of the IRFFN.
      num_groups: query groups per head in stages 1 to 3; stage 4 attends globally.
      top_k: keys that each group selects; where it is not below H * W, attention is dense.
      post_norm_cosine: residual post-norm and cosine attention, of DGT-S and DGT-B.
      head_dim: channels of the layer before pooling.
    """

    stem_dim: int
    depths: tuple[int, ...] = (1, 2, 17, 2)
    mlp_ratio: int = 4
    num_groups: int = 48
    top_k: int = 98
    post_norm_cosine: bool = False
    head_dim: int = 1280

    def setup(self):
        super().setup()
        self.first_layers = Stem(self.stem_dim, self.dtype, self.axis_name)
        self.head_conv = nn.Dense(self.head_dim, dtype=self.dtype, kernel_init=conv_init)
        self.head_norm = batch_norm(dtype=self.dtype, axis_name=self.axis_name)

    def stem(self, images: jax.Array, train: bool) -> jax.Array:
        return self.first_layers(images, train)

    def embedding(self, stage: int) -> nn.Module:
        return PatchEmbedding(self.dims[stage], dtype=self.dtype)

    def block(self, stage: int, index: int) -> tuple[type[nn.Module], dict[str, Any]]:
        is_global = stage == len(self.dims) - 1
        return DGTBlock, {
            "num_heads": self.num_heads[stage],
            "num_groups": 0 if is_global else self.num_groups,
            "top_k": self.top_k,
            "mlp_ratio": self.mlp_ratio,
            "post_norm_cosine": self.post_norm_cosine,
            "dtype": self.dtype,
            "axis_name": self.axis_name,
        }

    def head(self, x: jax.Array, train: bool) -> jax.Array:
        return nn.swish(self.head_norm(self.head_conv(x), use_running_average=not train))


@register
def dgt_t(**kwargs) -> DGT:
    return DGT(**{"stem_dim": 32, "dims": (64, 128, 256, 512), "num_heads": (2, 4, 8, 16)} | kwargs)


@register
def dgt_s(**kwargs) -> DGT:
    settings = {"stem_dim": 48, "dims": (96, 192, 384, 768), "num_heads": (3, 6, 12, 24)}
    return DGT(**settings | {"post_norm_cosine": True} | kwargs)


@register
def dgt_b(**kwargs) -> DGT:
    settings = {"stem_dim": 64, "dims": (128, 256, 512, 1024), "num_heads": (4, 8, 16, 32)}
    return DGT(**settings | {"post_norm_cosine": True} | kwargs)
