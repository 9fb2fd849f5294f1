"""Superpixel clustering and reconstruction against loops and the authors' arrays."""

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenvit_jax import ops
from tokenvit_jax.measure.macs import count_macs
from tokenvit_jax.ops.precise_product import precise_product
from tokenvit_jax.ops.reconstruct_tokens import MODES, NORMS, _nearest, _nearest_by_top_k

# Written by the released code, one image each; three channels of the reconstruction.
GOLDEN = sorted((Path(__file__).parent / "golden").glob("expedite_*.npz"))
# Not square; several tiles along both axes, whose size does not divide the map.
GRID, CLUSTERS, WINDOW = (13, 10), (9, 7), 3
SETTINGS = {"window": WINDOW, "temperature": 2.0}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def normal(*shape, seed=0):
    """Returns tokens far from the origin, where squares lose digits."""
    return np.random.default_rng(seed).normal(size=shape) + 3


def tokens(batch=2, channels=4, grid=GRID):
    return normal(batch, grid[0] * grid[1], channels)


def problem(batch=2):
    """Returns tokens, unrelated centres and their refined values."""
    num_centers = CLUSTERS[0] * CLUSTERS[1]
    return tokens(batch), normal(batch, num_centers, 4, seed=1), normal(batch, num_centers, 3)


def near(y, x, grid, clusters, window):
    """Returns the indices of the centres around the home cell of the token at (y, x)."""
    home = y * clusters[0] // grid[0], x * clusters[1] // grid[1]
    return [
        i * clusters[1] + j
        for i in range(clusters[0])
        for j in range(clusters[1])
        if abs(i - home[0]) <= window // 2 and abs(j - home[1]) <= window // 2
    ]


def naive_weights(token, centers, temperature):
    distances = np.array([((token - center) ** 2).sum() for center in centers])
    weights = np.exp((distances.min() - distances) / temperature)
    return weights / weights.sum()


def naive_clusters(x, grid, clusters, window, iterations, temperature):
    """Clusters one image with loops."""
    (rows, columns), (h, w) = grid, clusters
    x = x.reshape(rows, columns, -1)
    spans = lambda n, m: [(i * n // m, -(-(i + 1) * n // m)) for i in range(m)]  # noqa: E731
    centers = np.array(
        [x[a:b, c:d].mean((0, 1)) for a, b in spans(rows, h) for c, d in spans(columns, w)]
    )
    for _ in range(iterations):
        sums, totals = np.zeros_like(centers), np.zeros(h * w)
        for y in range(rows):
            for z in range(columns):
                among = near(y, z, grid, clusters, window)
                weights = naive_weights(x[y, z], centers[among], temperature)
                sums[among] += weights[:, None] * x[y, z]
                totals[among] += weights
        centers = sums / np.maximum(totals, 1e-16)[:, None]
    return centers


@pytest.mark.parametrize(
    ("grid", "clusters", "window", "iterations"),
    [
        (GRID, CLUSTERS, WINDOW, 2),
        (GRID, CLUSTERS, 1, 3),
        ((5, 24), (2, 19), 5, 1),  # one tile in one direction, several in the other
        ((4, 15), (9, 3), 3, 2),  # more rows of centres than of tokens
        ((1, 10), (3, 3), 1, 2),  # centres that no token sees: 0
        ((7, 6), (1, 1), 3, 2),
    ],
)
def test_clusters_equal_the_loops(grid, clusters, window, iterations):
    x = tokens(grid=grid)
    found = ops.cluster_superpixels(
        x, grid, clusters, window=window, iterations=iterations, temperature=2.0
    )
    for b in range(2):
        expected = naive_clusters(x[b], grid, clusters, window, iterations, 2.0)
        np.testing.assert_allclose(found[b], expected, atol=1e-12)


@pytest.mark.parametrize("normalize", ["sum", "l2"])
@pytest.mark.parametrize(("mode", "neighbors"), [("soft", 7), ("soft", 99), ("window", 1)])
def test_reconstruction_equals_the_loops(mode, neighbors, normalize):
    x, centers, refined = problem()
    found = ops.reconstruct_tokens(
        x, centers, refined, neighbors=neighbors, normalize=normalize, mode=mode, grid=GRID,
        clusters=CLUSTERS, **SETTINGS,
    )  # fmt: skip
    expected = np.zeros_like(found)
    for b, n in np.ndindex(*expected.shape[:2]):
        if mode == "window":
            among = near(*divmod(n, GRID[1]), GRID, CLUSTERS, WINDOW)
        else:
            among = np.argsort([((x[b, n] - c) ** 2).sum() for c in centers[b]])[:neighbors]
        weights = naive_weights(x[b, n], centers[b, among], 2.0)
        if normalize == "l2":
            weights /= np.sqrt((weights**2).sum())
        expected[b, n] = weights @ refined[b, among]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def settings_of(golden):
    grid, clusters = (int(golden["H"]), int(golden["W"])), (int(golden["h"]), int(golden["w"]))
    return grid, clusters, {"temperature": float(golden["tau"])}


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_clusters_equal_the_released_code(path):
    golden = np.load(path)
    grid, clusters, settings = settings_of(golden)
    settings["window"] = int(golden["lambda_window"])
    x = golden["tokens"][None]
    for iterations in (0, 1, 5):  # each is compiled
        found = ops.cluster_superpixels(x, grid, clusters, iterations=iterations, **settings)
        np.testing.assert_allclose(found[0], golden[f"centers_{iterations}"], atol=1e-12)
    found = ops.cluster_superpixels(x.astype(np.float32), grid, clusters, **settings)
    np.testing.assert_allclose(found[0], golden["centers_5"], atol=1e-5)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_reconstruction_equals_the_released_code(path):
    golden = np.load(path)
    grid, clusters, settings = settings_of(golden)
    settings |= {"grid": grid, "clusters": clusters}
    x, centers = golden["tokens"][None], golden["centers_5"][None]
    labels = np.arange(centers.shape[1], dtype=float)[None, :, None]
    hard = jax.jit(lambda c: ops.reconstruct_tokens(x, c, labels, mode="hard"))
    for iterations in (0, 1, 2, 3, 5):
        found = hard(golden[f"centers_{iterations}"][None])[0, :, 0]
        np.testing.assert_array_equal(found, golden[f"labels_{iterations}"])
    names = [name for name in golden.files if name.partition("_")[0] in (*NORMS, "bilinear")]
    cases = [(name, np.float64, 1e-12) for name in names]
    for name, dtype, atol in (*cases, (names[0], np.float32, 1e-5)):
        normalize, _, neighbors = name.partition("_")
        mode = {"mode": "bilinear"}
        if normalize in NORMS:
            k = int(neighbors) % 1000  # -1: all
            mode = {"neighbors": k, "normalize": normalize, "mode": "soft"}
        arrays = (y.astype(dtype) for y in (x, centers, golden["refined"][None]))
        found = ops.reconstruct_tokens(*arrays, **settings, **mode)
        np.testing.assert_allclose(found[0], golden[name], atol=atol, err_msg=name)


def test_wide_window_is_a_softmax_over_all_centers():
    x, centers, refined = problem()
    settings = {"temperature": 2.0, "grid": GRID, "clusters": CLUSTERS}
    windows = ops.reconstruct_tokens(x, centers, refined, mode="window", window=99, **settings)
    dense = ops.reconstruct_tokens(x, centers, refined, neighbors=1000, **settings)
    distances = ((x[:, :, None] - centers[:, None]) ** 2).sum(-1)
    expected = jax.nn.softmax(-distances / 2.0, -1) @ refined
    np.testing.assert_allclose(windows, expected, atol=1e-12)
    np.testing.assert_allclose(dense, expected, atol=1e-12)


def test_as_many_centers_as_tokens_change_nothing():
    x = tokens()
    centers = ops.cluster_superpixels(x, GRID, GRID, window=1)
    np.testing.assert_allclose(centers, x, atol=1e-12)
    refined = normal(2, GRID[0] * GRID[1], 3, seed=1)
    for settings in ({"neighbors": 1}, {"mode": "hard"}, {"mode": "window", "window": 1},
                     {"mode": "bilinear"}):  # fmt: skip
        found = ops.reconstruct_tokens(x, x, refined, grid=GRID, clusters=GRID, **settings)
        np.testing.assert_allclose(found, refined, atol=1e-12, err_msg=str(settings))


def test_weights_of_a_token():
    """The weights of a token sum to 1 everywhere on the map; with l2, their squares do."""
    x, centers, refined = problem()
    ones = np.ones_like(refined)
    settings = SETTINGS | {"grid": GRID, "clusters": CLUSTERS, "neighbors": 6}
    for mode in MODES:
        found = ops.reconstruct_tokens(x, centers, ones, mode=mode, **settings)
        np.testing.assert_allclose(found, 1, atol=1e-12)
    for mode, most in (("soft", 6), ("window", WINDOW**2)):
        found = ops.reconstruct_tokens(x, centers, ones, mode=mode, normalize="l2", **settings)
        assert found.min() >= 1 and found.max() <= most**0.5
        assert found.max() > 1.5


def test_where_tokens_are_and_ties():
    """Moving all features moves the centres; among equal centres, the first are nearest."""
    x = tokens()
    apart = ops.cluster_superpixels(x, GRID, CLUSTERS, **SETTINGS)
    moved = ops.cluster_superpixels(x + 100, GRID, CLUSTERS, **SETTINGS)
    np.testing.assert_allclose(moved, apart + 100, atol=1e-9)
    refined = np.arange(6.0)[None, :, None]
    same = np.zeros((1, 6, 4))
    for settings, expected in (({"neighbors": 3}, 1), ({"mode": "hard"}, 0), ({}, 2.5)):
        found = ops.reconstruct_tokens(x[:1], same, refined, **settings)
        np.testing.assert_allclose(found, expected)


def both(x, **kwargs):
    """Clusters, changes the centres and reconstructs in two ways."""
    centers = ops.cluster_superpixels(x, GRID, CLUSTERS, iterations=2, **SETTINGS)
    kwargs = SETTINGS | kwargs | {"neighbors": 6, "grid": GRID, "clusters": CLUSTERS}
    modes = ("soft", "window")
    return [ops.reconstruct_tokens(x, centers, centers**2, mode=m, **kwargs) for m in modes]


def test_nearest_centers_of_the_form_for_gpus():
    """Ties go to the lowest centre, as in the form for other platforms."""
    distances = jnp.asarray(np.random.default_rng(3).integers(0, 4, (2, 40, 7)), jnp.float32)
    found = _nearest_by_top_k(distances, 6)
    np.testing.assert_array_equal(found, _nearest(distances, 6))
    expected = np.argsort(distances, 1, kind="stable")[:, :6]
    np.testing.assert_array_equal(found, expected)


def test_gradient_of_a_precise_product():
    draw = np.random.default_rng(0)
    x, y, direction = (draw.normal(size=shape) for shape in ((2, 5, 3), (2, 4, 3), (2, 5, 4)))
    with jax.enable_x64(True):
        loss = lambda x, y: (precise_product("bnc,bmc->bnm", x, y) * direction).sum()  # noqa: E731
        d_x, d_y = jax.jit(jax.grad(loss, (0, 1)))(x, y)
    np.testing.assert_allclose(d_x, direction @ y, rtol=1e-12)
    np.testing.assert_allclose(d_y, direction.swapaxes(1, 2) @ x, rtol=1e-12)


def test_transforms():
    x = tokens()
    whole = jax.jit(both)(x)
    with jax.disable_jit():
        chex.assert_trees_all_close(both(x), whole, rtol=1e-10)
    one_by_one = jax.jit(jax.vmap(both))(x[:, None])
    chex.assert_trees_all_close(jax.tree.map(lambda y: y[:, 0], one_by_one), whole, rtol=1e-10)
    mapped = jax.pmap(both)(x[:, None])
    chex.assert_trees_all_close(jax.tree.map(lambda y: y[:, 0], mapped), whole, rtol=1e-10)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_computes_in_float32(dtype):
    x, centers, refined = (jnp.asarray(y, dtype) for y in problem())
    exact = [np.asarray(y, np.float32) for y in (x, centers, refined)]
    found = ops.cluster_superpixels(x, GRID, CLUSTERS, **SETTINGS)
    assert found.dtype == dtype
    expected = ops.cluster_superpixels(exact[0], GRID, CLUSTERS, **SETTINGS)
    np.testing.assert_array_equal(found, expected.astype(dtype))
    found = ops.reconstruct_tokens(x, centers, refined, neighbors=7)
    assert found.dtype == dtype
    expected = ops.reconstruct_tokens(*exact, neighbors=7)
    np.testing.assert_array_equal(found, expected.astype(dtype))


def test_gradients():
    x, _, refined = problem(batch=1)
    direction = normal(*x.shape, seed=4)

    def loss(x, refined):
        centers = ops.cluster_superpixels(x, GRID, CLUSTERS, iterations=2, **SETTINGS)
        settings = SETTINGS | {"grid": GRID, "clusters": CLUSTERS, "neighbors": 6}
        soft = ops.reconstruct_tokens(x, centers, refined, **settings)
        window = ops.reconstruct_tokens(x, centers, refined, mode="window", **settings)
        return jnp.sum(jnp.sin(soft) + jnp.cos(window))

    loss = jax.jit(loss)
    d_x, d_refined = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, refined)
    step = 1e-6
    difference = loss(x + step * direction, refined) - loss(x - step * direction, refined)
    np.testing.assert_allclose(jnp.vdot(d_x, direction), difference / (2 * step), rtol=1e-5)
    direction = direction[:, : refined.shape[1], :3]
    difference = loss(x, refined + step * direction) - loss(x, refined - step * direction)
    np.testing.assert_allclose(jnp.vdot(d_refined, direction), difference / (2 * step), rtol=1e-5)
    assert (np.abs(d_x).max(-1) > 0).all()


def test_macs():
    x, centers, refined = problem()
    pairs = sum(len(near(*at, GRID, CLUSTERS, WINDOW)) for at in np.ndindex(*GRID))
    cluster = lambda x: ops.cluster_superpixels(x, GRID, CLUSTERS, iterations=3, window=WINDOW)  # noqa: E731
    assert count_macs(cluster, x) == 2 * 4 * (130 + 3 * 2 * pairs)

    def reconstruct(**settings):
        settings |= {"grid": GRID, "clusters": CLUSTERS, "window": WINDOW}
        fn = lambda *args: ops.reconstruct_tokens(*args, **settings)  # noqa: E731
        return count_macs(fn, x, centers, refined)

    assert reconstruct(neighbors=20) == 2 * 130 * (63 * 4 + 20 * 3)
    assert reconstruct(neighbors=99) == 2 * 130 * 63 * (4 + 3)
    assert reconstruct(mode="hard") == 2 * 130 * 63 * 4
    assert reconstruct(mode="window") == 2 * pairs * (4 + 3)
    assert reconstruct(mode="bilinear") == 2 * 3 * 2 * (13 * 7 + 130)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": np.zeros((130, 4))}, r"tokens has shape \(130, 4\); expected \(batch, tokens"),
        (
            {"grid": (13, 9)},
            r"grid is \(13, 9\); it must be .* with the product 130",
        ),
        ({"grid": (130,)}, r"grid is \(130,\); it must be \(rows, columns\)"),
        ({"clusters": (0, 7)}, r"clusters is \(0, 7\); it must be .* each at least 1"),
        ({"clusters": (14, 10)}, r"clusters is \(14, 10\); .* of at most 130 for grid \(13, 10\)"),
        ({"window": 4}, "window is 4; it must be odd and at least 1"),
        ({"window": -1}, "window is -1; it must be odd"),
        ({"iterations": -1}, "iterations is -1; it must be at least 0"),
        ({"temperature": 0}, "temperature is 0; it must be above 0 and finite"),
        ({"temperature": float("nan")}, "temperature is nan; it must be above 0"),
    ],
)
def test_mistakes_in_clustering(change, message):
    arguments = {"tokens": tokens(), "grid": GRID, "clusters": CLUSTERS} | change
    with pytest.raises(ValueError, match=message):
        ops.cluster_superpixels(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": np.zeros((130, 4))}, r"tokens has shape \(130, 4\); expected \(batch"),
        ({"centers": np.zeros((2, 63, 5))}, r"centers has shape .*; expected \(2, clusters, 4\)"),
        ({"refined": np.zeros((2, 62, 3))}, r"refined has shape .*; expected \(2, 63, channels\)"),
        ({"neighbors": 0}, "neighbors is 0; it must be at least 1"),
        ({"temperature": -1}, "temperature is -1; it must be above 0"),
        ({"normalize": "L2"}, "normalize is 'L2'; it must be one of sum, l2"),
        ({"mode": "naive"}, "mode is 'naive'; it must be one of soft, hard, window, bilinear"),
        ({"mode": "window"}, "grid is None and clusters None; mode 'window' needs both"),
        ({"mode": "bilinear", "grid": GRID, "clusters": (9, 9)}, r"clusters is \(9, 9\); it must"),
        ({"mode": "window", "grid": (9, 9), "clusters": CLUSTERS}, r"grid is \(9, 9\); it must"),
        ({"mode": "window", "grid": GRID, "clusters": CLUSTERS, "window": 2}, "window is 2; it"),
    ],
)
def test_mistakes_in_reconstruction(change, message):
    arguments = dict(zip(("tokens", "centers", "refined"), problem(), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        ops.reconstruct_tokens(**arguments)
