"""ClusTR: efficient self-attention via clustering (Figure 3 and Table A1)."""

from typing import Any

import flax.linen as nn
import jax

from tokenvit_jax.layers import (
    ClusterAttention,
    DepthwiseConv3x3,
    DropPath,
    PatchEmbedding,
    dense,
    gelu,
)
from tokenvit_jax.models.pyramid import Pyramid
from tokenvit_jax.models.registry import register


class ConvFFN(nn.Module):
    """(B, H, W, C) -> (B, H, W, C) through ``ratio`` C channels that see their neighbours."""

    ratio: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        x = dense(self.ratio * channels, self.dtype, "fc1")(x)
        x = gelu(x + DepthwiseConv3x3(dtype=self.dtype, name="depthwise")(x))
        return dense(channels, self.dtype, "fc2")(x)


class ClusTRBlock(nn.Module):
    """Eq. 9: x + attention(LN(x)), x + FFN(LN(x)). ``attention``: of :class:`ClusterAttention`."""

    attention: dict[str, Any]
    mlp_ratio: int
    drop_path: float
    dtype: Any
    axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        def norm(x, name):
            return nn.LayerNorm(1e-6, dtype=self.dtype, name=name)(x)

        def drop_path(x):
            return DropPath(self.drop_path, self.axis_name)(x, train)

        attention = ClusterAttention(
            **self.attention, dtype=self.dtype, axis_name=self.axis_name, name="attention"
        )
        x = x + drop_path(attention(norm(x, "norm1"), train))
        ffn = ConvFFN(self.mlp_ratio, self.dtype, name="ffn")
        return x + drop_path(ffn(norm(x, "norm2")))


class ClusTR(Pyramid, kw_only=True):
    """ClusTR for images (B, H, W, 3) of any size from 32 x 32.

    Attributes, beside those of :class:`Pyramid`:
      mlp_ratios: expansion of the feed-forward networks of the stages.
      ratios: token reduction of each scale of the stages; 1: attention with all tokens.
      aggregation: how keys and values are reduced: "clusters", or a "grid" of convolutions.
      assign: cluster of a token that is no centre: the "nearest" centre's or its "parent"'s.
      adaptive: part of the clusters that images use on average, chosen by content; 0: all.
    """

    mlp_ratios: tuple[int, ...] = (8, 8, 4, 4)
    ratios: tuple[tuple[int, ...], ...] = ((64, 16), (16, 4), (4, 1), (1,))
    aggregation: str = "clusters"
    assign: str = "nearest"
    adaptive: float = 0.0

    def setup(self):
        super().setup()
        self.norms = [nn.LayerNorm(1e-6, dtype=self.dtype) for _ in self.dims]

    def embedding(self, stage: int) -> nn.Module:
        kernel_size, stride, padding = (7, 4, 3) if stage == 0 else (3, 2, 1)
        return PatchEmbedding(
            self.dims[stage], kernel_size, stride, padding, epsilon=1e-5, dtype=self.dtype
        )

    def block(self, stage: int, index: int) -> tuple[type[nn.Module], dict[str, Any]]:
        attention = {
            "num_heads": self.num_heads[stage],
            "ratios": self.ratios[stage],
            "aggregation": self.aggregation,
            "assign": self.assign,
            "adaptive": self.adaptive,
        }
        return ClusTRBlock, {
            "attention": attention,
            "mlp_ratio": self.mlp_ratios[stage],
            "dtype": self.dtype,
            "axis_name": self.axis_name,
        }

    def end_stage(self, stage: int, x: jax.Array) -> jax.Array:
        return self.norms[stage](x)


@register
def clustr_t(**kwargs) -> ClusTR:
    return _clustr((64, 128, 256, 512), (1, 2, 4, 8), (1, 2, 6, 1), **kwargs)


@register
def clustr_s(**kwargs) -> ClusTR:
    return _clustr((64, 128, 256, 512), (1, 2, 4, 8), (3, 5, 13, 2), **kwargs)


@register
def clustr_b(**kwargs) -> ClusTR:
    return _clustr((64, 128, 320, 512), (1, 2, 5, 8), (3, 5, 18, 3), **kwargs)


def _clustr(dims, num_heads, depths, **kwargs):
    return ClusTR(**{"dims": dims, "num_heads": num_heads, "depths": depths} | kwargs)
