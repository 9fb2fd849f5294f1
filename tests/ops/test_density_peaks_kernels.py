"""Kernels of clustering, interpreted on the CPU, against plain loops and other forms.

Against loops, tokens are small integers: their distances are exact and full of ties.
"""

import contextlib
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenvit_jax import ops
from tokenvit_jax.kernels import cluster_sums, cluster_sums_tpu
from tokenvit_jax.kernels import density_peaks as kernels
from tokenvit_jax.kernels import density_peaks_tpu as tpu_kernels
from tokenvit_jax.kernels import top_indices as counting
from tokenvit_jax.kernels.platforms import by_platform

LENGTH, NEIGHBORS = 130, 5  # three blocks of 64 or two of 128 tokens, the last with 2 tokens


def points(channels, masked):
    """Returns tokens (2, LENGTH, channels), |x|^2, and |x|^2 or inf for masked tokens."""
    rng = np.random.default_rng(channels)
    x = np.zeros((2, LENGTH, channels), np.float32)
    x[..., -3:] = rng.integers(-2, 3, (2, LENGTH, 3))
    mask = rng.random((2, LENGTH)) < 0.6 if masked else np.ones((2, LENGTH), bool)
    if masked:
        mask[1, 3:] = False  # fewer tokens than neighbours
    x[~mask] = 0
    square = (x**2).sum(-1)
    return x, square, np.where(mask, square, np.inf).astype(np.float32), mask


def distances(x, mask):
    """Returns squared distances (N, N) from all tokens to real ones, inf to masked ones."""
    squares = ((x[:, None].astype(np.float64) - x) ** 2).sum(-1)
    return np.where(mask[None], squares, np.inf)


@functools.cache
def jitted(name, of=kernels, **options):
    return jax.jit(functools.partial(getattr(of, name), interpret=True, **options))


@pytest.mark.parametrize("case", ["gpu", "gpu, masked", "gpu, bfloat16", "tpu", "tpu, bfloat16"])
def test_nearest_neighbors_and_denser(case):
    masked = "masked" in case
    x, square, bias, mask = points(70, masked)  # channels in two parts
    wide = x
    x = jnp.asarray(x, jnp.bfloat16) if "bfloat16" in case else x
    # Few values, so that many densities are equal; 0 for masked tokens, as everywhere.
    density = np.random.default_rng(1).integers(1, 6, mask.shape).astype(np.float32) * mask
    if "tpu" in case:
        find = jitted("nearest_neighbors", tpu_kernels, k=NEIGHBORS)
        squares, indices, farthest = find(x, square)
        found, parent = jitted("nearest_denser", tpu_kernels)(x, square, density)
    else:
        find = jitted("nearest_neighbors", k=NEIGHBORS, masked=masked)
        squares, indices, farthest = find(x, square, bias)
        found, parent = jitted("nearest_denser")(x, square, bias, density, squares, indices)
    searched = 0
    for image in range(2):
        away = distances(wide[image], mask[image])
        order = np.argsort(away, axis=1, kind="stable")[:, :NEIGHBORS].T
        nearest = np.take_along_axis(away.T, order, 0)
        np.testing.assert_array_equal(squares[image], nearest)
        same = nearest < np.inf
        np.testing.assert_array_equal(np.asarray(indices[image])[same], order[same])
        real = np.flatnonzero(mask[image])
        np.testing.assert_array_equal(farthest[image][real], away[real][:, real].max(1))
        assert np.max(farthest[image]) == away[real][:, real].max()
        for i in real:
            denser = [j for j in real if (-density[image, j], j) < (-density[image, i], i)]
            expected = min(denser, key=lambda j: (away[i, j], j), default=i)
            assert parent[image, i] == expected
            assert found[image, i] == (away[i, expected] if denser else np.inf)
            searched += expected not in order[:, i]
    assert searched > 10 or masked  # the second kernel has work


def test_nearest_center():
    x, square, _, _ = points(5, masked=False)
    centers = np.random.default_rng(0).integers(0, LENGTH, (2, 9)).astype(np.int32)
    used = np.array([9, 4], np.int32)
    nearest = jitted("nearest_center")(x, square, centers, used)
    for image in range(2):
        away = distances(x[image], np.ones(LENGTH, bool))[:, centers[image, : used[image]]]
        np.testing.assert_array_equal(nearest[image], away.argmin(1))
    at_centers = np.stack([x[image][centers[image]] for image in range(2)])
    on_tpu = jitted("nearest_center", tpu_kernels)(x, at_centers, used)
    np.testing.assert_array_equal(on_tpu, nearest)
    none = jitted("nearest_center")(x, square, centers, jnp.zeros(2, jnp.int32))
    assert not none.any()


@pytest.fixture(params=["cuda", "tpu"])
def platform(request, monkeypatch):
    """Operators choose the interpreted kernels of a platform."""

    def by_kernel(operator, *args, **forms):
        return forms.get(request.param, forms["default"])(*args)

    for name in ("density_peaks", "merge_tokens"):  # `ops` has equal names
        module = importlib.import_module(f"tokenvit_jax.ops.{name}")
        monkeypatch.setattr(module, "by_platform", by_kernel)
        for kernel in ("means_by_kernel", "sums_by_kernel"):
            interpreted = functools.partial(getattr(cluster_sums, kernel), interpret=True)
            monkeypatch.setattr(module, kernel, interpreted, raising=False)
    for module, names in {
        kernels: "nearest_neighbors nearest_denser nearest_center",
        counting: "ranks",
        tpu_kernels: "nearest_neighbors nearest_denser nearest_center",
        cluster_sums_tpu: "means",
    }.items():
        for kernel in names.split():
            interpreted = functools.partial(getattr(module, kernel), interpret=True)
            monkeypatch.setattr(module, kernel, interpreted)
    return request.param


@contextlib.contextmanager
def exactly():
    """Operators have their usual forms, and float64."""
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        for name in ("density_peaks", "merge_tokens"):
            module = importlib.import_module(f"tokenvit_jax.ops.{name}")
            patch.setattr(module, "by_platform", by_platform)
        yield


def test_operators_call_their_kernels(platform):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 41, 3))  # a shape of this test only: operators are compiled once
    scores, d_merged = rng.normal(size=(2, 41)), rng.normal(size=(2, 6, 3))
    mask = rng.random((2, 41)) < 0.7 if platform == "cuda" else None

    def run(x, scores):
        found = ops.cluster_density_peaks(x, 6, mask=mask)
        loss = lambda x, s: jnp.sum(ops.merge_tokens(x, found.assignment, 6, s) * d_merged)  # noqa: E731
        return found, jax.grad(loss, (0, 1))(x, scores)

    def cluster(dtype):
        return jax.jit(lambda *args: run(*args))(x.astype(dtype), scores.astype(dtype))

    found, gradients = cluster(np.float32)
    with exactly():
        expected, expected_gradients = cluster(np.float64)
    np.testing.assert_array_equal(found.assignment, expected.assignment)
    np.testing.assert_array_equal(found.centers, expected.centers)
    np.testing.assert_allclose(found.density, expected.density, rtol=1e-5)
    np.testing.assert_allclose(found.delta, expected.delta, rtol=1e-5)
    for a, b in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_tokens_of_16_bits(platform, dtype):
    # Kernels multiply them as they are, far from the origin, too.
    x = jnp.asarray(np.random.default_rng(0).normal(3, 1, (2, 43, 70)), dtype)
    x = x.at[:, 20:].set(x[:, :1])
    found = jax.jit(functools.partial(ops.cluster_density_peaks, num_clusters=6))(x)
    with exactly():
        expected = ops.cluster_density_peaks(x.astype(jnp.float64), 6)
    np.testing.assert_array_equal(found.assignment, expected.assignment)
    np.testing.assert_array_equal(found.centers, expected.centers)
    np.testing.assert_allclose(found.density, expected.density, rtol=1e-5)
    np.testing.assert_allclose(found.delta, expected.delta, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found.density[:, 20:], 1)


def test_limits():
    assert kernels.misfit(512, 16) is None
    assert kernels.misfit(513) == "513 channels are more than 512"
    assert kernels.misfit(64, 17) == "17 neighbors are more than 16"
    assert tpu_kernels.misfit(3136, 64, jnp.float32, 5, masked=False) is None
    assert tpu_kernels.misfit(3136, 64, jnp.float32, 5, masked=True) == "masked tokens"
    misfit = tpu_kernels.misfit(49, 64, jnp.float32, 17, masked=False)
    assert misfit == "17 neighbors are more than 16"
    assert tpu_kernels.misfit(49, 64, jnp.float16) == "float16"
    assert cluster_sums_tpu.misfit(49, 64, jnp.float16) == "float16"
    assert cluster_sums_tpu.misfit(49, 2048, jnp.float32) is None
    assert cluster_sums_tpu.misfit(98, 4096, jnp.float32).endswith("exceed 16 MiB")
    assert cluster_sums_tpu.misfit(98, 4096, jnp.bfloat16) is None
    assert cluster_sums_tpu.misfit(1024, 512, jnp.bfloat16).endswith("exceed 16 MiB")
    # What did not compile for v4.
    assert cluster_sums_tpu.misfit(174, 4096, jnp.bfloat16).endswith("exceed 16 MiB")
    assert cluster_sums_tpu.misfit(273, 2048, jnp.float32).endswith("exceed 16 MiB")
    # The most clusters of a recipe (ClusTR-S, 800 x 1344 pixels) that compiles.
    assert cluster_sums_tpu.misfit(1050, 128, jnp.bfloat16) is None


def test_images_on_a_tpu_are_limited_by_its_memory():
    peaks = "67200 keys with 64 channels exceed 4 MiB", None
    sums = "4200 clusters with 64 channels exceed 16 MiB", None
    for kind, *misfits in zip(("TPU v4", "TPU v5 lite"), peaks, sums, strict=True):
        device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
        mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            assert tpu_kernels.misfit(67200, 64, jnp.bfloat16) == misfits[0]
            assert cluster_sums_tpu.misfit(4200, 64, jnp.bfloat16) == misfits[1]
    assert tpu_kernels.misfit(67200, 64, jnp.bfloat16) == peaks[0]
