"""Bilinear values of maps and of masks at points, and the choice of uncertain points."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenvit_jax import ops

GOLDEN = dict(np.load(Path(__file__).parent.parent / "heads" / "golden" / "m2f_losses.npz"))
# Square, odd, and a single row or column.
SIZES = [(8, 8), (5, 7), (1, 6), (3, 1)]


def draw_points(*shape, seed=1):
    """Returns points (..., 2), some of them outside of the map, the first ones on its borders."""
    points = np.random.default_rng(seed).uniform(-0.3, 1.3, (*shape, 2)).astype(np.float32)
    points[..., :5, :] = [(0, 0), (1, 1), (0.5, 0.5), (0, 1), (-0.2, 0.4)]
    return points


def naive(cells, points):
    """Returns the values (P,) float64 of one map at points (P, 2), one after another."""
    height, width = cells.shape
    found = np.zeros(len(points))
    for number, (x, y) in enumerate(np.float64(points)):
        column, row = x * width - 0.5, y * height - 0.5
        for i in (math.floor(row), math.floor(row) + 1):
            for j in (math.floor(column), math.floor(column) + 1):
                if 0 <= i < height and 0 <= j < width:
                    found[number] += (1 - abs(row - i)) * (1 - abs(column - j)) * cells[i, j]
    return found


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("own", [False, True])
def test_maps_equal_loops(size, own):
    maps = np.random.default_rng(0).normal(size=(3, *size)).astype(np.float32)
    points = draw_points(*(3,) * own, 40)
    each = points if own else [points] * 3
    expected = [naive(*pair) for pair in zip(maps, each, strict=True)]
    for sample in (ops.sample_maps, jax.jit(ops.sample_maps)):
        np.testing.assert_allclose(sample(maps, points), expected, atol=2e-6)
    # A map of bfloat16 is read as it is, and summed in float32.
    short = jnp.asarray(maps, jnp.bfloat16)
    found = ops.sample_maps(short, points)
    assert found.dtype == jnp.float32
    expected = [naive(*pair) for pair in zip(np.float64(short), each, strict=True)]
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_centres_of_cells():
    cells = np.arange(12, dtype=np.float32).reshape(1, 3, 4)
    rows, columns = np.mgrid[:3, :4]
    centres = np.stack([(columns + 0.5) / 4, (rows + 0.5) / 3], -1).reshape(-1, 2)
    np.testing.assert_allclose(ops.sample_maps(cells, centres.astype(np.float32))[0], range(12))


def test_rows_of_other_maps():
    """Two rows of points read the same map; one map is read by none and has no gradient."""
    maps = np.random.default_rng(0).normal(size=(3, 5, 7)).astype(np.float32)
    points, which = draw_points(4, 30), np.array([2, 0, 2, 2])
    found = ops.sample_maps(maps, points, which)
    np.testing.assert_array_equal(found, ops.sample_maps(maps[which], points))
    gradient = jax.jit(jax.grad(lambda x: (ops.sample_maps(x, points, which) ** 2).sum()))(maps)
    copied = jax.jit(jax.grad(lambda x: (ops.sample_maps(x[which], points) ** 2).sum()))(maps)
    np.testing.assert_allclose(gradient, copied, atol=1e-5)
    assert gradient[1].max() == 0 < abs(gradient[2]).max()
    chosen = ops.uncertain_points(maps, points, points[:, :0], 9, which)
    np.testing.assert_array_equal(
        chosen, ops.uncertain_points(maps[which], points, points[:, :0], 9)
    )


@pytest.mark.parametrize("own", [False, True])
def test_gradient_of_maps(own):
    """It spreads what arrives at a point with the weights of reading."""
    maps = np.random.default_rng(0).normal(size=(2, 5, 7)).astype(np.float32)
    points = draw_points(*(2,) * own, 30)
    probe = np.random.default_rng(3).normal(size=(2, 30)).astype(np.float32)
    found = jax.jit(jax.grad(lambda maps: (probe * ops.sample_maps(maps, points)).sum()))(maps)
    expected = np.zeros(maps.shape)
    for place in np.ndindex(maps.shape):
        unit = np.zeros(maps.shape[1:])
        unit[place[1:]] = 1
        each = points[place[0]] if own else points
        expected[place] = np.float64(probe[place[0]]) @ naive(unit, each)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_gradient_of_points():
    """Inside of a cell, values are linear along x and along y."""
    maps = np.random.default_rng(0).normal(size=(1, 5, 7))
    points, step = np.array([[0.31, 0.42], [0.77, 0.13]]), 1e-5
    with jax.enable_x64(True):
        found = jax.jit(jax.grad(lambda points: ops.sample_maps(maps, points).sum()))(
            jnp.array(points)
        )
    for place in np.ndindex(points.shape):
        moved = np.zeros(points.shape)
        moved[place] = step
        pair = [naive(maps[0], points + sign * moved).sum() for sign in (1, -1)]
        assert found[place] == pytest.approx((pair[0] - pair[1]) / (2 * step), abs=1e-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32])
@pytest.mark.parametrize("own", [False, True])
def test_objects_equal_their_masks(size, dtype, own):
    """Objects of the second map lie over those of the first one."""
    draw = np.random.default_rng(0)
    ids = np.array([3, 0, 9, 120, 77])  # 77 is nowhere
    first, second = draw.choice(ids[:3], size), draw.choice([255, 120], size)
    second.flat[0] = 120
    id_maps = np.stack([first, np.where(second == 255, 200, second)]).astype(dtype)
    points = draw_points(*(5,) * own, 40)
    masks = [(id_maps == number).any(0) for number in ids]
    each = points if own else [points] * 5
    expected = [naive(*pair) for pair in zip(masks, each, strict=True)]
    found = jax.jit(ops.sample_objects)(id_maps, ids, points)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert found[4].max() == 0 < found[3].max()


def test_no_mask_is_made():
    """Memory does not grow with the product of objects and cells."""
    shapes = [((1, 256, 256), np.uint8), ((50,), np.int32), ((64, 2), np.float32)]
    inputs = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    compiled = jax.jit(ops.sample_objects).lower(*inputs).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 256 * 256


def test_uncertain_points_are_those_of_the_smallest_logits():
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(3, 6, 9)).astype(np.float32)
    candidates, fresh = draw_points(3, 30), draw_points(3, 9, seed=5)[:, 5:]
    found = jax.jit(ops.uncertain_points, static_argnums=3)(logits, candidates, fresh, 14)
    for values, points, own, chosen in zip(logits, candidates, fresh, found, strict=True):
        order = np.argsort(abs(naive(values, points)), kind="stable")[:10]
        np.testing.assert_array_equal(chosen[10:], own)
        assert set(map(tuple, np.array(chosen[:10]))) == set(map(tuple, points[order]))


def test_choice_has_no_gradient():
    args = np.ones((1, 4, 4), np.float32), draw_points(1, 9), draw_points(1, 6)

    def run(*args):
        return ops.uncertain_points(*args, 10).sum()

    for gradient in jax.jit(jax.grad(run, (0, 1, 2)))(*args):
        assert not np.asarray(gradient).any()


@pytest.mark.parametrize("num_points", [5, 16])
def test_impossible_number_of_points(num_points):
    args = np.ones((1, 4, 4), np.float32), draw_points(1, 9), draw_points(1, 6)
    with pytest.raises(ValueError, match=rf"num_points={num_points} .* valid: 6 to 15"):
        ops.uncertain_points(*args, num_points)


@pytest.mark.parametrize("layer", range(3))
def test_choice_equals_detectron2(layer):
    matched = [
        GOLDEN[f"masks{layer}"][i][GOLDEN[f"layer{layer}_query_index_{i}"]]
        for i in range(len(GOLDEN["counts"]))
    ]
    candidates, fresh, expected = (
        GOLDEN[f"layer{layer}_{name}_points_xy"] for name in ("candidate", "random", "chosen")
    )
    found = ops.uncertain_points(np.concatenate(matched), candidates, fresh, expected.shape[1])
    for ours, theirs in zip(np.asarray(found), expected, strict=True):
        assert set(map(tuple, ours)) == set(map(tuple, theirs))
        assert len(set(map(tuple, theirs))) == len(theirs)
