"""RoIAlign against float64 loops and torchvision's arrays."""

import functools
import importlib
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tokenvit_jax.ops import roi_align, roi_levels

MODULE = importlib.import_module("tokenvit_jax.ops.roi_align")  # `ops` has an equal name
GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "roi_align.npz"))
FEATURES = GOLDEN["in/features"].transpose(0, 2, 3, 1)
RNG = np.random.default_rng(0)

# A pyramid of four maps for two images; the last map does not have half the rows of the one before.
STRIDES = (4, 8, 16, 32)
MAPS = [
    RNG.normal(size=(2, *size, 2)).astype(np.float32)
    for size in ((24, 32), (12, 16), (6, 8), (2, 4))
]
BOXES = np.array(
    [
        [[3, 5, 20, 31], [0, 0, 140, 96], [-40, -30, 90, 60], [50, 40, 50, 60], [7, 7, 7.5, 7.2]],
        [[0, 0, 0, 0], [-9, 3, -7, 9], [100, 70, 190, 130], [1, 2, 120, 9], [10, 10, 200, 300]],
    ],
    np.float32,
)  # fmt: skip


def naive_weights(box, shape, stride, size, ratio):
    """Returns bins (size, size) of pairs of a cell and its weight."""
    x1, y1, x2, y2 = (float(side) / stride - 0.5 for side in box)
    height, width = (y2 - y1) / size, (x2 - x1) / size
    rows, columns = (ratio or math.ceil(side) for side in (height, width))
    bins = [[[] for _ in range(size)] for _ in range(size)]
    for i, j, k, m in np.ndindex(size, size, max(rows, 0), max(columns, 0)):
        y, x = y1 + (i + (k + 0.5) / rows) * height, x1 + (j + (m + 0.5) / columns) * width
        if not (-1 <= y <= shape[0] and -1 <= x <= shape[1]):
            continue
        y, x = (min(max(at, 0), side - 1) for at, side in zip((y, x), shape, strict=True))
        for row in (int(y), int(y) + 1):
            for column in (int(x), int(x) + 1):
                weight = (1 - abs(y - row)) * (1 - abs(x - column)) / (rows * columns)
                if weight:
                    bins[i][j].append(((row, column), weight))
    return bins


def naive_level(box, num_levels):
    scale = math.sqrt(max(box[2] - box[0], 0) * max(box[3] - box[1], 0))
    return min(max(math.floor(math.log2(scale / 56 + 1e-6)), 0), num_levels - 1)


def naive(maps, strides, boxes, size, ratio=0):
    y = np.zeros((*boxes.shape[:2], size, size, maps[0].shape[-1]))
    for image, n in np.ndindex(*boxes.shape[:2]):
        level = naive_level(boxes[image, n], len(maps))
        x = maps[level][image].astype(np.float64)
        bins = naive_weights(boxes[image, n], x.shape[:2], strides[level], size, ratio)
        for i, j in np.ndindex(size, size):
            y[image, n, i, j] = sum(weight * x[cell] for cell, weight in bins[i][j])
    return y


def golden_boxes(count=None):
    """Returns boxes (2, n, 4), padded with zeros, and a function that selects the golden order."""
    rois = GOLDEN["in/rois"][:count]
    image = rois[:, 0].astype(int)
    place = np.array([(image[:i] == image[i]).sum() for i in range(len(image))])
    boxes = np.zeros((2, place.max() + 1, 4), np.float32)
    boxes[image, place] = rois[:, 1:]
    return boxes, (image, place)


@pytest.mark.parametrize(
    ("size", "ratio", "count"), [(7, 0, 24), (7, 1, 24), (7, 2, 24), (14, 0, 8)]
)
def test_equals_torchvision(size, ratio, count):
    boxes, places = golden_boxes(count)
    pool = functools.partial(
        roi_align, strides=(4,), boxes=boxes, size=size, sampling_ratio=ratio, finest=1e9
    )
    # The gradient of the sum of the features times these weights.
    weights = np.linspace(-1, 1, count * 3 * size**2).reshape(count, 3, size, size)
    given = np.zeros((*boxes.shape[:2], size, size, 3), np.float32)
    given[places] = weights.transpose(0, 2, 3, 1)

    @jax.jit
    def run(x):
        y, pull = jax.vjp(lambda x: pool([x]), x)
        return y, pull(given)[0]

    found, gradient = run(FEATURES)
    expected = GOLDEN[f"out/{size}/ratio_{ratio}"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(found[places], expected, atol=5e-5)
    if f"grad/{size}/ratio_{ratio}" in GOLDEN:
        expected = GOLDEN[f"grad/{size}/ratio_{ratio}"].transpose(0, 2, 3, 1)
        np.testing.assert_allclose(gradient, expected, atol=2e-5)
        assert np.abs(expected).max() > 5


def test_levels():
    boxes, expected = GOLDEN["levels/rois"][:, 1:], GOLDEN["levels/level"]
    np.testing.assert_array_equal(roi_levels(boxes, 4), expected)
    assert set(expected) == {0, 1, 2, 3}
    sides = np.array([0, 111.9, 112, 447.9, 448, 9999], np.float32)
    boxes = np.stack([0 * sides, 0 * sides, sides, sides], 1)
    np.testing.assert_array_equal(roi_levels(boxes, 4), [0, 0, 1, 2, 3, 3])
    np.testing.assert_array_equal(roi_levels(boxes, 2), [0, 0, 1, 1, 1, 1])
    np.testing.assert_array_equal(roi_levels(boxes[None], 4)[0], roi_levels(boxes, 4))


def pool(maps, boxes):
    return roi_align(maps, STRIDES, boxes, size=3)


def pool_and_gradient(maps, boxes, weights):
    y, pull = jax.vjp(lambda maps: pool(maps, boxes), maps)
    return y, pull(weights.astype(y.dtype))[0]


WEIGHTS = RNG.normal(size=(2, 5, 3, 3, 2)).astype(np.float32)


@functools.cache
def pooled():
    return jax.jit(pool_and_gradient)(MAPS, BOXES, WEIGHTS)


def test_pyramid_equals_loops():
    found, gradients = pooled()
    assert {naive_level(box, 4) for box in BOXES.reshape(-1, 4)} == {0, 1, 2}
    np.testing.assert_allclose(found, naive(MAPS, STRIDES, BOXES, 3), atol=1e-5)
    assert not found[0, 3].any() and not found[1, :2].any()  # no width, no area, outside
    # Features are linear in the maps: the gradient times other maps are their features' sum.
    other = [RNG.normal(size=x.shape) for x in MAPS]
    expected = (naive(other, STRIDES, BOXES, 3) * WEIGHTS).sum()
    total = sum((x * y).sum() for x, y in zip(other, gradients, strict=True))
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert not gradients[3].any()


def test_boxes_get_no_gradient():
    grad = jax.jit(jax.grad(lambda boxes: pool(MAPS, boxes).sum()))(BOXES)
    assert not grad.any()


def test_chunks_do_not_matter(monkeypatch):
    """All regions are one chunk otherwise, as they are on accelerators."""
    monkeypatch.setattr(MODULE, "CPU_CHUNK", 3)
    found = jax.jit(lambda *args: pool_and_gradient(*args))(MAPS, BOXES, WEIGHTS)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), found, pooled())


def test_rounded_maps_and_exact_boxes():
    maps = [jnp.asarray(x, jnp.bfloat16) for x in MAPS]
    # Rounded to bfloat16, the boxes would move by a quarter of a pixel.
    found, gradients = jax.jit(pool_and_gradient)(maps, BOXES + 0.25, WEIGHTS)
    assert found.dtype == gradients[0].dtype == jnp.bfloat16
    expected = naive([np.asarray(x, np.float32) for x in maps], STRIDES, BOXES + 0.25, 3)
    np.testing.assert_allclose(found.astype(np.float32), expected, rtol=2**-8, atol=1e-5)


def test_vmap_and_pmap():
    one_by_one = jax.vmap(lambda *args: pool_and_gradient(*args))
    args = jax.tree.map(lambda x: x[:, None], (MAPS, BOXES, WEIGHTS))
    expected = jax.tree.map(lambda x: x[:, None], pooled())
    for run in (jax.jit(one_by_one), jax.pmap(lambda *args: pool_and_gradient(*args))):
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), run(*args), expected)


def test_devices_pool_their_own_images():
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    args = jax.device_put((MAPS, BOXES, WEIGHTS), NamedSharding(mesh, PartitionSpec("data")))
    with jax.set_mesh(mesh):
        program = jax.jit(lambda *args: pool_and_gradient(*args)).lower(*args).compile()
    found = program(*args)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), found, pooled())
    moved = re.findall(r"(?:all-gather|all-to-all|all-reduce)\(.*", program.as_text())
    assert moved == []


def test_any_number_of_images():
    (batch,) = export.symbolic_shape("b")
    shapes = [jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for x in (*MAPS, BOXES)]
    exported = export.export(jax.jit(lambda *args: pool(args[:-1], args[-1])))(*shapes)
    np.testing.assert_allclose(exported.call(*MAPS, BOXES), pooled()[0], atol=1e-5)


def test_memory():
    """1,000 regions of a whole pyramid, forward and backward; nothing is computed."""
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=np.float32)
    maps = [shape((1, 800 // stride, 1344 // stride, 256)) for stride in STRIDES]
    boxes, weights = shape((1, 1000, 4)), shape((1, 1000, 7, 7, 256))

    def both(maps, boxes, weights):
        y, pull = jax.vjp(lambda maps: roi_align(maps, STRIDES, boxes, size=7), maps)
        return y, pull(weights)[0]

    compiled = jax.jit(both).lower(maps, boxes, weights).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 200 * 2**20
