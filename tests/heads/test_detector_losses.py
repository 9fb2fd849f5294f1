"""Losses of detectors: padding, empty images, groups, and the memory that anchors take."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampled import sampled

from tokenvit_jax.data.box_transforms import MASK_SIDE
from tokenvit_jax.heads import Htc, MaskRcnn, RetinaNet, Targets

STRIDES = (4, 8, 16, 32)
SIZE = (64, 96)
SMALL = {
    RetinaNet: {"num_convs": 1, "num_candidates": 30},
    MaskRcnn: {
        "hidden": 8, "num_mask_convs": 1, "num_candidates": 30, "num_proposals": 20,
        "num_anchors": 24, "num_rois": 16,
    },
}  # fmt: skip
SMALL[Htc] = {**SMALL[MaskRcnn], "num_box_convs": 1, "num_stuff": 4, "global_head_dim": 3}
heads = pytest.mark.parametrize("cls", [RetinaNet, MaskRcnn, Htc])
# The programs of two stages take long to compile.
compiled = pytest.mark.parametrize("cls", sampled([RetinaNet, MaskRcnn, Htc]))


def head_of(cls, **settings):
    return cls(3, channels=8, max_detections=10, **{**SMALL[cls], **settings})


def maps_of(head, size, batch, make):
    """Returns the maps that a head reads, and their strides."""
    first = head.first_map
    shapes = [(batch, *(-(-side // stride) for side in size), 6) for stride in STRIDES]
    return [make(shape) for shape in shapes[first:]], STRIDES[first:]


def draw_targets(counts, num):
    """Returns targets of images with some objects each, padded to ``num``."""
    rng = np.random.default_rng(0)
    shape = len(counts), max(*counts, 1)
    low = rng.uniform(0, 40, (*shape, 2))
    boxes = np.concatenate([low, low + rng.uniform(6, 24, (*shape, 2))], -1)
    targets = Targets(
        np.tile(np.array([[60, 90]], np.int32), (len(counts), 1)),
        np.zeros((len(counts), num, 4), np.float32),
        np.full((len(counts), num), -1, np.int32),
        np.zeros((len(counts), num, MASK_SIDE, MASK_SIDE // 8), np.uint8),
        rng.integers(-1, 4, (len(counts), *(side // 8 for side in SIZE))).astype(np.int32),
    )
    for i, count in enumerate(counts):
        targets.boxes[i, :count] = boxes[i, :count]
        targets.classes[i, :count] = np.arange(count) % 3
        targets.masks[i, :count] = rng.integers(0, 256, targets.masks[i, :count].shape)
    return targets


@functools.cache
def losses_of(cls):
    """Returns a function of maps, targets and keys: losses of groups, and gradients of the sum."""
    head = head_of(cls)
    rng = np.random.default_rng(1)
    maps, strides = maps_of(head, SIZE, 4, lambda shape: rng.normal(size=shape).astype(np.float32))
    size = jnp.array([SIZE])
    shapes = jax.eval_shape(
        lambda: head.init(jax.random.key(0), [x[:1] for x in maps], strides, size)
    )
    params = jax.tree.map(lambda x: 0.2 * rng.normal(size=x.shape).astype(np.float32), shapes)

    def total(params, maps, targets, keys):
        losses = head.apply(params, maps, strides, targets, keys, method="losses")
        return sum(x.sum() for x in losses.values()), losses

    run = jax.jit(jax.value_and_grad(total, has_aux=True))
    keys = jax.random.split(jax.random.key(2), 4)

    def differentiate(targets, order=slice(None)):
        part = [x[order] for x in maps], jax.tree.map(lambda x: x[order], targets), keys[order]
        (_, losses), gradients = run(params, *part)
        return losses, gradients

    return differentiate


@compiled
def test_padding_and_other_groups_change_nothing(cls):
    """Bit for bit: places without objects, the images of the other group, and the place."""
    differentiate = losses_of(cls)
    losses, _ = differentiate(draw_targets([3, 1, 2, 3], 8))
    assert all(loss.shape == (2,) and (loss > 0).all() for loss in losses.values())
    padded, _ = differentiate(draw_targets([3, 1, 2, 3], 100))
    jax.tree.map(np.testing.assert_array_equal, padded, losses)

    targets = draw_targets([3, 1, 2, 3], 8)
    targets.classes[2:] = -1
    alone, gradients = differentiate(targets)
    for name, loss in alone.items():
        assert loss[0] == losses[name][0] and np.isfinite(loss[1])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))
    # Without an object, only the background is learned.
    of_background = ("class", "rpn_object", "semantic")
    assert all((alone[name][1] > 0) == name.startswith(of_background) for name in alone)

    swapped, _ = differentiate(draw_targets([3, 1, 2, 3], 8), np.array([2, 3, 0, 1]))
    for name, loss in swapped.items():
        np.testing.assert_array_equal(loss[::-1], losses[name])


@pytest.mark.slow
def test_boxes_without_area_leave_finite_gradients():
    """In images of one pixel, nearly all boxes are clipped to nothing."""
    targets = draw_targets([0, 0, 1, 1], 8)
    targets.image_size[:] = 1
    targets.boxes[2:, 0] = [0, 0, 1, 1]
    losses, gradients = losses_of(MaskRcnn)(targets)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((losses, gradients)))


def shapes_in(function, *args):
    """Returns the shapes of all arrays in the program of a function."""
    text = str(jax.make_jaxpr(function)(*args))
    listed = re.findall(r":[a-z]+\d*\[([\d,]*)\]", text)
    return [tuple(map(int, shape.split(","))) for shape in listed if shape]


@pytest.mark.parametrize(("cls", "num_anchors"), [(RetinaNet, 201_600), (MaskRcnn, 268_569)])
def test_no_array_holds_pairs_of_anchors_and_objects(cls, num_anchors):
    """At full size, in training."""
    num_objects = 101  # no other dimension
    changed = ("num_candidates", "num_proposals", "num_anchors", "num_rois")
    published = {name: getattr(cls, name) for name in changed if hasattr(cls, name)}
    head = head_of(cls, loss_group=1, **published)
    float32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    maps, strides = maps_of(head, (800, 1344), 1, float32)
    targets = draw_targets([1], num_objects)

    def total(params, maps, targets):
        keys = jax.random.split(jax.random.key(0), 1)
        losses = head.apply(params, maps, strides, targets, keys, method="losses")
        return sum(x.sum() for x in losses.values())

    init = lambda x: head.init(jax.random.key(0), x, strides, targets.image_size)  # noqa: E731
    shapes = shapes_in(jax.grad(total), jax.eval_shape(init, maps), maps, targets)
    assert any(num_anchors in shape for shape in shapes)
    with_objects = [math.prod(shape) for shape in shapes if num_objects in shape]
    assert 4 * num_objects <= max(with_objects) < 10 * num_anchors


@heads
def test_results_are_float32(cls):
    """With maps and weights in bfloat16."""
    head = head_of(cls, dtype=jnp.bfloat16)
    bfloat16 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    maps, strides = maps_of(head, SIZE, 2, bfloat16)
    targets = draw_targets([1, 1], 2)

    def run(maps):
        keys = jax.random.split(jax.random.key(0), 2)
        found, params = head.init_with_output(keys[0], maps, strides, targets.image_size)
        return params, found, head.apply(params, maps, strides, targets, keys, method="losses")

    params, found, losses = jax.eval_shape(run, maps)
    types = {x.dtype for x in jax.tree.leaves((params, found._replace(classes=None), losses))}
    assert types == {jnp.dtype(jnp.float32)}
    assert found.classes.dtype == jnp.int32
