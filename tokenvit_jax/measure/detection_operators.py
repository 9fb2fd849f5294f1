"""Cases of the operators of detectors: regions, boxes and their choice."""

import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from tokenvit_jax import ops
from tokenvit_jax.measure import alternatives, torchvision_operators
from tokenvit_jax.measure.cases import Case
from tokenvit_jax.measure.timing import normal

# (regions, bins along an axis): box head and mask head of Mask R-CNN; the maps of its pyramid.
ROI_SHAPES = ((1000, 7), (100, 14))
CANVAS, ROI_CHANNELS = (800, 1344), 256
# (levels, boxes): proposals of a level or of five, in an evaluation and in training.
NMS_SHAPES = ((1, 1000), (1, 2000), (5, 1000), (5, 2000))
# (boxes, classes, least score): the last step of Mask R-CNN, few candidates and many.
SELECTION_SHAPES = ((1000, 80, 0.05), (1000, 80, 0.001))
# (height, width, objects): images on COCO.
MATCHING_SHAPES = ((800, 1344, 100),)


def roi_align_cases(
    batch_size: int | None,
    dtype: jnp.dtype,
    shapes=ROI_SHAPES,
    canvas=CANVAS,
    channels=ROI_CHANNELS,
) -> Iterator[Case]:
    """Yields RoIAlign with as many samples as a region has cells.

    The alternative takes as many samples in all regions as the largest one needs. torchvision's
    operator takes part where it is installed.
    """
    strides, batch = (4, 8, 16, 32), batch_size or 1
    for regions, size in shapes:
        maps = [
            normal(i, (batch, *(side // stride for side in canvas), channels), dtype)
            for i, stride in enumerate(strides)
        ]
        boxes = _regions(batch, regions, canvas)
        level = np.asarray(ops.roi_levels(boxes, len(strides)))
        sides = (boxes[..., 2:] - boxes[..., :2]) / np.array(strides)[level][..., None]
        common = {"strides": strides, "size": size}
        static = functools.partial(
            alternatives.roi_align_static, **common, samples=math.ceil(sides.max() / size)
        )
        ours = functools.partial(ops.roi_align, **common)
        yield Case(
            shape={"regions": regions, "bins": size, "channels": channels},
            inputs=(*maps, jnp.asarray(boxes)),
            num_differentiated=4,
            contenders={
                "static": lambda *xs, static=static: static(xs[:-1], boxes=xs[-1]),
                "roi_align": lambda *xs, ours=ours: ours(xs[:-1], boxes=xs[-1]),
            },
            peers=lambda mode, maps=maps, boxes=boxes, common=common: (
                torchvision_operators.roi_align_calls(maps, boxes=boxes, mode=mode, **common)
            ),
        )


def _regions(batch, count, canvas):
    """Returns boxes (B, n, 4) float32 of all sizes and of aspect ratios from 1/2 to 2."""
    draw = np.random.default_rng(0)
    largest = min(canvas) * 3 / 4
    scale = largest * 2.0 ** draw.uniform(-5, 0, (batch, count))
    ratio = 2.0 ** draw.uniform(-0.5, 0.5, (batch, count))
    sides = np.stack([scale * ratio, scale / ratio], -1)
    center = draw.uniform(size=(batch, count, 2)) * canvas[::-1]
    boxes = np.concatenate([center - sides / 2, center + sides / 2], -1)
    return np.clip(boxes, 0, [*canvas[::-1]] * 2).astype(np.float32)


def nms_cases(batch_size: int | None, dtype: jnp.dtype, shapes=NMS_SHAPES) -> Iterator[Case]:
    """Yields non-maximum suppression against a loop over rows of the matrix of all pairs."""
    threshold = 0.7

    def by_torchvision(torchvision, boxes, scores):
        numbers = scores.new_ones(scores.shape).cumsum(0).reshape(-1)
        flat = boxes.reshape(-1, 4), scores.reshape(-1)
        return torchvision.ops.batched_nms(*flat, numbers, threshold)

    def of_levels(one):
        return jax.vmap(functools.partial(one, threshold=threshold))

    for levels, count in shapes:
        maps = (batch_size or 1) * levels
        inputs = _boxes(0, maps, count), _scores(1, dtype, maps, count)
        yield Case(
            shape={"maps": maps, "boxes": count},
            inputs=inputs,
            num_differentiated=0,
            contenders={"rows": of_levels(alternatives.nms_by_rows), "nms": of_levels(ops.nms)},
            peers=_torchvision(by_torchvision, inputs),
        )


def select_detections_cases(
    batch_size: int | None, dtype: jnp.dtype, shapes=SELECTION_SHAPES
) -> Iterator[Case]:
    """Yields the selection of 100 detections against suppression in all classes.

    The batch is always one image. torchvision has no soft suppression.
    """
    del batch_size

    def ours(boxes, scores, **settings):
        found = ops.select_detections(boxes, scores, **settings)
        return jnp.where(found.rows >= 0, found.rows * scores.shape[1] + found.classes, -1)

    def by_torchvision(torchvision, boxes, scores, *, score_threshold, iou_threshold, num):
        rows, classes = (scores > score_threshold).nonzero(as_tuple=True)
        flat = boxes[rows, classes], scores[rows, classes]
        kept = torchvision.ops.batched_nms(*flat, classes, iou_threshold)[:num]
        return rows[kept] * scores.shape[1] + classes[kept]

    for count, num_classes, least in shapes:
        settings = {"score_threshold": least, "iou_threshold": 0.5, "num": min(100, count)}
        logits = 2 * normal(1, (count, num_classes + 1))
        scores = jax.nn.softmax(logits)[:, :-1].astype(dtype).astype(jnp.float32)
        inputs = _class_boxes(count, num_classes), scores
        shape = {"boxes": count, "classes": num_classes, "least score": least}
        hard = {
            "all classes": functools.partial(alternatives.select_by_nms, **settings),
            "select": functools.partial(ours, **settings),
        }
        soft = {
            "all classes": functools.partial(alternatives.select_by_soft_nms, **settings),
            "select": functools.partial(ours, soft=True, **settings),
        }
        peers = _torchvision(functools.partial(by_torchvision, **settings), inputs)
        yield Case(shape | {"suppression": "hard"}, inputs, 0, hard, peers)
        yield Case(shape | {"suppression": "soft"}, inputs, 0, soft)


def match_boxes_cases(
    batch_size: int | None, dtype: jnp.dtype, shapes=MATCHING_SHAPES
) -> Iterator[Case]:
    """Yields matching of the anchors of a region proposal network against the matrix of all IoUs.

    Boxes are float32, and the batch is one image.
    """
    del batch_size, dtype
    rules = {"positive": 0.7, "negative": 0.3, "least": 0.3}

    def ours(anchors, boxes):
        valid, present = (jnp.ones(len(x), bool) for x in (anchors, boxes))
        return ops.match_boxes(anchors, valid, boxes, present, **rules)

    def by_torchvision(torchvision, anchors, boxes):
        matcher = torchvision.models.detection._utils.Matcher(
            rules["positive"], rules["negative"], allow_low_quality_matches=True
        )
        return matcher(torchvision.ops.box_iou(boxes, anchors))

    for height, width, count in shapes:
        strides = (4, 8, 16, 32, 64)
        maps = [(-(-height // stride), -(-width // stride)) for stride in strides]
        cells = [ops.cell_anchors([8 * stride], (0.5, 1.0, 2.0)) for stride in strides]
        anchors = jnp.asarray(ops.grid_anchors(maps, strides, cells))
        inputs = anchors, _boxes(0, count, image=(height, width))
        yield Case(
            shape={"anchors": len(anchors), "objects": count},
            inputs=inputs,
            num_differentiated=0,
            contenders={
                "matrix": functools.partial(alternatives.match_by_matrix, **rules),
                "match": ours,
            },
            peers=_torchvision(by_torchvision, inputs),
        )


def _torchvision(run, inputs):
    """Returns `Case.peers` for a function of torchvision and the inputs as tensors; no gradient."""
    return lambda mode: torchvision_operators.calls(run, inputs)


def _boxes(seed, *shape, image=(800, 1344)):
    """Returns boxes of a fiftieth to half of the image's height, in groups that overlap."""
    draw = np.random.default_rng(seed)
    height, width = image
    groups = max(shape[-1] // 10, 1)
    group = draw.integers(groups, size=shape)
    shape_of_group = np.array([[1, -1]]) * draw.normal(0, 0.35, (groups, 1))  # half its logarithm
    size_of_group = draw.uniform(np.log(0.02), np.log(0.5), (groups, 1))
    sides = height * np.exp(size_of_group + shape_of_group)[group]
    centres = draw.uniform((0, 0), (width, height), (groups, 2))[group]
    centres += 0.1 * sides * draw.standard_normal((*shape, 2))
    sides *= np.exp(0.15 * draw.standard_normal((*shape, 2)))
    boxes = np.concatenate([centres - sides / 2, centres + sides / 2], -1)
    return jnp.asarray(np.clip(boxes, 0, (width, height) * 2), jnp.float32)


def _class_boxes(count, num_classes):
    """Returns boxes (n, K, 4) that are the same for all classes but for a few pixels."""
    offsets = 4 * normal(2, (count, num_classes, 2))
    return _boxes(0, 1, count)[0][:, None] + jnp.concatenate([offsets, offsets], -1)


def _scores(seed, dtype, *shape):
    scores = np.random.default_rng(seed).uniform(size=shape).astype(np.float32)
    return jnp.asarray(scores, dtype).astype(jnp.float32)


CASES = {
    "roi_align": roi_align_cases,
    "nms": nms_cases,
    "select_detections": select_detections_cases,
    "match_boxes": match_boxes_cases,
}
