"""Linen modules that several backbones or heads share."""

from tokenvit_jax.layers.blocks import (
    ACTIVATIONS,
    ConditionalPositionEncoding,
    DenseParts,
    Mlp,
    PatchEmbedding,
    dense,
)
from tokenvit_jax.layers.cluster_attention import ClusterAttention
from tokenvit_jax.layers.conv import (
    Conv,
    Conv3x3,
    ConvModule,
    PatchConvTranspose,
    ResidualConvUnit,
    batch_norm,
    uniform_init,
)
from tokenvit_jax.layers.cross_window_attention import CrossWindowAttention
from tokenvit_jax.layers.deformable_attention import DeformableAttention, cell_centers
from tokenvit_jax.layers.group_attention import DynamicGroupAttention, advance_centroids
from tokenvit_jax.layers.norm import AddLayerNorm, BatchNorm, GroupNorm, LayerNorm
from tokenvit_jax.layers.pale_attention import PaleAttention
from tokenvit_jax.layers.self_attention import Attended, Attention
from tokenvit_jax.layers.stochastic import (
    KEPT,
    ChannelDropout,
    Dropout,
    DropPaths,
    Factors,
    drop_branch,
)
from tokenvit_jax.layers.strided_attention import StridedAttention
from tokenvit_jax.layers.window_attention import CosineWindowAttention, WindowAttention
from tokenvit_jax.ops import gelu

__all__ = [
    "ACTIVATIONS",
    "KEPT",
    "AddLayerNorm",
    "Attended",
    "Attention",
    "BatchNorm",
    "ChannelDropout",
    "ClusterAttention",
    "ConditionalPositionEncoding",
    "Conv",
    "Conv3x3",
    "ConvModule",
    "CosineWindowAttention",
    "CrossWindowAttention",
    "DeformableAttention",
    "DenseParts",
    "DropPaths",
    "Dropout",
    "DynamicGroupAttention",
    "Factors",
    "GroupNorm",
    "LayerNorm",
    "Mlp",
    "PaleAttention",
    "PatchConvTranspose",
    "PatchEmbedding",
    "ResidualConvUnit",
    "StridedAttention",
    "WindowAttention",
    "advance_centroids",
    "batch_norm",
    "cell_centers",
    "dense",
    "drop_branch",
    "gelu",
    "uniform_init",
]
