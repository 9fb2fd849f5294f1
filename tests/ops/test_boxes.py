"""Boxes and anchors against float64 loops and mmdetection's arrays."""

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenvit_jax import ops
from tokenvit_jax.ops.boxes import MAX_LOG_FACTOR

FOLDER = Path(__file__).parent / "golden"
CODED, GRIDS = (dict(np.load(FOLDER / name)) for name in ("box_coder.npz", "anchors.npz"))
DEVIATIONS = {
    "rpn": (1.0,) * 4,
    "box": (0.1, 0.1, 0.2, 0.2),
    "stage2": (0.05, 0.05, 0.1, 0.1),
    "stage3": (0.033, 0.033, 0.067, 0.067),
}
RATIOS = (0.5, 1.0, 2.0)
RNG = np.random.default_rng(0)


def random_boxes(*shape):
    low, sides = RNG.uniform(-20, 80, (*shape, 2)), RNG.uniform(0.5, 60, (*shape, 2))
    return np.concatenate([low, low + sides], -1).astype(np.float32)


def naive_iou(a, b):
    """Returns the IoU of two boxes, 0 if nothing is shared."""
    a, b = [float(x) for x in a], [float(x) for x in b]
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    shared = width * height
    areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    return shared / (sum(areas) - shared) if shared else 0.0


def naive_encode(anchor, box, deviations):
    (x, y, w, h), (bx, by, bw, bh) = (
        ((c[0] + c[2]) / 2, (c[1] + c[3]) / 2, c[2] - c[0], c[3] - c[1])
        for c in (np.float64(anchor), np.float64(box))
    )
    deltas = (bx - x) / w, (by - y) / h, math.log(bw / w), math.log(bh / h)
    return [delta / deviation for delta, deviation in zip(deltas, deviations, strict=True)]


def test_iou():
    a, b = random_boxes(40), random_boxes(30)
    a[0], b[0] = b[1], [5, 5, 5, 9]  # equal boxes; no width
    found = jax.jit(ops.box_iou)(a[:, None], b)
    expected = [[naive_iou(x, y) for y in b] for x in a]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found[0, 1] == 1 and not found[:, 0].any()
    pairs = jax.jit(jax.vmap(ops.box_iou))(b, b)
    assert pairs[0] == 0 and pairs[1] == 1  # not 0 / 0
    sides = a[:, 2:].astype(np.float64) - a[:, :2]
    np.testing.assert_allclose(ops.box_areas(a), sides.prod(-1), rtol=1e-5)


@pytest.mark.parametrize("stage", DEVIATIONS)
def test_coder_equals_mmdetection(stage):
    deviations, size = DEVIATIONS[stage], jnp.array([300, 420])
    anchors, deltas = CODED["in/priors"], CODED["in/deltas"]

    @jax.jit
    def run(anchors, boxes, deltas, per_class):
        decode = functools.partial(ops.decode_boxes, deviations=deviations)
        return (
            ops.encode_boxes(anchors, boxes, deviations),
            decode(anchors, deltas),
            decode(anchors, deltas, size=size),
            decode(anchors[:, None], per_class, size=size),
        )

    per_class = CODED["in/deltas_per_class"].reshape(len(anchors), -1, 4)
    encoded, decoded, clipped, of_classes = run(anchors, CODED["in/gt"], deltas, per_class)
    np.testing.assert_allclose(encoded, CODED[f"{stage}/encode"], atol=5e-5)
    np.testing.assert_allclose(decoded, CODED[f"{stage}/decode"], rtol=5e-5, atol=5e-5)
    np.testing.assert_allclose(clipped, CODED[f"{stage}/decode_clipped_300x420"], atol=5e-5)
    expected = CODED[f"{stage}/decode_per_class_clipped"].reshape(of_classes.shape)
    np.testing.assert_allclose(of_classes, expected, atol=5e-5)
    loops = [naive_encode(*pair, deviations) for pair in zip(anchors, CODED["in/gt"], strict=True)]
    np.testing.assert_allclose(encoded, loops, rtol=1e-4, atol=5e-5)


def test_decoding_undoes_encoding():
    anchors, boxes = random_boxes(3, 20), random_boxes(3, 20)
    deltas = jax.jit(lambda a, b: ops.encode_boxes(a, b, DEVIATIONS["box"]))(anchors, boxes)
    decode = jax.jit(lambda a, d: ops.decode_boxes(a, d, DEVIATIONS["box"]))
    inside = np.asarray((abs(deltas[..., 2:]) * 0.2 < MAX_LOG_FACTOR).all(-1))  # not clamped
    assert inside.mean() > 0.9
    found = decode(anchors, deltas)
    np.testing.assert_allclose(found[inside], boxes[inside], atol=1e-4)
    # Deltas of a short type are decoded in float32.
    short = deltas.astype(jnp.bfloat16)
    decoded = decode(anchors, short)
    assert decoded.dtype == jnp.float32
    np.testing.assert_array_equal(decoded, decode(anchors, short.astype(jnp.float32)))


def test_gradient_of_the_coder():
    anchor = jnp.array([10.0, 20.0, 50.0, 30.0])  # 40 x 10
    jacobian = jax.jit(jax.jacobian(lambda d: ops.decode_boxes(anchor, d, (1.0,) * 4)))
    for logarithm, factor in ((0.3, math.exp(0.3)), (9.0, 0.0)):  # 9 is clamped
        found = jacobian(jnp.array([0.1, -0.2, logarithm, logarithm]))
        expected = np.zeros((4, 4))
        expected[[0, 2], 0], expected[[1, 3], 1] = 40, 10
        expected[[0, 2], 2] = -20 * factor, 20 * factor
        expected[[1, 3], 3] = -5 * factor, 5 * factor
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_clipping():
    boxes = np.array([[-3, -4, 90, 70], [5, 6, 7, 8], [100, 2, 120, 9]], np.float32)
    expected = [[0, 0, 60, 50], [5, 6, 7, 8], [60, 2, 60, 9]]
    np.testing.assert_array_equal(jax.jit(ops.clip_boxes)(boxes, jnp.array([50, 60])), expected)


@pytest.mark.parametrize(
    ("kind", "first", "sizes"),
    [("retina", 8, [4, 4 * 2 ** (1 / 3), 4 * 2 ** (2 / 3)]), ("rpn", 4, [8])],
)
@pytest.mark.parametrize(("size", "own"), [((100, 148), (70, 111)), ((128, 96), (98, 59))], ids=str)
def test_anchors_equal_mmdetection(kind, first, sizes, size, own):
    strides = [first * 2**i for i in range(5)]
    cells = [ops.cell_anchors([stride * x for x in sizes], RATIOS) for stride in strides]
    for i, cell in enumerate(cells):
        np.testing.assert_array_equal(cell, GRIDS[f"{kind}/base{i}"])
    maps = [tuple(-(-side // stride) for side in size) for stride in strides]
    found = ops.grid_anchors(maps, strides, cells)
    name = "{}x{}/".format(*size) + kind
    expected = np.concatenate([GRIDS[f"{name}/level{i}"] for i in range(5)])
    np.testing.assert_array_equal(found, expected)
    valid = jax.jit(lambda own: ops.valid_anchors(maps, strides, len(cells[0]), own))(np.array(own))
    pad = "{}x{}".format(*own)
    expected = np.concatenate([GRIDS[f"{name}/valid_of_pad_{pad}/level{i}"] for i in range(5)])
    np.testing.assert_array_equal(valid, expected)
    assert 0 < expected.mean() < 1


def test_number_of_anchors():
    for first, sizes, expected in ((4, [8], 268_569), (8, [4, 5, 6], 201_600)):
        strides = [first * 2**i for i in range(5)]
        maps = [(-(-800 // stride), -(-1344 // stride)) for stride in strides]
        cells = [ops.cell_anchors(sizes, RATIOS)] * 5
        assert ops.grid_anchors(maps, strides, cells).shape == (expected, 4)


def test_a_cell_has_anchors_of_the_same_area():
    cell = ops.cell_anchors([3, 8], RATIOS)
    width, height = (cell[:, 2:] - cell[:, :2]).T
    np.testing.assert_allclose(width * height, [9, 64] * 3, rtol=1e-6)
    np.testing.assert_allclose(height / width, np.repeat(RATIOS, 2), rtol=1e-6)
    np.testing.assert_array_equal(cell[:, :2], -cell[:, 2:])


def test_anchors_that_cross_the_border_equal_mmdetection():
    arrays = dict(np.load(FOLDER / "rpn_border.npz"))
    pad, size = (arrays[f"in/{name}_shape"] for name in ("pad", "image"))
    strides = (4, 8, 16, 32, 64)
    maps = [tuple(-(-side // stride) for side in pad.tolist()) for stride in strides]
    found = jax.jit(
        lambda size, pad: (
            ops.inside_image(arrays["in/anchors"], size)
            & ops.valid_anchors(maps, strides, len(RATIOS), pad)
        )
    )(size, pad)
    np.testing.assert_array_equal(found, arrays["out/used_with_allowed_border_0"])
    assert 0 < found.sum() < arrays["out/used_with_allowed_border_-1"].sum()
