"""Token operators as pure functions on arrays: no parameters, no modules, no configuration."""

from tokenvit_jax.ops.adaptive_pooling import adaptive_average_pool
from tokenvit_jax.ops.anchors import cell_anchors, grid_anchors, inside_image, valid_anchors
from tokenvit_jax.ops.assignment import assign_targets
from tokenvit_jax.ops.attention import (
    ScoredAttention,
    attention_weights,
    dot_product_attention,
    scored_attention,
)
from tokenvit_jax.ops.batch_norm import (
    BatchAffine,
    BatchAffineGradient,
    affine_gradient,
    affine_of,
    batch_norm,
)
from tokenvit_jax.ops.boxes import box_areas, box_iou, clip_boxes, decode_boxes, encode_boxes
from tokenvit_jax.ops.channel_affine import channel_affine, channel_sums
from tokenvit_jax.ops.clustered_attention import (
    clustered_attention,
    hash_clusters,
    query_prototypes,
)
from tokenvit_jax.ops.convolution import conv, conv_of_resized, conv_with_padding
from tokenvit_jax.ops.deformable_attention import deformable_attention
from tokenvit_jax.ops.density_peaks import (
    Clusters,
    DensityPeaks,
    assign_clusters,
    cluster_density_peaks,
    density_peaks,
    used_clusters,
)
from tokenvit_jax.ops.depthwise_conv import (
    defer_gelu,
    depthwise_block,
    depthwise_branches,
    depthwise_conv,
)
from tokenvit_jax.ops.gelu import bias_gelu, gelu
from tokenvit_jax.ops.group_attention import (
    GroupAttention,
    GroupSums,
    group_attention,
    group_sums,
    move_centroids,
    update_centroids,
)
from tokenvit_jax.ops.group_norm import group_norm
from tokenvit_jax.ops.heatmaps import (
    HeatmapTargets,
    Keypoints,
    average_mirrored,
    decode_heatmaps,
    heatmap_loss,
    heatmap_targets,
)
from tokenvit_jax.ops.instance_masks import mask_targets, paste_masks, unpack_masks
from tokenvit_jax.ops.layer_norm import add_layer_norm, layer_norm
from tokenvit_jax.ops.linear import linear_parts, linear_product
from tokenvit_jax.ops.masked_attention import masked_attention
from tokenvit_jax.ops.match_boxes import Sample, match_boxes, sample_matches
from tokenvit_jax.ops.merge_tokens import merge_tokens
from tokenvit_jax.ops.nms import nms
from tokenvit_jax.ops.pale_attention import pale_attention
from tokenvit_jax.ops.positions import sine_positions
from tokenvit_jax.ops.reconstruct_tokens import reconstruct_tokens
from tokenvit_jax.ops.resize import resize_bilinear, resize_nearest
from tokenvit_jax.ops.roi_align import roi_align, roi_levels
from tokenvit_jax.ops.rollout import attention_rollout
from tokenvit_jax.ops.sample_points import sample_maps, sample_objects, uncertain_points
from tokenvit_jax.ops.select_detections import Selection, select_detections
from tokenvit_jax.ops.standardize import standardize_kernels
from tokenvit_jax.ops.superpixels import cluster_superpixels
from tokenvit_jax.ops.token_merging import bipartite_matching
from tokenvit_jax.ops.token_pooling import Means, Medoids, kmeans, kmedoids
from tokenvit_jax.ops.window_attention import relative_position_bias, window_attention

__all__ = [
    "BatchAffine",
    "BatchAffineGradient",
    "Clusters",
    "DensityPeaks",
    "GroupAttention",
    "GroupSums",
    "HeatmapTargets",
    "Keypoints",
    "Means",
    "Medoids",
    "Sample",
    "ScoredAttention",
    "Selection",
    "adaptive_average_pool",
    "add_layer_norm",
    "affine_gradient",
    "affine_of",
    "assign_clusters",
    "assign_targets",
    "attention_rollout",
    "attention_weights",
    "average_mirrored",
    "batch_norm",
    "bias_gelu",
    "bipartite_matching",
    "box_areas",
    "box_iou",
    "cell_anchors",
    "channel_affine",
    "channel_sums",
    "clip_boxes",
    "cluster_density_peaks",
    "cluster_superpixels",
    "clustered_attention",
    "conv",
    "conv_of_resized",
    "conv_with_padding",
    "decode_boxes",
    "decode_heatmaps",
    "defer_gelu",
    "deformable_attention",
    "density_peaks",
    "depthwise_block",
    "depthwise_branches",
    "depthwise_conv",
    "dot_product_attention",
    "encode_boxes",
    "gelu",
    "grid_anchors",
    "group_attention",
    "group_norm",
    "group_sums",
    "hash_clusters",
    "heatmap_loss",
    "heatmap_targets",
    "inside_image",
    "kmeans",
    "kmedoids",
    "layer_norm",
    "linear_parts",
    "linear_product",
    "mask_targets",
    "masked_attention",
    "match_boxes",
    "merge_tokens",
    "move_centroids",
    "nms",
    "pale_attention",
    "paste_masks",
    "query_prototypes",
    "reconstruct_tokens",
    "relative_position_bias",
    "resize_bilinear",
    "resize_nearest",
    "roi_align",
    "roi_levels",
    "sample_maps",
    "sample_matches",
    "sample_objects",
    "scored_attention",
    "select_detections",
    "sine_positions",
    "standardize_kernels",
    "uncertain_points",
    "unpack_masks",
    "update_centroids",
    "used_clusters",
    "valid_anchors",
    "window_attention",
]
