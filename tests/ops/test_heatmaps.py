"""Heat maps of keypoints against loops in float64, and against the arrays of mmpose 1.3.2."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenvit_jax.ops import heatmaps as ops

FOLDER = Path(__file__).parent / "golden"
ARRAYS, FLIP = (dict(np.load(FOLDER / f"pose_{name}.npz")) for name in ("heatmaps", "flip"))
INPUT, SIZE = (256, 192), (64, 48)
SIGMA = 2.0


def channels_last(maps):
    return np.moveaxis(maps, -3, -1)


def naive_target(point, size, sigma, unbiased):
    """Returns the map of one labelled keypoint, pixel by pixel, and its weight."""
    centre = list(point) if unbiased else [int(x + 0.5) for x in point]
    radius = int(3 * sigma)
    edges = [(x - radius, x + radius + 1) for x in centre]
    if any(low >= n or high < 0 for (low, high), n in zip(edges, size[::-1], strict=True)):
        return np.zeros(size), 0.0
    found = np.zeros(size)
    for i, j in np.ndindex(size):
        dx, dy = j - centre[0], i - centre[1]
        if unbiased or max(abs(dx), abs(dy)) <= radius:
            found[i, j] = math.exp(-(dx**2 + dy**2) / (2 * sigma**2))
    return found, 1.0


def naive_dark(heatmap, x, y):
    """Returns DARK's place for the largest value at (x, y) in float64."""
    height, width = heatmap.shape
    if not (1 < x < width - 2 and 1 < y < height - 2):
        return np.array([x, y], float)
    blurred = np.zeros(heatmap.shape)
    weights = [math.exp(-(i**2 + j**2) / 8) for i in range(-5, 6) for j in range(-5, 6)]
    padded = np.pad(np.float64(heatmap), 5)
    for i, j in np.ndindex(heatmap.shape):
        blurred[i, j] = weights @ padded[i : i + 11, j : j + 11].ravel() / sum(weights)
    f = np.log(np.maximum(blurred * heatmap.max() / blurred.max(), 1e-10))
    gradient = [(f[y, x + 1] - f[y, x - 1]) / 2, (f[y + 1, x] - f[y - 1, x]) / 2]
    mixed = (f[y + 1, x + 1] - f[y - 1, x + 1] - f[y + 1, x - 1] + f[y - 1, x - 1]) / 4
    hessian = np.array([
        [(f[y, x + 2] - 2 * f[y, x] + f[y, x - 2]) / 4, mixed],
        [mixed, (f[y + 2, x] - 2 * f[y, x] + f[y - 2, x]) / 4],
    ])  # fmt: skip
    return np.array([x, y]) - np.linalg.solve(hessian, gradient)


def naive_decode(heatmap, refinement):
    """Returns place and score of one map."""
    height, width = heatmap.shape
    y, x = divmod(int(heatmap.argmax()), width)
    score = heatmap[y, x]
    if score <= 0:
        return np.array([-1.0, -1.0]), score
    if refinement == "dark":
        return naive_dark(heatmap, x, y), score
    point = np.array([x, y], float)
    along_x, along_y = 1 < x < width - 1, 1 < y < height - 1
    if refinement == "quarter":
        along_x = along_y = along_x and along_y
    else:
        along_x, along_y = along_x and 0 < y < height, along_y and 0 < x < width
    if along_x and x + 1 < width:
        point[0] += 0.25 * np.sign(heatmap[y, x + 1] - heatmap[y, x - 1])
    if along_y and y + 1 < height:
        point[1] += 0.25 * np.sign(heatmap[y + 1, x] - heatmap[y - 1, x])
    return point, score


@pytest.mark.parametrize("unbiased", [False, True])
def test_targets_equal_mmposes(unbiased):
    suffix = "_unbiased" * unbiased
    points = ops.to_heatmap(ARRAYS["keypoints"], INPUT, SIZE, unbiased=False)
    found = ops.heatmap_targets(points[None], ARRAYS["visible"][None] > 0, SIZE, unbiased=unbiased)
    expected = channels_last(ARRAYS[f"target{suffix}"])
    np.testing.assert_allclose(found.maps[0], expected, atol=2e-7)
    np.testing.assert_array_equal(found.weights[0], ARRAYS[f"target_weight{suffix}"])
    assert 0 < found.weights.sum() < len(ARRAYS["visible"])


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize(("size", "sigma"), [((7, 12), 1.0), ((20, 15), 2.0), ((9, 9), 1.5)])
def test_targets_equal_loops(unbiased, size, sigma):
    points = np.random.default_rng(0).uniform(-9, 24, (3, 8, 2)).astype(np.float32)
    points[0, :4] = [(0, 0), (-0.7, -0.3), (3.5, 2.5), (11, 6)]
    labelled = np.random.default_rng(1).random((3, 8)) < 0.8
    found = jax.jit(lambda *x: ops.heatmap_targets(*x, size, sigma=sigma, unbiased=unbiased))(
        points, labelled
    )
    for place in np.ndindex(labelled.shape):
        expected, weight = naive_target(points[place], size, sigma, unbiased)
        image, number = place
        seen = bool(labelled[place])
        np.testing.assert_allclose(found.maps[image, ..., number], seen * expected, atol=2e-6)
        assert found.weights[place] == seen * weight


@pytest.mark.parametrize(
    ("refinement", "name", "atol"),
    [
        ("quarter", "decoded_mmpose0", 0), ("quarter_by_axis", "decoded_mmpose1", 0),
        ("dark", "decoded_dark", 5e-3),
    ],
)  # fmt: skip
def test_places_equal_mmposes(refinement, name, atol):
    found = ops.decode_heatmaps(channels_last(ARRAYS["predicted"])[None], refinement)
    points = ops.from_heatmap(found.points, INPUT, SIZE, unbiased=False)
    np.testing.assert_allclose(points[0], ARRAYS[name], rtol=0, atol=atol)
    np.testing.assert_array_equal(found.scores[0], ARRAYS["scores"])


def random_maps(size, seed=0):
    """Returns smooth maps (2, *size, 9), the last one below 0, others with peaks at borders."""
    draw = np.random.default_rng(seed)
    sides = np.array(size[::-1])
    points = draw.uniform(-1, sides, (2, 9, 2))
    points[0, :6] = [(0, 3), (1, 3), (sides[0] - 1, 3), (2, 1), (3, sides[1] - 1), sides - 1]
    maps = np.zeros((2, *size, 9))
    for image, number in np.ndindex(2, 9):
        maps[image, ..., number] = naive_target(points[image, number], size, 2.0, True)[0]
    maps += 0.02 * draw.random(maps.shape)
    maps[..., 8] -= 2
    return maps.astype(np.float32)


@pytest.mark.parametrize("refinement", ops.REFINEMENTS)
@pytest.mark.parametrize("size", [(16, 12), (7, 13), (3, 4)])
def test_places_equal_loops(refinement, size):
    maps = random_maps(size)
    for decode in (ops.decode_heatmaps, jax.jit(ops.decode_heatmaps, static_argnums=1)):
        found = decode(maps, refinement)
        for image, number in np.ndindex(2, 9):
            point, score = naive_decode(maps[image, ..., number], refinement)
            np.testing.assert_allclose(found.points[image, number], point, atol=2e-3)
            assert found.scores[image, number] == score
    assert (found.points[:, 8] == -1).all() and (found.points[:, :8] >= 0).all()


def test_peaks_are_found_again():
    """DARK finds the centre of an unbiased Gaussian; the quarter is off by a quarter at most."""
    points = np.random.default_rng(0).uniform(12, 30, (2, 6, 2)).astype(np.float32)
    maps = ops.heatmap_targets(points, np.ones((2, 6), bool), SIZE, unbiased=True).maps
    assert np.abs(ops.decode_heatmaps(maps, "dark").points - points).max() < 2e-3
    quarter = np.abs(ops.decode_heatmaps(maps).points - points).max()
    assert 0.2 < quarter <= 0.25 + 1e-6


def test_same_values_and_no_values():
    """The logarithm of a constant map has no curvature; a map of zeros has no place."""
    flat = np.stack([np.full((9, 9), 0.5), np.zeros((9, 9))], -1)[None].astype(np.float32)
    for refinement in ops.REFINEMENTS:
        found = ops.decode_heatmaps(flat, refinement)
        assert np.isfinite(found.points).all()
        np.testing.assert_array_equal(found.points[0], [(0, 0), (-1, -1)])


@pytest.mark.parametrize("shift", [True, False])
def test_mean_with_the_mirrored_image(shift):
    inputs = [channels_last(FLIP[name]) for name in ("heatmaps", "heatmaps_of_flipped")]
    found = ops.average_mirrored(*inputs, FLIP["flip_index"], shift=shift)
    expected = channels_last(FLIP["averaged_shift" if shift else "averaged_plain"])
    np.testing.assert_array_equal(found, expected)


def test_mean_of_a_mirrored_image_is_mirrored():
    maps, mirrored = (random_maps((7, 12), seed) for seed in (0, 1))
    partners = np.array([0, 2, 1, 4, 3, 6, 5, 8, 7])
    one = ops.average_mirrored(maps, mirrored, partners, shift=False)
    two = ops.average_mirrored(mirrored, maps, partners, shift=False)
    np.testing.assert_array_equal(two, one[:, :, ::-1][..., partners])


def test_loss():
    maps = channels_last(ARRAYS["predicted"])[None]
    targets = ops.HeatmapTargets(
        channels_last(ARRAYS["target"])[None], ARRAYS["target_weight"][None]
    )
    assert ops.heatmap_loss(maps, targets)[0] == pytest.approx(ARRAYS["mse_loss"], abs=1e-8)
    half = targets._replace(weights=targets.weights * np.where(np.arange(17) < 4, 0.5, 0))
    expected = np.square(np.float64(maps - targets.maps)).mean((1, 2))[0]
    expected = (expected * half.weights[0]).mean()
    assert ops.heatmap_loss(maps, half)[0] == pytest.approx(expected, rel=1e-5)
    gradient = jax.jit(jax.grad(lambda maps: ops.heatmap_loss(maps, targets).sum()))(
        jnp.asarray(maps)
    )
    expected = 2 * targets.weights[:, None, None] * (maps - targets.maps) / maps[0].size
    np.testing.assert_allclose(gradient, expected, atol=1e-9)
    assert np.abs(expected).max() > 1e-6


def test_maps_of_bfloat16():
    maps = jnp.asarray(random_maps((16, 12)), jnp.bfloat16)
    for refinement in ops.REFINEMENTS:
        found = ops.decode_heatmaps(maps, refinement)
        assert found.points.dtype == found.scores.dtype == jnp.float32
        wide = ops.decode_heatmaps(maps.astype(jnp.float32), refinement)
        np.testing.assert_array_equal(found.points, wide.points)


@pytest.mark.parametrize("map_over", [jax.vmap, jax.pmap])
def test_mapped(map_over):
    maps = random_maps((16, 12))
    points = np.random.default_rng(3).uniform(-3, 14, (2, 9, 2)).astype(np.float32)
    labelled = np.random.default_rng(4).random((2, 9)) < 0.7
    partners = np.arange(9)[::-1]

    def run(maps, points, labelled):
        targets = ops.heatmap_targets(points, labelled, (16, 12))
        both = ops.average_mirrored(maps, maps[:, :, ::-1], partners, shift=True)
        return ops.heatmap_loss(maps, targets), *ops.decode_heatmaps(both, "dark")

    expected = run(maps, points, labelled)
    found = map_over(run)(*(x[:, None] for x in (maps, points, labelled)))
    for one, two in zip(found, expected, strict=True):
        np.testing.assert_allclose(one[:, 0], two, atol=1e-5)


@pytest.mark.parametrize("unbiased", [True, False])
def test_pixels_of_input_and_heat_map(unbiased):
    corners = np.array([(0, 0), (191, 255)], np.float32)
    found = ops.to_heatmap(corners, INPUT, SIZE, unbiased=unbiased)
    expected = [(0, 0), (47, 63) if unbiased else (191 / 4, 255 / 4)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    back = ops.from_heatmap(found, INPUT, SIZE, unbiased=unbiased)
    np.testing.assert_allclose(back, corners, rtol=1e-6)


def test_unknown_refinement():
    with pytest.raises(ValueError, match=r"refinement='udp'; valid: quarter, quarter_by_axis"):
        ops.decode_heatmaps(np.zeros((1, 4, 4, 2), np.float32), "udp")
