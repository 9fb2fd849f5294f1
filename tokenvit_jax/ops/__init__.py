"""Token operators as pure functions on arrays: no parameters, no modules, no configuration."""

from tokenvit_jax.ops.attention import dot_product_attention
from tokenvit_jax.ops.depthwise_conv import depthwise_conv
from tokenvit_jax.ops.group_attention import (
    GroupAttention,
    GroupSums,
    group_attention,
    group_sums,
    move_centroids,
    update_centroids,
)

__all__ = [
    "GroupAttention",
    "GroupSums",
    "depthwise_conv",
    "dot_product_attention",
    "group_attention",
    "group_sums",
    "move_centroids",
    "update_centroids",
]
