"""ClusTR: efficient self-attention via clustering (Figure 3 and Table A1)."""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax

from tokenvit_jax import ops
from tokenvit_jax.layers import (
    KEPT,
    AddLayerNorm,
    ClusterAttention,
    Factors,
    LayerNorm,
    PatchEmbedding,
    dense,
    drop_branch,
)
from tokenvit_jax.layers.cluster_attention import CLUSTERING, RATIOS, check_ratios
from tokenvit_jax.layers.conv import Weights, depthwise_init, linear_init, product
from tokenvit_jax.models.pyramid import Pyramid, PyramidSettings
from tokenvit_jax.models.settings import EXPANSION, Rules, check_unused
from tokenvit_jax.valid import Several


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusTRSettings(PyramidSettings):
    """Settings of ClusTR; the common ones are in :class:`PyramidSettings`.

    Attributes:
      mlp_ratios: expansion of the feed-forward networks of the stages.
      ratios: token reduction of each scale of the stages; 1: attention with all tokens.
      aggregation: how keys and values are reduced: "clusters", or a "grid" of convolutions.
      assign: cluster of a token that is not a centre: the "nearest" centre's or its "parent"'s.
      adaptive: fraction of the clusters that images use on average, chosen by content; 0: all.
    """

    valid: ClassVar[Rules] = {
        "mlp_ratios": Several(EXPANSION), "ratios": Several(RATIOS), **CLUSTERING
    }  # fmt: skip

    mlp_ratios: tuple[int, ...] = (8, 8, 4, 4)
    ratios: tuple[tuple[int, ...], ...] = ((64, 16), (16, 4), (4, 1), (1,))
    aggregation: str = "clusters"
    assign: str = "nearest"
    adaptive: float = 0.0

    def check_relations(self) -> None:
        super().check_relations()
        for ratios in self.ratios:
            check_ratios(ratios, self.aggregation)
        if self.aggregation == "grid":
            check_unused("", self, "aggregation='grid'", ("assign", "adaptive"))


SIZES = {
    "clustr_t": ClusTRSettings(
        dims=(64, 128, 256, 512), num_heads=(1, 2, 4, 8), depths=(1, 2, 6, 1)
    ),
    "clustr_s": ClusTRSettings(
        dims=(64, 128, 256, 512), num_heads=(1, 2, 4, 8), depths=(3, 5, 13, 2)
    ),
    "clustr_b": ClusTRSettings(
        dims=(64, 128, 320, 512), num_heads=(1, 2, 5, 8), depths=(3, 5, 18, 3)
    ),
}


class ConvFFN(nn.Module):
    """Feed-forward network of ``ratio`` C channels with a depthwise convolution on maps."""

    ratio: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        hidden = self.ratio * channels
        kernel, input_bias = Weights((channels, hidden), linear_init, name="fc1")()
        x = product(x.astype(self.dtype), kernel)
        kernel, bias = Weights((3, 3, hidden), depthwise_init, name="depthwise")()
        x, _ = ops.depthwise_block(
            x, kernel, bias, input_bias=input_bias, residual=True, activate=True
        )
        return dense(channels, self.dtype, "fc2")(x)


class ClusTRBlock(nn.Module):
    """Eq. 9: x + attention(LN(x)), x + FFN(LN(x)).

    Attributes:
      settings: the architecture.
      stage: stage of the block, from 0.
      index: index of the block in the network, from 0.
    """

    settings: ClusTRSettings
    stage: int
    index: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, factors: Factors = KEPT) -> jax.Array:
        settings, stage = self.settings, self.stage
        attention = ClusterAttention(
            num_heads=settings.num_heads[stage],
            ratios=settings.ratios[stage],
            aggregation=settings.aggregation,
            assign=settings.assign,
            adaptive=settings.adaptive,
            dtype=settings.dtype,
            axis_name=settings.axis_name,
            name="attention",
        )

        def norm(name):
            return AddLayerNorm(1e-6, settings.dtype, name=name)

        x, y = norm("norm1")(x)
        x, y = norm("norm2")(x, attention(y, train), factors[0])
        ffn = ConvFFN(settings.mlp_ratios[stage], settings.dtype, name="ffn")
        return x + drop_branch(ffn(y), factors[1])


class ClusTR(Pyramid):
    """ClusTR for images (B, H, W, 3) of any size from 32 x 32."""

    settings: ClusTRSettings

    block_type = ClusTRBlock
    has_normed_maps = True

    def setup(self):
        super().setup()
        self.norms = [LayerNorm(1e-6, self.settings.dtype) for _ in range(len(self.settings.dims))]

    def embedding(self, stage: int) -> nn.Module:
        kernel_size, stride, padding = (7, 4, 3) if stage == 0 else (3, 2, 1)
        return PatchEmbedding(
            self.settings.dims[stage], kernel_size, stride, padding, epsilon=1e-5,
            dtype=self.settings.dtype,
        )  # fmt: skip

    def end_stage(self, stage: int, x: jax.Array) -> jax.Array:
        return self.norms[stage](x)
