"""Every public operator at shapes of the models, small ones, that its kernels can take."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tokenvit_jax import ops


class Case(NamedTuple):
    """A call of an operator.

    Attributes:
      function: the operator.
      inputs: numpy arrays; floats are float32.
      num_cast: number of leading inputs that have the type of the computation.
      num_differentiated: number of leading inputs with a gradient.
      chooses: whether the operator chooses keys, centres or groups.
    """

    function: Callable[..., Any]
    inputs: tuple[np.ndarray, ...]
    num_cast: int
    num_differentiated: int
    chooses: bool = False


def _normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def _uniform(seed, *shape):
    return np.random.default_rng(seed).uniform(size=shape).astype(np.float32)


def _integers(seed, end, *shape):
    return np.random.default_rng(seed).integers(end, size=shape, dtype=np.int32)


def _first(num_tokens, num_clusters):
    draw = np.random.default_rng(7)
    rows = [draw.permutation(num_tokens)[:num_clusters] for _ in range(4)]
    return np.stack(rows).astype(np.int32)


def _qkv(*shape):
    return tuple(_normal(seed, *shape) for seed in range(3))


def _softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def _assigned(x):
    return ops.assign_clusters(x, ops.density_peaks(x), 49)


def _used(x):
    peaks = ops.density_peaks(x)
    return ops.used_clusters(peaks, ops.assign_clusters(x, peaks, 49).centers, 0.3)


def _grouped(q, k, v, centroids, path):
    output, groups, keys = ops.group_attention(q, k, v, centroids, top_k=98, path=path)
    # Which tokens are keys: in a list, one other key displaces those behind it.
    return output, groups, jax.nn.one_hot(keys, k.shape[1], dtype=jnp.int32).sum(-2)


def _moved(centroids, sums, counts):
    return ops.move_centroids(centroids, ops.GroupSums(sums, counts), 0.9)


def _deferred_block(x, bias, kernel, scale, shift):
    """The second half of a feed-forward network: GELU, BatchNorm's affine and the convolution."""
    deferred, sums = ops.defer_gelu(x, bias, with_sums=True)
    result, _ = ops.depthwise_block(
        deferred, kernel, input_bias=bias, scale=scale, shift=shift, deferred=True
    )
    return result, sums


def _hashed_alike(x):
    """Which vectors share a cluster: numbers of clusters shift if one more is found."""
    clusters = ops.hash_clusters(x, 20)
    return (clusters[..., None] == clusters[..., None, :]).astype(jnp.int32)


def _affine(x, scale, bias):
    return ops.affine_of(ops.channel_sums(x), len(x), scale, bias, 1e-5)


def _affine_gradient(x, dy, scale, bias):
    sums = jnp.stack([dy.sum(0), (dy * x).sum(0)])
    return ops.affine_gradient(sums, sums, len(x), _affine(x, scale, bias), 1e-5)


QKV = _qkv(4, 196, 4, 64)
TWENTY = np.broadcast_to(np.arange(196) % 20, (4, 4, 196))  # clusters of the queries
GROUPED, CENTROIDS = _qkv(4, 196, 4, 32), _normal(3, 4, 48, 32)
LONG, FEW_CENTROIDS = _qkv(2, 784, 2, 32), _normal(3, 2, 48, 32)
MAPS = _qkv(4, 28, 28, 2, 32)
MANY, TOKENS = _normal(0, 4, 784, 64), _normal(0, 4, 196, 64)
GRID = {"grid": (20, 20), "clusters": (10, 10)}
ON_GRID, ON_CLUSTERS = _normal(0, 2, 400, 64), _normal(1, 2, 100, 64)

ROWS, OTHER_ROWS = _normal(0, 784, 64), _normal(1, 784, 64)
CHANNELS = _normal(5, 64), _normal(6, 64)
# Regions of an image of 120 x 160 [x1 y1 x2 y2, pixels], and its pyramid.
RATIOS, DEVIATIONS = (0.5, 1.0, 2.0), (0.1, 0.1, 0.2, 0.2)
_LOW = 100 * np.random.default_rng(5).random((300, 2), np.float32)
BOXES = np.concatenate(
    [_LOW, _LOW + 5 + 60 * np.random.default_rng(6).random((300, 2), np.float32)], 1
)
REGIONS = np.array(
    [
        [x, y, x + side, y + 0.8 * side]
        for x, y, side in (
            (10, 20, 30),
            (0, 0, 160),
            (-20, 5, 70),
            (50, 40, 9),
            (70, 3, 111),
            (140, 90, 60),
            (3, 7, 140),
            (90, 60, 33),
            (20, 20, 250),
        )
    ],
    np.float32,
)
PYRAMID = [_normal(i, 2, 120 // 2**i, 160 // 2**i, 64) for i in (2, 3, 4, 5)]
MAP, KERNEL = _normal(0, 4, 14, 14, 64), _normal(1, 3, 3, 64)

# Operator -> calls by name.
CASES: dict[str, dict[str, Case]] = {
    "adaptive_average_pool": {
        "": Case(functools.partial(ops.adaptive_average_pool, side=6), (MAP,), 1, 1)
    },
    "add_layer_norm": {
        "": Case(
            functools.partial(ops.add_layer_norm, epsilon=1e-6),
            (TOKENS, _normal(1, 4, 196, 64), *CHANNELS), 2, 4,
        ),
        "stochastic depth": Case(
            functools.partial(
                ops.add_layer_norm, epsilon=1e-6, factors=np.array([0, 2, 2, 0], np.float32)
            ),
            (TOKENS, _normal(1, 4, 196, 64), *CHANNELS), 2, 4,
        ),
    },
    "affine_gradient": {"": Case(_affine_gradient, (ROWS, OTHER_ROWS, *CHANNELS), 2, 0)},
    "affine_of": {"": Case(_affine, (ROWS, *CHANNELS), 1, 0)},
    "batch_norm": {
        "": Case(functools.partial(ops.batch_norm, epsilon=1e-5), (MAP, *CHANNELS), 1, 3),
        "and GELU": Case(
            functools.partial(ops.batch_norm, epsilon=1e-5, with_gelu=True), (MAP, *CHANNELS), 1, 3
        ),
    },
    "bias_gelu": {"": Case(ops.bias_gelu, (MAP, CHANNELS[0]), 1, 2)},
    "channel_affine": {"": Case(ops.channel_affine, (MAP, *CHANNELS), 1, 3)},
    "channel_sums": {"": Case(ops.channel_sums, (MAP,), 1, 1)},
    "conv": {"": Case(ops.conv, (MAP, _normal(1, 3, 3, 64, 32) / 24), 2, 2)},
    "conv_of_resized": {
        "": Case(
            lambda x, y, kernel: ops.conv_of_resized((x, y), kernel, (28, 28)),
            (_normal(2, 4, 28, 28, 64), MAP, _normal(1, 3, 3, 128, 32) / 34), 3, 3,
        )
    },
    "conv_with_padding": {
        "": Case(
            lambda x, kernel: ops.conv_with_padding(x, kernel, 2, ((0, 1), (0, 1))),
            (MAP, _normal(1, 3, 3, 64, 32) / 24), 2, 2,
        )
    },
    "defer_gelu": {"": Case(_deferred_block, (MAP, CHANNELS[0], KERNEL, *CHANNELS), 1, 0)},
    "depthwise_block": {
        "": Case(
            lambda *inputs: ops.depthwise_block(*inputs, residual=True, with_sums=True),
            (MAP, KERNEL, CHANNELS[0]), 2, 3,
        )
    },
    "depthwise_branches": {
        "": Case(
            lambda x, *kernels: ops.depthwise_branches(x, kernels, with_sums=True),
            (MAP, KERNEL, 2 * KERNEL, -KERNEL), 2, 4,
        )
    },
    "gelu": {"": Case(ops.gelu, (TOKENS,), 1, 1)},
    "group_norm": {
        "": Case(
            functools.partial(ops.group_norm, num_groups=8, epsilon=1e-5), (MAP, *CHANNELS), 1, 3
        )
    },
    "layer_norm": {
        "": Case(functools.partial(ops.layer_norm, epsilon=1e-6), (TOKENS, *CHANNELS), 1, 3)
    },
    "linear_parts": {
        "": Case(
            functools.partial(ops.linear_parts, parts=2),
            (_normal(0, 16, 1024, 64), _normal(1, 64, 256), _normal(2, 256)), 1, 3,
        )
    },
    "linear_product": {"": Case(ops.linear_product, (TOKENS, _normal(1, 64, 128)), 2, 2)},
    "assign_clusters": {"": Case(_assigned, (MANY,), 1, 0, chooses=True)},
    "assign_targets": {
        "": Case(ops.assign_targets, (_normal(0, 4, 200, 60), _integers(1, 2, 4, 60) > 0), 0, 0)
    },
    "attention_rollout": {
        "": Case(ops.attention_rollout, (_softmax(_normal(0, 4, 3, 2, 50, 50)),), 1, 1)
    },
    "attention_weights": {"": Case(ops.attention_weights, QKV[:2], 2, 2)},
    "bipartite_matching": {
        "": Case(lambda x: ops.bipartite_matching(x, 60), (TOKENS,), 1, 0, chooses=True)
    },
    "clustered_attention": {
        "": Case(lambda q, k, v: ops.clustered_attention(q, k, v, TWENTY, 20), QKV, 3, 3)
    },
    "mask_targets": {
        "": Case(ops.mask_targets, (_integers(0, 2, 9, 112, 112), REGIONS, REGIONS + 3.3), 0, 0)
    },
    "cell_anchors": {"": Case(lambda: ops.cell_anchors([8.0], RATIOS), (), 0, 0)},
    "grid_anchors": {
        "": Case(lambda: ops.grid_anchors([(20, 30)], [8], [ops.cell_anchors([64.0], RATIOS)]),
                 (), 0, 0)
    },
    "inside_image": {"": Case(ops.inside_image, (BOXES, np.array([100, 200], np.int32)), 0, 0)},
    "valid_anchors": {
        "": Case(
            lambda size: ops.valid_anchors([(20, 30)], [8], 3, size),
            (np.array([100, 200], np.int32),), 0, 0,
        )
    },
    "box_areas": {"": Case(ops.box_areas, (BOXES,), 0, 1)},
    "box_iou": {"": Case(lambda a, b: ops.box_iou(a[:, None], b), (BOXES, BOXES + 7.3), 0, 0)},
    "clip_boxes": {
        "": Case(ops.clip_boxes, (BOXES, np.array([90, 120], np.int32)), 0, 0)
    },
    "encode_boxes": {
        "": Case(lambda a, b: ops.encode_boxes(a, b, DEVIATIONS), (BOXES, BOXES + 7.3), 0, 0)
    },
    "decode_boxes": {
        "": Case(
            lambda deltas, boxes: ops.decode_boxes(boxes, deltas, DEVIATIONS),
            (_normal(1, 300, 4), BOXES), 0, 1,
        )
    },
    "match_boxes": {
        "": Case(
            lambda a, b: ops.match_boxes(
                a, jnp.ones(300, bool), b, jnp.arange(9) < 7,
                positive=0.5, negative=0.3, least=0.3,
            ),
            (BOXES, BOXES[:9] + 3.3), 0, 0,
        )
    },
    "sample_matches": {
        "": Case(
            lambda x: ops.sample_matches(jax.random.key(0), x, num=64, max_positive=16),
            (_integers(2, 9, 300) - 2,), 0, 0,
        )
    },
    "nms": {"": Case(lambda b, s: ops.nms(b, s, 0.5), (BOXES, _normal(3, 300)), 0, 0)},
    "select_detections": {
        name: Case(
            lambda b, s, soft=soft: ops.select_detections(
                b, s, score_threshold=0.05, iou_threshold=0.5, num=50, soft=soft
            ),
            (BOXES, _softmax(_normal(4, 300, 12))), 0, 0,
        )
        for name, soft in (("", False), ("soft", True))
    },
    "paste_masks": {
        "": Case(
            functools.partial(ops.paste_masks, size=(120, 160)),
            (_normal(0, 9, 28, 28), REGIONS), 1, 1,
        )
    },
    "query_prototypes": {"": Case(lambda q: ops.query_prototypes(q, TWENTY, 20), QKV[:1], 1, 1)},
    "hash_clusters": {"": Case(_hashed_alike, QKV[:1], 1, 0, chooses=True)},
    "cluster_density_peaks": {
        "": Case(lambda x: ops.cluster_density_peaks(x, 49), (MANY,), 1, 0, chooses=True)
    },
    "cluster_superpixels": {
        "": Case(functools.partial(ops.cluster_superpixels, **GRID), (ON_GRID,), 1, 1)
    },
    "density_peaks": {"": Case(ops.density_peaks, (MANY,), 1, 0, chooses=True)},
    "depthwise_conv": {
        "": Case(ops.depthwise_conv, (_normal(0, 4, 28, 28, 64), _normal(1, 3, 3, 64)), 2, 2)
    },
    "dot_product_attention": {
        "": Case(ops.dot_product_attention, QKV, 3, 3),
        "odd length": Case(ops.dot_product_attention, tuple(x[:, :49] for x in QKV), 3, 3),
        "masked": Case(
            lambda q, k, v, mask: ops.dot_product_attention(q, k, v, key_mask=mask),
            (*QKV, _integers(3, 2, 4, 196) > 0), 3, 3,
        ),
    },
    "group_attention": {
        "few tokens": Case(
            functools.partial(_grouped, path="dense"),
            (*GROUPED, CENTROIDS), 3, 3, chooses=True,
        ),
        "many tokens": Case(
            functools.partial(_grouped, path="tiles"),
            (*LONG, FEW_CENTROIDS), 3, 3, chooses=True,
        ),
    },
    "group_sums": {
        "": Case(
            lambda q, groups: ops.group_sums(q, groups, 48),
            (GROUPED[0], _integers(1, 48, 4, 4, 196)), 1, 0,
        )
    },
    "kmeans": {"": Case(ops.kmeans, (TOKENS, _first(196, 49)), 1, 0, chooses=True)},
    "kmedoids": {"": Case(ops.kmedoids, (TOKENS, _first(196, 49)), 1, 0, chooses=True)},
    "deformable_attention": {
        "": Case(
            functools.partial(ops.deformable_attention, shapes=((20, 28), (10, 14))),
            (
                _normal(0, 2, 700, 4, 32), _uniform(1, 2, 99, 4, 2, 3, 2),
                _uniform(2, 2, 99, 4, 2, 3),
            ), 1, 3,
        )
    },
    "masked_attention": {
        "": Case(
            ops.masked_attention,
            (_normal(0, 2, 20, 4, 32), _normal(1, 2, 99, 4, 32), _normal(2, 2, 99, 4, 32),
             _uniform(3, 2, 20, 99) < 0.3), 3, 3,
        )
    },
    "merge_tokens": {
        "": Case(
            lambda x, scores, assignment: ops.merge_tokens(x, assignment, 49, scores),
            (TOKENS, _normal(1, 4, 196), _integers(2, 49, 4, 196)), 1, 2,
        )
    },
    "move_centroids": {
        "": Case(_moved, (CENTROIDS, _normal(0, 4, 48, 32), _normal(1, 4, 48) ** 2), 0, 0)
    },
    "pale_attention": {
        "": Case(ops.pale_attention, MAPS, 3, 3),
        "one by one": Case(functools.partial(ops.pale_attention, mode="vanilla"), MAPS, 3, 3),
    },
    "reconstruct_tokens": {
        "": Case(
            ops.reconstruct_tokens, (ON_GRID, ON_CLUSTERS, _normal(2, 2, 100, 32)), 3, 3,
            chooses=True,
        )
    },
    "relative_position_bias": {
        "": Case(lambda x: ops.relative_position_bias(x, (7, 7)), (_normal(0, 13, 13, 4),), 1, 1)
    },
    "resize_bilinear": {
        "": Case(functools.partial(ops.resize_bilinear, size=(28, 35)), (MAP,), 1, 1),
        "align_corners": Case(
            functools.partial(ops.resize_bilinear, size=(28, 28), align_corners=True), (MAP,), 1, 1
        ),
    },
    "resize_nearest": {
        "": Case(functools.partial(ops.resize_nearest, size=(28, 35)), (MAP,), 1, 1)
    },
    "roi_align": {
        f"size {size}": Case(
            lambda *inputs, size=size: ops.roi_align(
                inputs[:-1], (4, 8, 16, 32), inputs[-1], size=size
            ),
            (*PYRAMID, np.stack([REGIONS, REGIONS[::-1] + 1.7])), 4, 4,
        )
        for size in (7, 14)
    },
    "roi_levels": {"": Case(functools.partial(ops.roi_levels, num_levels=4), (REGIONS,), 0, 0)},
    "sample_maps": {
        "": Case(ops.sample_maps, (_normal(0, 9, 30, 40), _uniform(1, 300, 2)), 1, 1),
        "own points": Case(ops.sample_maps, (_normal(0, 9, 30, 40), _uniform(1, 9, 300, 2)), 1, 1),
        "chosen maps": Case(
            functools.partial(ops.sample_maps, which=np.array([8, 0, 8])),
            (_normal(0, 9, 30, 40), _uniform(1, 3, 300, 2)), 1, 1,
        ),
    },
    "sample_objects": {
        "": Case(
            ops.sample_objects,
            (_integers(0, 9, 2, 60, 80), np.arange(9, dtype=np.int32), _uniform(1, 300, 2)), 0, 0,
        )
    },
    "uncertain_points": {
        "": Case(
            functools.partial(ops.uncertain_points, num_points=100),
            (_normal(0, 9, 30, 40), _uniform(1, 9, 300, 2), _uniform(2, 9, 25, 2)),
            1, 0, chooses=True,
        )
    },
    "scored_attention": {"": Case(ops.scored_attention, tuple(x[:, :99] for x in QKV), 3, 3)},
    "sine_positions": {"": Case(lambda: ops.sine_positions((20, 30), 64), (), 0, 0)},
    "standardize_kernels": {
        "": Case(
            lambda *kernels: ops.standardize_kernels([*kernels], 1e-8, kernels[0].dtype),
            (KERNEL[..., None] + 1, _normal(2, 1, 1, 64, 32), _normal(3, 1, 1, 64, 64)), 0, 3,
        )
    },
    "average_mirrored": {
        "": Case(
            lambda x, y: ops.average_mirrored(x, y, np.arange(64)[::-1], shift=True),
            (MAP, MAP[::-1]), 2, 2,
        )
    },
    "decode_heatmaps": {
        "": Case(ops.decode_heatmaps, (_uniform(1, 4, 64, 48, 17),), 1, 0, chooses=True),
        "dark": Case(
            lambda x: ops.decode_heatmaps(x, "dark"), (_uniform(1, 4, 64, 48, 17),), 1, 0,
            chooses=True,
        ),
    },
    "heatmap_loss": {
        "": Case(
            lambda x, *targets: ops.heatmap_loss(x, ops.HeatmapTargets(*targets)),
            (_normal(1, 4, 64, 48, 17), _uniform(2, 4, 64, 48, 17), _uniform(3, 4, 17)), 1, 1,
        )
    },
    "heatmap_targets": {
        "": Case(
            lambda points, seen: ops.heatmap_targets(points, seen, (64, 48)),
            (50 * _uniform(0, 4, 17, 2), _integers(1, 2, 4, 17) > 0), 0, 0,
        )
    },
    "unpack_masks": {
        "": Case(ops.unpack_masks, (_integers(0, 256, 9, 112, 14).astype(np.uint8),), 0, 0)
    },
    "update_centroids": {
        "": Case(
            lambda q, c, groups: ops.update_centroids(c, q, groups, old_weight=0.9),
            (GROUPED[0], CENTROIDS, _integers(1, 48, 4, 4, 196)), 1, 0,
        )
    },
    "used_clusters": {"": Case(_used, (MANY,), 1, 0, chooses=True)},
    "window_attention": {
        "": Case(
            functools.partial(ops.window_attention, window=(7, 7), shift=(3, 3)),
            (*MAPS, _normal(3, 2, 49, 49)), 3, 4,
        )
    },
}  # fmt: skip


def cast(case: Case, dtype: str) -> tuple[Any, ...]:
    """Returns the inputs of a case, the leading ones in a type."""
    return (*(jnp.asarray(x, dtype) for x in case.inputs[: case.num_cast]),
            *case.inputs[case.num_cast :])  # fmt: skip
