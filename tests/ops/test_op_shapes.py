"""Public operators have the shapes that their types state."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jaxtyping import Array, Float
from shape_checks import check_call, missing_annotations, public_callables, trace_checked

from tokenvit_jax import kernels, ops
from tokenvit_jax.kernels import cudnn
from tokenvit_jax.kernels.channel_maps import Tiles
from tokenvit_jax.kernels.depthwise_block import Block
from tokenvit_jax.kernels.group_attention_sorted import SortedGroups
from tokenvit_jax.kernels.group_attention_tiles import plan_tiles
from tokenvit_jax.ops.center_tiles import make_tiles
from tokenvit_jax.ops.nearest_tokens import Neighbors

CONTEXTS = (
    "cudnn.assumed",
    "platforms.default_forms",
    "platforms.kernels_traced_once",
    "platforms.noted_misfits",
    "platforms.traced_for",
)
FUNCTIONS = {
    name: function
    for package in (ops, kernels)
    for name, function in public_callables(package)
    if not isinstance(function, type) and name not in CONTEXTS
}
KEY = jax.random.key(0)


def floats(*shape, dtype=jnp.float32):
    return jnp.asarray(np.ones(shape, dtype))  # nothing is compiled


def integers(*shape):
    return jnp.asarray(np.zeros(shape, np.int32))


def masks(*shape):
    return jnp.asarray(np.ones(shape, bool))


Q, K = floats(2, 11, 3, 8), floats(2, 13, 3, 8)
SHORT = [floats(*x.shape, dtype=jnp.bfloat16) for x in (Q, K, K)]
HEADS_FIRST = floats(2, 3, 11, 8)
SHORT_HEADS_FIRST = floats(*HEADS_FIRST.shape, dtype=jnp.bfloat16)
MAP = floats(2, 6, 4, 2, 5)
TOKEN_SPEC = pl.BlockSpec((None, 11, None, 8), lambda b, n: (b, 0, n, 0))
TOKENS, SQUARES = floats(2, 30, 7), floats(2, 30)
GRID, CLUSTERS = (6, 5), (3, 2)
TILES = make_tiles(GRID, CLUSTERS, 3)
PEAKS = ops.DensityPeaks(floats(2, 30), floats(2, 30), integers(2, 30))
NEAR = Neighbors(floats(2, 5, 30), integers(2, 5, 30), floats(2))
PLAN = plan_tiles(integers(2, 3, 11), 4, 4)
AFFINE = ops.BatchAffine(*(floats(7),) * 4)
SORTED = SortedGroups(
    integers(2, 3, 12), integers(2, 3, 5), integers(2, 3, 4, 6),
    jnp.zeros((2, 3, 4, 11), jnp.int16),
)  # fmt: skip
SUMS = ops.GroupSums(floats(3, 4, 8), floats(3, 4))
RATIOS = (0.5, 1, 2)

# Arguments of each function; all sizes that may differ do differ.
CALLS = {
    "adaptive_pooling.adaptive_average_pool": [((floats(2, 6, 4, 5), 3), {})],
    "anchors.cell_anchors": [(([8, 16], RATIOS), {})],
    "anchors.grid_anchors": [(([(6, 4)], [8], [np.zeros((3, 4), np.float32)]), {})],
    "anchors.inside_image": [((floats(11, 4), integers(2)), {})],
    "anchors.valid_anchors": [(([(6, 4), (3, 2)], [8, 16], 3, integers(2)), {})],
    "arithmetic.exp2": [((TOKENS,), {})],
    "arithmetic.fma": [((TOKENS, 2.0, TOKENS[..., :1]), {})],
    "arithmetic.maximum": [((TOKENS, 0), {})],
    "arithmetic.minimum": [((TOKENS, TOKENS[..., :1]), {})],
    "arithmetic.narrow": [((TOKENS, jnp.bfloat16), {}), ((TOKENS, jnp.float16), {})],
    "arithmetic.negative": [((TOKENS,), {})],
    "arithmetic.reciprocal": [((TOKENS,), {})],
    "arithmetic.widen": [((TOKENS.astype(jnp.bfloat16),), {}), ((TOKENS,), {})],
    "assignment.assign_of_images": [((floats(2, 5, 11), masks(2, 5)), {"interpret": True})],
    "assignment.assign_targets": [((floats(2, 11, 5), masks(2, 5)), {})],
    "assignment.assignment_misfit": [((100,), {})],
    "attention.attend": [
        ((floats(2, 11, 8), floats(2, 13, 8), floats(2, 13, 5), masks(13), floats(11, 1)), {})
    ],
        "attention.attend_by_cudnn": [((*SHORT, masks(2, 13)), {"scale": 1.0})],
    "attention.attend_by_library": [((Q, K, K, None), {"scale": 1.0})],
    "attention.attend_heads_first": [((Q, K, K, masks(2, 13)), {"scale": 1.0})],
    "attention.attention_weights": [((Q, K), {}), ((Q, K, floats(2, 13)), {"scale": 1})],
    "attention.check_qkv": [((Q, K, K), {})],
    "attention.dot_product_attention": [
        ((Q, K, K), {}),
        ((Q, K, K), {"key_mask": masks(2, 13), "scale": 1}),
        ((Q.astype(jnp.bfloat16),) * 3, {}),
    ],
    "attention.scored_attention": [((Q, K, K), {}), ((Q, K, K, floats(2, 13)), {})],
    "batch_norm.affine_gradient": [((floats(2, 7), floats(2, 7), 60, AFFINE, 1e-5), {})],
    "batch_norm.affine_of": [((floats(2, 7), 60, floats(7), floats(7), 1e-5), {})],
    "batch_norm.batch_norm": [
        ((TOKENS, floats(7), floats(7)), {"epsilon": 1e-5, "with_gelu": True}),
        ((TOKENS.astype(jnp.bfloat16), floats(7), floats(7)), {"epsilon": 1e-5}),
    ],
    "batch_norm.global_count": [((TOKENS, None), {})],
    "batch_norm.num_sharing": [((None,), {})],
    "batch_norm.over_devices": [((floats(2, 7), None), {})],
    "boxes.box_areas": [((floats(2, 11, 4),), {})],
    "boxes.box_iou": [((floats(11, 1, 4), floats(11, 7, 4)), {})],
    "boxes.clip_boxes": [((floats(2, 11, 4), integers(2)), {})],
    "boxes.decode_boxes": [
        ((floats(11, 4), floats(11, 4), (*RATIOS, 1)), {}),
        ((floats(11, 4), floats(11, 4), (*RATIOS, 1), integers(2)), {}),
    ],
    "boxes.encode_boxes": [((floats(11, 4), floats(11, 4), (*RATIOS, 1)), {})],
    "center_tiles.add_windows": [((floats(2, *TILES.centers.shape, 7), TILES), {})],
    "center_tiles.check_grid": [(("tokens", TOKENS, "grid", GRID), {})],
    "center_tiles.check_temperature": [((50.0,), {})],
    "center_tiles.check_tokens": [(("tokens", TOKENS), {})],
    "center_tiles.check_window": [((3,), {})],
    "center_tiles.make_tiles": [((GRID, CLUSTERS, 3), {})],
    "center_tiles.mix_rows_and_columns": [
        ((TOKENS, GRID, (np.zeros((2, 4), int), np.ones((2, 4))),
          (np.zeros((3, 2), int), np.ones((3, 2)))), {})
    ],
    "center_tiles.near_weights": [
        ((floats(2, *TILES.tokens.shape, 7), floats(2, 6, 7), TILES, 50.0), {})
    ],
    "center_tiles.per_map": [((2.0, TOKENS), {}), ((floats(2), TOKENS), {})],
    "center_tiles.take_all": [((TOKENS, np.zeros((3, 4), int)), {})],
    "channel_affine.channel_affine": [((floats(2, 6, 4, 5), floats(5), floats(5)), {})],
    "channel_affine.channel_sums": [((floats(2, 6, 4, 5),), {})],
    "channel_affine.per_device": [((floats(2, 5),), {})],
    "channel_maps.run": [
        ((partial(lambda refs: None), Tiles.of((2, 3, 5)), {"x": floats(2, 3, 5)}, {}),
         {"sums": 1, "interpret": True}),
    ],
    "channel_sums.gelu": [((TOKENS,), {})],
    "channel_sums.gelu_and_slope": [((TOKENS,), {})],
    "channel_sums.gelu_backward": [
        ((floats(2, 3, 2, 5), floats(2, 5), floats(2, 3, 2, 5), floats(5)), {"interpret": True}),
    ],
    "channel_sums.gelu_forward": [((TOKENS, floats(7)), {"interpret": True})],
    "channel_sums.gelu_sums": [((floats(2, 3, 2, 5), floats(5)), {"interpret": True})],
    "channel_sums.misfit": [(((2, 3, 5),), {})],
    "channel_sums.product_sums": [
        ((floats(2, 3, 2, 5), floats(2, 3, 2, 5)), {"interpret": True}),
        ((floats(2, 3, 2, 5), None), {"interpret": True}),
    ],
    "channel_sums.with_sums_gradient": [((SQUARES, SQUARES, [floats(1, 30)] * 2), {})],
    "chunked.map_queries": [((lambda q: q, 13, HEADS_FIRST), {})],
    "chunked.num_chunks": [((2, 3, 11, 13), {})],
    "chunked.one_by_one": [((jnp.add, TOKENS, TOKENS), {})],
    "chunks.chunk_tokens": [((1 << 20, 2, 30, 7), {})],
    "chunks.num_chunks": [((30, 7), {})],
    "cluster_sums.means_by_kernel": [
        ((TOKENS, integers(2, 30), SQUARES, 5, 1e-6), {})
    ],
    "cluster_sums.sums_by_kernel": [((TOKENS, integers(2, 30), 5), {})],
    "cluster_sums.sums_by_products": [((TOKENS, integers(2, 30), 5), {})],
    "cluster_sums.sums_by_scatter": [((TOKENS, integers(2, 30), 5), {})],
    "cluster_sums_tpu.means": [((TOKENS, integers(2, 30), SQUARES, 5, 1e-6), {})],
    "cluster_sums_tpu.misfit": [((5, 7, jnp.float32), {})],
    "clustered_attention.clustered_attention": [((Q, K, K, integers(2, 3, 9), 5), {"scale": 1.0})],
    "clustered_attention.hash_clusters": [((Q, 5), {})],
    "clustered_attention.query_prototypes": [((Q, integers(2, 3, 11), 5), {})],
    "convolution.conv": [
        ((floats(2, 6, 4, 5), floats(3, 3, 5, 7)), {}),
        ((floats(2, 6, 5, 5), floats(3, 3, 5, 7), 2), {}),
    ],
    "convolution.conv_of_resized": [
        (([floats(2, 6, 4, 5), floats(2, 3, 2, 1)], floats(3, 3, 6, 7), (6, 4)), {})
    ],
    "convolution.conv_with_padding": [
        ((floats(2, 6, 4, 5), floats(3, 3, 5, 7), 2, ((0, 1), (1, 1))), {})
    ],
    "counted.counted": [((lambda inputs, outputs: 0,), {})],
    "counted.counted_as": [(("name", 1, lambda x: x), {})],
    "cudnn.attend": [(SHORT, {"scale": 1.0}), (SHORT, {"scale": 1.0, "key_bias": floats(2, 13)})],
    "cudnn.attend_augmented": [((*SHORT[:2], SHORT[2][..., :5]), {})],
    "cudnn.available": [((), {})],
    "cudnn.misfit": [(SHORT, {}), (SHORT, {"extra": 3})],
    "cudnn.split_in_three": [((floats(2, 13), jnp.bfloat16), {})],
    "density_peaks.assign_clusters": [
        ((TOKENS, PEAKS, 5), {}), ((TOKENS, PEAKS, 5), {"threshold": floats()})
    ],
    "density_peaks.cluster_density_peaks": [
        ((TOKENS, 5), {}),
        ((TOKENS, 5), {"mask": masks(2, 30), "rng": KEY, "assign": "parent", "chunk_size": 16}),
    ],
    "density_peaks.density_peaks": [
        ((TOKENS,), {"rng": jax.random.split(KEY, 2)}),
        ((TOKENS,), {"rng": jax.random.PRNGKey(0)}),
    ],
    "density_peaks.insert_entry": [
        ((floats(9), integers(9), (floats(9),) * 3, (integers(9),) * 3), {})
    ],
    "density_peaks.is_denser": [((SQUARES, integers(30), SQUARES, integers(30)), {})],
    "density_peaks.misfit": [((7, 5), {})],
    "density_peaks.nearest_center": [((TOKENS, SQUARES, integers(2, 5), integers(2)), {})],
    "density_peaks.nearest_denser": [
        ((TOKENS, SQUARES, SQUARES, SQUARES, floats(2, 5, 30), integers(2, 5, 30)), {})
    ],
    "density_peaks.nearest_neighbors": [((TOKENS, SQUARES, SQUARES), {"k": 5, "masked": False})],
    "density_peaks.squared_distances": [((SQUARES, SQUARES, jnp.bfloat16), {})],
    "density_peaks.used_clusters": [((PEAKS, integers(2, 5), 0.5), {})],
    "density_peaks_tpu.misfit": [((30, 7, jnp.float32, 5, False), {})],
    "density_peaks_tpu.nearest_center": [((TOKENS, floats(2, 5, 7), integers(2)), {})],
    "density_peaks_tpu.nearest_denser": [((TOKENS, SQUARES, SQUARES), {})],
    "density_peaks_tpu.nearest_neighbors": [((TOKENS, SQUARES), {"k": 5})],
    "deformable_attention.deformable_attention": [
        ((floats(2, 30, 3, 8), floats(2, 11, 3, 2, 5, 2), floats(2, 11, 3, 2, 5)),
         {"shapes": ((4, 6), (2, 3))}),
    ],
    "depthwise_block.block_backward": [
        ((floats(2, 3, 2, 5), None, floats(2, 3, 2, 5), None, floats(3, 3, 5), None, None, None),
         {"block": Block(), "interpret": True}),
    ],
    "depthwise_block.block_forward": [
        ((floats(2, 3, 2, 5), floats(3, 3, 5), None, None, None, None),
         {"block": Block(activate=True, with_sums=True), "differentiable": flag,
          "interpret": True})
        for flag in (True, False)
    ],
    "depthwise_block.branches_forward": [
        ((floats(2, 3, 2, 5), floats(3, 3, 3, 5)), {"with_sums": flag, "interpret": True})
        for flag in (True, False)
    ],
    "depthwise_block.misfit": [(((2, 3, 2, 5),), {})],
    "depthwise_conv.convolve_by_library": [((floats(2, 6, 4, 5), floats(3, 1, 5)), {})],
    "depthwise_conv.convolve_by_shifts": [((floats(2, 6, 4, 5), floats(3, 1, 5)), {})],
    "depthwise_conv.convolve_on_tpu": [((floats(2, 6, 4, 5), floats(3, 1, 5)), {})],
    "depthwise_conv.defer_gelu": [
        ((floats(2, 6, 4, 5), floats(5)), {"with_sums": flag}) for flag in (True, False)
    ],
    "depthwise_conv.depthwise_block": [
        ((floats(2, 6, 4, 5), floats(3, 1, 5)), {}),
        ((floats(2, 6, 4, 5), floats(3, 3, 5), floats(5)),
         {"input_bias": floats(5), "scale": floats(5), "shift": floats(5), "with_sums": True,
          "deferred": True, "activate": True}),
    ],
    "depthwise_conv.depthwise_branches": [
        ((floats(2, 6, 4, 5), (floats(3, 1, 5),) * 2), {"with_sums": flag})
        for flag in (True, False)
    ],
    "depthwise_conv.depthwise_conv": [((floats(2, 6, 4, 5), floats(3, 1, 5)), {})],
    "depthwise_conv.kernel_gradient_by_library": [((floats(2, 6, 4, 5),) * 2 + ((3, 1, 5),), {})],
    "depthwise_conv.kernel_gradient_by_lines": [((floats(2, 6, 4, 5),) * 2 + ((3, 1, 5),), {})],
    "depthwise_conv.kernel_gradient_by_sums": [((floats(2, 6, 4, 5),) * 2 + ((3, 1, 5),), {})],
    "depthwise_conv.kernel_gradient_on_tpu": [((floats(2, 6, 4, 5),) * 2 + ((3, 1, 5),), {})],
    "dtypes.softmax_dtype": [((jnp.bfloat16,), {})],
    "flash_attention_tpu.attend_by_flash": [((Q, K, K, masks(2, 13)), {"scale": 1.0})],
    "flash_attention_tpu.flash_misfit": [((Q, K), {})],
    "flash_attention_tpu.is_long": [((Q, K), {})],
    "gather.add_rows": [
        ((HEADS_FIRST, integers(2, 3, 4), floats(2, 3, 4, HEADS_FIRST.shape[-1])), {})
    ],
    "gather.put": [((floats(2, 30), integers(2, 3), floats(2, 3)), {})],
    "gather.take": [((TOKENS, integers(2, 3)), {}), ((HEADS_FIRST, integers(2, 3, 4)), {})],
    "gelu.bias_gelu": [((TOKENS, floats(7)), {}), ((floats(2, 6, 4, 5), floats(5)), {})],
    "gelu.gelu": [((TOKENS,), {})],
    "gelu.gelu_and_slope": [((TOKENS.astype(jnp.bfloat16),), {})],
    "gelu.gelu_gradient": [
        ((TOKENS, dsums, TOKENS, floats(7)), {}) for dsums in (None, floats(2, 7))
    ],
    "gelu.with_sums_gradient": [((TOKENS, floats(2, 7), TOKENS), {})],
    "gpus.capability_of": [(("9.0",), {})],
    "gpus.shared_memory": [((), {})],
    "gpus.traced_gpu": [((), {})],
    "group_attention.cheaper_path": [((30, 4, 3), {})],
    "group_attention.cheaper_path_on_cpu": [((Q.shape, 4, 3), {})],
    "group_attention.group_attention": [
        ((Q, Q, Q, floats(3, 4, 8)), {"top_k": 5, "path": path}) for path in ("dense", "tiles")
    ],
    "group_attention.group_sums": [((Q, integers(2, 3, 11), 4), {})],
    "group_attention.move_centroids": [((floats(3, 4, 8), SUMS, 0.9), {})],
    "group_attention.update_centroids": [
        ((floats(3, 4, 8), Q, integers(2, 3, 11)), {"old_weight": floats()})
    ],
    "group_attention_dense.attend_dense": [
        ((HEADS_FIRST, floats(2, 3, 13, 8), floats(2, 3, 13, 8), integers(2, 3, 11),
          masks(2, 3, 13, 4)), {})
    ],
    "group_attention_dense.attend_dense_by_cudnn": [
        ((SHORT_HEADS_FIRST,) * 3 + (integers(2, 3, 11), masks(2, 3, 11, 4)), {})
    ],
    "group_attention_fused.attend_fused": [
        (((Q, Q, Q), integers(2, 3, 11), integers(2, 3, 1, 11), 1.0, True), {})
    ],
    "group_attention_heads.attend_heads": [
        ((Q, Q, Q, floats(3, 4, 8), 5, 1.0), {"interpret": True})
    ],
    "group_attention_heads.heads_misfit": [((Q, 4), {})],
    "group_attention_heads.selected_keys": [
        ((floats(2, 1, 11, 192), 3, 4), {})
    ],
    "group_attention_sorted.attend_sorted": [((Q, Q, Q, SORTED, 1.0, True), {})],
    "group_attention_sorted.sort_groups": [
        ((integers(2, 3, 11), floats(2, 3, 4, 11), 5), {"interpret": True})
    ],
    "group_attention_sorted.sorted_misfit": [((Q, 5), {})],
    "group_attention_tiles.attend_tiles": [((HEADS_FIRST,) * 3 + (integers(2, 3, 4, 5), PLAN), {})],
    "group_attention_tiles.num_tiles": [((30, 4, 8), {})],
    "group_attention_tiles.plan_tiles": [((integers(2, 3, 11), 4, 4), {})],
    "group_attention_tiles.tile_size": [((30, 4), {})],
    "group_norm.group_norm": [
        ((floats(2, 6, 4, 12), floats(12), floats(12)), {"num_groups": 3, "epsilon": 1e-5}),
        ((floats(2, 12), floats(12), floats(12)),
         {"num_groups": 3, "epsilon": 1e-5, "dtype": jnp.bfloat16}),
    ],
    "group_routing.assign": [((Q, floats(3, 4, 8)), {"interpret": True})],
    "group_routing.assign_misfit": [((Q, 4), {})],
    "group_routing.largest": [((floats(16, 4), 11, 5, 0), {})],
    "group_routing.route": [(((Q, Q, Q), floats(3, 4, 8), 5), {"interpret": True})],
    "group_routing.routing_misfit": [((Q, 4), {})],
    "group_routing.unpack": [((integers(2, 3, 2, 11), 20), {})],
    "group_sums.group_sums_misfit": [((Q, 4), {})],
    "group_sums.sum_groups": [((Q, integers(2, 3, 11), 4), {"interpret": True})],
    "heads.merge_heads": [((Q,), {}), ((MAP,), {})],
    "heads.split_heads": [((TOKENS[..., :6], 2), {}), ((MAP, 5), {})],
    "heads.split_qkv": [((floats(2, 30, 12), 2), {})],
    "heatmaps.average_mirrored": [
        ((floats(2, 6, 4, 3), floats(2, 6, 4, 3), integers(3)), {"shift": True})
    ],
    "heatmaps.decode_heatmaps": [((floats(2, 6, 4, 3),), {}), ((floats(2, 6, 4, 3), "dark"), {})],
    "heatmaps.from_heatmap": [((floats(2, 3, 2), (24, 16), (6, 4)), {"unbiased": True})],
    "heatmaps.heatmap_loss": [
        ((floats(2, 6, 4, 3), ops.HeatmapTargets(floats(2, 6, 4, 3), floats(2, 3))), {})
    ],
    "heatmaps.heatmap_targets": [((floats(2, 3, 2), masks(2, 3), (6, 4)), {"unbiased": True})],
    "heatmaps.to_heatmap": [((floats(2, 3, 2), (24, 16), (6, 4)), {"unbiased": True})],
    "instance_masks.mask_targets": [
        ((integers(11, 6, 5), floats(11, 4), floats(11, 4)), {"size": 7})
    ],
    "instance_masks.paste_masks": [((floats(11, 7, 7), floats(11, 4), (6, 5)), {})],
    "instance_masks.unpack_masks": [((jnp.zeros((2, 11, 6, 3), jnp.uint8),), {})],
    "joined.gradient_refs": [(([TOKENS],), {})],
    "joined.gradients_of": [(((Q, Q, Q), TOKEN_SPEC), {})],
    "joined.inputs_of": [(((floats(2, 11, 3, 3, 8),), TOKEN_SPEC), {})],
    "joined.parts_of": [((Q, Q, Q, True), {}), ((Q, Q, Q, False), {})],
    "layer_norm.add_layer_norm": [
        ((TOKENS, TOKENS, floats(7), floats(7)), {"epsilon": 1e-6}),
        ((TOKENS, None, floats(7), floats(7)), {"epsilon": 1e-6, "dtype": jnp.bfloat16}),
        ((TOKENS, TOKENS, floats(7), floats(7)), {"epsilon": 1e-6, "factors": floats(2)}),
    ],
    "layer_norm.backward_pass": [
        ((TOKENS, TOKENS, None, factors, floats(7), floats(2, 30), floats(2, 30)),
         {"interpret": True})
        for factors in (None, floats(2))
    ],
    "layer_norm.forward_pass": [
        ((TOKENS, TOKENS, factors, floats(7), floats(7)),
         {"epsilon": 1e-6, "dtype": jnp.bfloat16, "interpret": True})
        for factors in (None, floats(2))
    ],
    "layer_norm.layer_norm": [((TOKENS, floats(7), floats(7)), {"epsilon": 1e-6})],
    "layer_norm.layer_norm_misfit": [((TOKENS,), {})],
    "linear.linear_parts": [((TOKENS, floats(7, 6), floats(6), 2), {})],
    "linear.linear_product": [((TOKENS, floats(7, 5)), {}), ((MAP, floats(5, 3)), {})],
    "merge_tokens.cluster_sums": [((TOKENS, integers(2, 30), 5), {})],
    "merge_tokens.merge_tokens": [
        ((TOKENS, integers(2, 30), 5), {}), ((TOKENS, integers(2, 30), 5, floats(2, 30)), {})
    ],
    "mix_boxes.mix_boxes": [((floats(2, 6, 4, 5), integers(4)), {})],
    "mix_boxes.neighbors": [((TOKENS,), {})],
    "nearest_tokens.centered": [((TOKENS, masks(2, 30)), {})],
    "nearest_tokens.chunked_forms": [((jnp.sum, 2, 30, 30, None), {})],
    "nearest_tokens.for_kernels": [((TOKENS, masks(2, 30)), {})],
    "nearest_tokens.nearest_center": [
        ((TOKENS, masks(2, 30), integers(2, 5), integers(2), 16), {})
    ],
    "nearest_tokens.nearest_denser": [((TOKENS, masks(2, 30), NEAR, SQUARES, 16), {})],
    "nearest_tokens.nearest_neighbors": [((TOKENS, masks(2, 30), 5, 16), {})],
    "nearest_tokens.points_of": [((TOKENS, masks(2, 30)), {})],
    "nearest_tokens.square_norms": [((TOKENS,), {})],
    "packed.cast_packed": [(([TOKENS, TOKENS[0]], jnp.bfloat16), {})],
    "packed.join_rows": [((lambda x: (x,), [TOKENS, TOKENS[:1]]), {})],
    "packed.map_packed": [((jnp.add, SUMS, SUMS), {}), ((jnp.add, AFFINE, AFFINE), {})],
    "packed.map_rows": [((lambda x: (x,), [TOKENS, TOKENS[:1]]), {})],
    "packed.norm_packed": [(([TOKENS, TOKENS[0, 0]],), {})],
    "packed.update_packed": [((lambda g, s, p: (g, s), [TOKENS[0, 0]], (), [TOKENS[0, 0]]), {})],
    "pale_attention.pale_attention": [
        ((MAP,) * 3, {"pale": (3, 2), "mode": mode, "mask": masks(6, 4)})
        for mode in ("parallel", "vanilla")
    ],
    "pieces.dot": [((floats(4, 8), floats(5, 8), (1, 1)), {})],
    "pieces.range_of": [((3, 4), {})],
    "pieces.sortable": [((TOKENS,), {})],
    "pieces.three_products": [((True,), {})],
    "platforms.by_platform": [
        (("cluster sums", TOKENS), dict.fromkeys(("cpu", "default", "cuda"), jnp.sum))
    ],
    "platforms.device_batch": [((2,), {})],
    "platforms.num_devices": [((), {})],
    "platforms.on_each_device": [((jnp.sum,), {})],
    "platforms.platform_of": [((jax.devices("cpu")[0],), {})],
    "precise_product.precise_product": [(("bnc,bmc->bnm", TOKENS, floats(2, 4, 7)), {})],
    "reconstruct_tokens.reconstruct_tokens": [
        ((TOKENS, floats(2, 6, 7), floats(2, 6, 9)),
         {"mode": mode, "grid": GRID, "clusters": CLUSTERS})
        for mode in ("soft", "hard", "window", "bilinear")
    ],
    "positions.sine_positions": [(((6, 4), 8), {})],
    "resize.linear_weights": [((4, 9, False), {})],
    "resize.cubic_kernel": [((floats(5), jnp.where), {})],
    "resize.multiply_axis": [
        ((floats(2, 6, 4, 5), np.ones((5, 6)), 1), {}),
        ((floats(2, 6, 4, 5), np.ones((5, 4)), 2), {}),
    ],
    "resize.resize_bicubic": [((floats(6, 4, 5), (3, 9)), {})],
    "resize.resize_bilinear": [
        ((floats(2, 6, 4, 5), (3, 9)), {}), ((floats(2, 6, 4, 5), (12, 9), True), {})
    ],
    "resize.resize_nearest": [((floats(2, 6, 4, 5), (3, 8)), {})],
    "resize.resize_rows": [((floats(9, 3), integers() + 5, integers() + 7, integers(4)), {})],
    "resize.resize_valid": [
        ((floats(9, 8, 3), integers(2) + 5, integers(2) + 7, integers(4)), {"width": 6})
    ],
    "resize.times_along": [
        ((np.ones(4), floats(2, 6, 4, 5), 2), {}), ((np.arange(4.0), floats(2, 6, 4, 5), 2), {})
    ],
    "roi_align.roi_align": [
        (([floats(2, 6, 5, 7), floats(2, 4, 3, 7)], (4, 8), floats(2, 11, 4)), {"size": 3}),
        (([floats(2, 6, 5, 7, dtype=jnp.bfloat16)], (4,), floats(2, 11, 4)),
         {"size": 3, "sampling_ratio": 2}),
    ],
    "roi_align.roi_levels": [((floats(2, 11, 4), 3), {}), ((floats(11, 4), 3, 28), {})],
    "rollout.attention_rollout": [((floats(2, 4, 3, 7, 7),), {})],
    "sample_points.sample_maps": [
        ((floats(3, 6, 4), floats(11, 2)), {}),
        ((floats(3, 6, 4), floats(3, 11, 2)), {}),
        ((floats(3, 6, 4), floats(5, 11, 2), integers(5)), {}),
    ],
    "sample_points.sample_objects": [
        ((integers(2, 6, 4), integers(3), floats(11, 2)), {}),
        ((integers(2, 6, 4), integers(3), floats(3, 11, 2)), {}),
    ],
    "sample_points.uncertain_points": [
        ((floats(3, 6, 4), floats(3, 11, 2), floats(3, 5, 2), 9), {}),
        ((floats(3, 6, 4), floats(5, 11, 2), floats(5, 5, 2), 9, integers(5)), {}),
    ],
    "scored_attention.received_attention": [
        ((*SHORT[:2], None, 1.0, True), {}), ((*SHORT[:2], floats(2, 13), 1.0, True), {})
    ],
    "scored_attention.score_by_kernels": [
        ((*SHORT, floats(2, 13)), {"scale": 1.0, "diagonal": True})
    ],
    "scored_attention.score_with_logits": [
        ((Q, K, K, floats(2, 13)), {"scale": 1.0, "diagonal": True})
    ],
    "selection.in_groups": [((floats(2, 32, 5),), {})],
    "selection.largest_mask": [((floats(2, 3, 11, 4), 5), {})],
    "selection.smallest": [((TOKENS,), {})],
    "selection.smallest_k": [((TOKENS, 3), {}), ((floats(2, 99, 5), 2), {})],
    "selection.smallest_of_groups": [((floats(2, 32, 5), floats(2, 4, 5), 3), {})],
    "selection.top_indices": [((TOKENS, 3), {})],
    "standardize.standardize_kernels": [
        (([floats(3, 3, 5, 7), floats(1, 1, 2, 4)], 1e-8, jnp.bfloat16), {})
    ],
    "superpixels.cluster_superpixels": [((TOKENS, GRID, CLUSTERS), {})],
    "token_merging.bipartite_matching": [((TOKENS, 5), {})],
    "token_pooling.kmeans": [((TOKENS, integers(2, 5), floats(2, 30)), {})],
    "token_pooling.kmeans_of_images": [
        ((TOKENS, floats(2, 30), integers(2, 5)), {"iterations": 1, "interpret": True})
    ],
    "token_pooling.kmedoids": [((TOKENS, integers(2, 5)), {})],
    "token_pooling.kmedoids_of_images": [
        ((TOKENS, floats(2, 30), integers(2, 5)), {"iterations": 1, "interpret": True})
    ],
    "token_pooling.pooling_misfit": [((30,), {}), ((5000,), {})],
    "top_indices.by_counting": [((TOKENS, 3), {"interpret": True})],
    "top_indices.by_sorting": [((TOKENS, 3), {})],
    "top_indices.by_top_k": [((TOKENS, 3), {})],
    "top_indices.ranks": [((SQUARES,), {})],
    "tpus.has_large_vmem": [((), {})],
    "tpus.vmem_limit": [((), {})],
    "unit_norm.unit_norm": [((TOKENS, 1e-6), {})],
    "window_attention.attend_short": [((SHORT[0],) * 3, {"scale": 1.0})],
    "window_attention.attend_stripes": [
        ((MAP, MAP, MAP, (3, 4), (6, 2)), {"interlaced": True, "scale": 1.0})
    ],
    "window_attention.attend_windows": [
        ((MAP, MAP, MAP, floats(2, 6, 6), (3, 2), (1, 1), 1.0), {})
    ],
    "window_attention.misfit_of_tiles": [((*SHORT, 13), {})],
    "window_attention.relative_position_bias": [((floats(5, 3, 2), (3, 2)), {})],
    "window_attention.window_attention": [
        ((MAP, MAP, MAP, floats(2, 6, 6)), {"window": (3, 2), "shift": (1, 1)})
    ],
    "masked_attention.masked_attention": [((Q, K, K, masks(2, 11, 13)), {})],
    "match_boxes.match_boxes": [
        ((floats(11, 4), masks(11), floats(7, 4), masks(7)),
         {"positive": 0.7, "negative": 0.3, "least": 0.3})
    ],
    "match_boxes.sample_matches": [((KEY, integers(11)), {"num": 6, "max_positive": 3})],
    "nms.nms": [
        ((floats(11, 4), floats(11), 0.5), {}),
        ((floats(11, 4), floats(11), 0.5), {"labels": integers(11), "valid": masks(11)}),
    ],
    "select_detections.select_detections": [
        ((boxes, floats(11, 3)), {"score_threshold": 0.1, "iou_threshold": 0.5, "num": 6})
        for boxes in (floats(11, 4), floats(11, 3, 4))
    ],
    "windows.pad_map": [((floats(2, 6, 4, 5), (7, 9)), {})],
    "windows.pad_to_windows": [((floats(2, 6, 4, 5), (4, 3)), {})],
    "windows.to_map": [((floats(2, 3, 4, 5, 6, 7),), {})],
    "windows.to_windows": [((MAP, (3, 2)), {"interlaced": True})],
    "windows.whole_windows": [(((6, 4), (4, 3)), {})],
}  # fmt: skip


def test_every_function_is_called_here():
    assert sorted(CALLS) == sorted(FUNCTIONS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_everything_has_a_type(name):
    assert not missing_annotations(FUNCTIONS[name])


@pytest.mark.parametrize("name", CALLS)
def test_shapes_are_as_stated(name):
    with cudnn.assumed():  # the forms by cuDNN are traced, too
        for args, kwargs in CALLS[name]:
            trace_checked(FUNCTIONS[name], *args, **kwargs)


def test_wrong_shapes_are_found():
    def stack(x: Float[Array, "B N"], y: Float[Array, "B N"]) -> Float[Array, "2 B N"]:
        return jnp.stack([x, y])

    trace_checked(stack, floats(3, 5), floats(3, 5))
    with pytest.raises(AssertionError, match="return is"):
        check_call(stack, (floats(3, 5), floats(3, 5)), {}, floats(2, 5, 3))
    with pytest.raises(AssertionError, match="y is"):
        check_call(stack, (floats(3, 5), floats(3, 6)), {}, floats(2, 3, 5))
    with pytest.raises(AssertionError, match="x is"):
        check_call(stack, (integers(3, 5), floats(3, 5)), {}, floats(2, 3, 5))
    with pytest.raises(AssertionError, match="return is"):  # a field of a named tuple
        wrong = SUMS._replace(counts=integers(3, 4))
        check_call(ops.group_sums, (Q, integers(2, 3, 11), 4), {}, wrong)


def test_untyped_arguments_are_found():
    def untyped(x, y: int):
        return x

    assert missing_annotations(untyped) == ["x", "return"]
