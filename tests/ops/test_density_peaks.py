"""Clustering by density peaks against plain loops, and properties of every clustering."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampled import sampled

from tokenvit_jax import ops
from tokenvit_jax.ops import chunks
from tokenvit_jax.ops.counted import MAC_FORMULAS, PREFIX


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


# Most tests share one shape and number of clusters, so that little is compiled.
SHAPE = (2, 37, 3)


def tokens(*shape, seed=0):
    """Returns tokens with distinct distances, far from the origin."""
    return np.random.default_rng(seed).normal(size=shape) + 5


def reference(x, num_clusters, *, neighbors=5, mask=None, assign="nearest"):
    """Clusters one image with loops: density, delta, parent, centers, assignment."""
    length, channels = x.shape
    real = np.arange(length) if mask is None else np.flatnonzero(mask)
    distance = np.sqrt(((x[:, None] - x) ** 2).sum(-1) / channels)
    density, delta, parent = np.zeros(length), np.zeros(length), np.arange(length)
    for i in real:
        density[i] = np.exp(-np.mean(np.sort(distance[i, real] ** 2)[:neighbors]))
    for i in real:
        denser = [j for j in real if (-density[j], j) < (-density[i], i)]
        if denser:
            parent[i] = min(denser, key=lambda j: (distance[i, j], j))
            delta[i] = distance[i, parent[i]]
        else:
            delta[i] = distance[real][:, real].max()
    by_score = sorted(real, key=lambda i: (parent[i] != i, -density[i] * delta[i], i))
    centers = by_score[:num_clusters]
    assignment = []
    for i in range(length):
        if assign == "parent" and i in real:
            while i not in centers:
                i = parent[i]
        nearest = min(range(num_clusters), key=lambda m: distance[i, centers[m]])
        assignment.append(centers.index(i) if i in centers else nearest)
    return density, delta, parent, np.array(centers), np.array(assignment)


def assert_is_reference(x, num_clusters, mask=None, assign="nearest", neighbors=5, **kwargs):
    peaks = ops.density_peaks(x, neighbors=neighbors, mask=mask, **kwargs)
    found = ops.assign_clusters(x, peaks, num_clusters, mask=mask, assign=assign, **kwargs)
    for i, image in enumerate(x):
        density, delta, parent, centers, assignment = reference(
            image, num_clusters, neighbors=neighbors, assign=assign,
            mask=None if mask is None else mask[i],
        )  # fmt: skip
        np.testing.assert_allclose(peaks.density[i], density, atol=1e-12)
        np.testing.assert_allclose(peaks.delta[i], delta, atol=1e-7)
        np.testing.assert_array_equal(peaks.parent[i], parent)
        np.testing.assert_array_equal(found.centers[i], centers)
        np.testing.assert_array_equal(found.assignment[i], assignment)
    np.testing.assert_array_equal(found.density, peaks.density)
    np.testing.assert_array_equal(found.delta, peaks.delta)


@pytest.mark.parametrize("assign", ["nearest", "parent"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize(
    ("length", "channels", "num_clusters", "neighbors", "chunk_size"),
    sampled(
        [
            (37, 3, 5, 5, None),
            # Nested groups, chunks and a second pass that end in the middle.
            (300, 4, 20, 5, 72),
            (9, 3, 3, 20, 1),  # more neighbours than tokens
        ],
        keep=(0, 2),
    ),
)
def test_reference(length, channels, num_clusters, neighbors, chunk_size, masked, assign):
    x = tokens(2, length, channels)
    mask = np.random.default_rng(1).random((2, length)) < 0.7 if masked else None
    assert_is_reference(x, num_clusters, mask, assign, neighbors=neighbors, chunk_size=chunk_size)


def test_one_token():
    assert_is_reference(tokens(2, 1, 3), 1)


@pytest.mark.parametrize("assign", ["nearest", "parent"])
def test_is_a_partition_around_its_centers(assign):
    for seed in range(5):
        x = tokens(*SHAPE, seed=seed).astype(np.float32)
        x[:, 10:25] = np.round(x[:, 10:25])  # many equal tokens
        found = ops.cluster_density_peaks(x, 5, assign=assign)
        assert found.assignment.dtype == found.centers.dtype == jnp.int32
        assert found.density.dtype == found.delta.dtype == jnp.float32
        own = np.take_along_axis(np.asarray(found.assignment), np.asarray(found.centers), 1)
        np.testing.assert_array_equal(own, [range(5)] * 2)
        assert found.assignment.min() == 0
        assert found.assignment.max() == 4
        score = np.asarray(found.density * found.delta)
        falling = np.take_along_axis(score, np.asarray(found.centers), 1)
        assert (np.diff(falling) <= 0).all()


@pytest.mark.parametrize("assign", ["nearest", "parent"])
@pytest.mark.parametrize(
    ("dtype", "shape", "chunk_sizes", "rtol"),
    sampled(
        [
            (np.float64, SHAPE, (37, 15), 1e-12),
            # With few channels, small distances would show the rounding of the products.
            (np.float32, (1, 300, 16), (300, 100, 7), 1e-6),
        ]
    ),
    ids=["float64", "float32"],
)
def test_chunks_change_nothing(dtype, shape, chunk_sizes, rtol, assign):
    x = tokens(*shape).astype(dtype)
    whole, *chunked = (
        ops.cluster_density_peaks(x, 5, assign=assign, chunk_size=size) for size in chunk_sizes
    )
    assert whole.density.dtype == whole.delta.dtype == dtype
    for found in chunked:
        np.testing.assert_array_equal(found.assignment, whole.assignment)
        np.testing.assert_array_equal(found.centers, whole.centers)
        np.testing.assert_allclose(found.density, whole.density, rtol=rtol)
        np.testing.assert_allclose(found.delta, whole.delta, rtol=rtol)


def test_sizes_of_chunks_by_default():
    for batch, length in ((8, 3136), (1, 67200), (8, 196), (1, 5)):
        for elements in (chunks.CPU_CHUNK, chunks.ACCELERATOR_CHUNK):
            size = chunks.chunk_tokens(elements, batch, length, length)
            assert min(length, 32) <= size <= length
            width = batch * length
            assert size * width <= max(1.3 * elements, 32 * width)


def test_order_of_tokens_does_not_matter():
    x = tokens(*SHAPE)
    order = np.random.default_rng(1).permutation(37)
    found = ops.cluster_density_peaks(x, 5)
    permuted = ops.cluster_density_peaks(x[:, order], 5)
    np.testing.assert_array_equal(permuted.assignment, found.assignment[:, order])
    np.testing.assert_array_equal(order[permuted.centers], found.centers)


def test_as_many_clusters_as_tokens():
    found = ops.cluster_density_peaks(tokens(*SHAPE), 37)
    np.testing.assert_array_equal(np.sort(found.assignment, 1), [range(37)] * 2)


@pytest.mark.parametrize("assign", ["nearest", "parent"])
def test_equal_tokens(assign):
    found = ops.cluster_density_peaks(np.ones(SHAPE), 5, assign=assign)
    np.testing.assert_array_equal(found.density, 1)
    np.testing.assert_array_equal(found.delta, 0)
    np.testing.assert_array_equal(found.centers, [range(5)] * 2)
    # All tokens are equally near to all centres, and the first centre is the parent of all.
    np.testing.assert_array_equal(found.assignment, [[*range(5)] + [0] * 32] * 2)
    assert not ops.density_peaks(np.ones(SHAPE)).parent.any()


@pytest.mark.parametrize(("assign", "fill"), [("nearest", 1e4), ("parent", np.nan)])
def test_masked_tokens_are_as_if_removed(assign, fill):
    x = tokens(*SHAPE)
    mask = np.ones(SHAPE[:2], bool)
    mask[:, 5:20] = False
    mask[0, 36] = mask[1, 0] = False
    x[~mask] = fill
    found = ops.cluster_density_peaks(x, 5, mask=mask, assign=assign)
    kept = x[mask].reshape(2, -1, 3)
    expected = ops.cluster_density_peaks(kept, 5, assign=assign)
    np.testing.assert_array_equal(found.assignment[mask].reshape(2, -1), expected.assignment)
    for image in range(2):
        centers = np.flatnonzero(mask[image])[expected.centers[image]]
        np.testing.assert_array_equal(found.centers[image], centers)
    np.testing.assert_allclose(found.density[mask].reshape(2, -1), expected.density, rtol=1e-9)
    np.testing.assert_allclose(found.delta[mask].reshape(2, -1), expected.delta, rtol=1e-9)
    assert not found.density[~mask].any()
    assert not found.delta[~mask].any()
    assert ((found.assignment >= 0) & (found.assignment < 5)).all()


def test_traced_mask_that_leaves_too_few_tokens():
    x = tokens(2, 10, 3)
    mask = np.zeros((2, 10), bool)
    mask[0, [2, 5, 7]] = True
    x[~mask] = np.nan  # padding may have any values
    cluster = lambda mask: ops.cluster_density_peaks(x, 5, mask=mask)  # noqa: E731
    found = jax.jit(cluster)(mask)
    assert set(np.asarray(found.assignment[0])) == {0, 1, 2}  # 3 and 4 are empty
    assert set(np.asarray(found.centers[0, :3])) == {2, 5, 7}
    assert np.isfinite(found.delta).all()
    assert not found.assignment[1].any()
    with pytest.raises(ValueError, match="mask leaves an image 0 tokens; num_clusters, 5, must"):
        cluster(mask)


def test_noise_breaks_ties_only():
    x = np.repeat(tokens(2, 10, 3), 4, axis=1)[:, :37]  # each token four times
    plain = ops.density_peaks(x)
    noisy = ops.density_peaks(x, rng=jax.random.key(0))
    difference = np.asarray(noisy.density - plain.density)
    assert (difference >= 0).all()
    assert 0 < difference.max() < 1e-6
    copies = np.arange(37) % 4 > 0
    assert not (plain.parent[:, copies] % 4).any()  # the lowest index
    assert (noisy.parent[:, copies] % 4).any()
    other = ops.density_peaks(x, rng=jax.random.key(1))
    assert (other.density != noisy.density).any()
    equal = ops.cluster_density_peaks(np.ones_like(x), 1, rng=jax.random.key(0))
    np.testing.assert_array_equal(equal.centers[:, 0], equal.density.argmax(1))
    assert equal.centers.any()


def test_keys_of_images():
    x = np.repeat(tokens(1, *SHAPE[1:]), 2, axis=0)
    keys = jax.random.split(jax.random.key(3), 2)
    whole = ops.density_peaks(x, rng=keys)
    half = ops.density_peaks(x[1:], rng=keys[1:])
    np.testing.assert_allclose(half.density, whole.density[1:], rtol=0, atol=1e-12)
    assert (whole.density[0] != whole.density[1]).all()
    raw = ops.density_peaks(x, rng=jax.random.key_data(keys))
    np.testing.assert_array_equal(raw.density, whole.density)


def test_bfloat16():
    x = jnp.asarray(tokens(*SHAPE), jnp.bfloat16)
    found = ops.cluster_density_peaks(x, 5)
    expected = ops.cluster_density_peaks(x.astype(jnp.float32), 5)
    assert found.density.dtype == jnp.float32
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_far_from_the_origin():
    x = tokens(*SHAPE).astype(np.float32)
    shifted = x + np.float32(512)  # rounds tokens to 2^-14: the reference sees the same
    density, delta, *_ = reference((shifted - 512)[0].astype(np.float64), 5)
    found = ops.density_peaks(shifted)
    np.testing.assert_allclose(found.density[0], density, atol=1e-5)
    np.testing.assert_allclose(found.delta[0], delta, atol=1e-3)


def test_vmap_and_pmap():
    x = np.stack([tokens(*SHAPE, seed=seed) for seed in range(2)])
    cluster = functools.partial(ops.cluster_density_peaks, num_clusters=5)
    expected = [cluster(images) for images in x]
    for mapped in (jax.vmap(cluster)(x), jax.pmap(cluster)(x)):
        for i in range(2):
            np.testing.assert_array_equal(mapped.assignment[i], expected[i].assignment)
            np.testing.assert_allclose(mapped.delta[i], expected[i].delta, rtol=1e-9)


def test_devices_do_not_wait_for_each_other():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    divided = jax.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))

    def in_mesh(x):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return ops.density_peaks(x)

    x = tokens(4, 37, 3)
    compiled = jax.jit(in_mesh).lower(jax.device_put(x, divided)).compile()
    assert "all-reduce" not in compiled.as_text()
    found, expected = compiled(jax.device_put(x, divided)), ops.density_peaks(x)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)


def test_no_gradient():
    def loss(x):
        found = ops.cluster_density_peaks(x, 4)
        return jnp.sum(x**2) + found.density.sum() + found.delta.sum()

    x = tokens(1, 30, 3)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(x), 2 * x)


def test_macs():
    macs = MAC_FORMULAS[PREFIX + "_density_peaks"]
    assert macs([(2, 10, 3)], [(2, 10)] * 3) == 2 * 10 * 10 * 3
    assert MAC_FORMULAS[PREFIX + "_assign_clusters"]([(2, 10, 3)], [(2, 10)]) == 0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_clusters": 0}, "num_clusters is 0; it must be from 1 to 37"),
        ({"num_clusters": 38}, "num_clusters is 38; it must be from 1 to 37"),
        ({"neighbors": 0}, "neighbors is 0; it must be at least 1"),
        ({"chunk_size": 0}, "chunk_size is 0; it must be at least 1"),
        ({"assign": "first"}, "assign is 'first'; it must be one of nearest, parent"),
        ({"mask": np.ones((2, 7), bool)}, r"mask has shape \(2, 7\) and type bool; expected"),
        ({"mask": np.ones((2, 37))}, r"mask has shape \(2, 37\) and type float64; expected"),
        ({"rng": jax.random.key_data(jax.random.split(jax.random.key(0), 3))}, "rng has shape"),
        ({"tokens": np.ones((8, 3))}, r"tokens has shape \(8, 3\); expected \(batch, tokens"),
    ],
)
def test_mistakes(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ops.cluster_density_peaks(**{"tokens": tokens(*SHAPE), "num_clusters": 3} | kwargs)


def test_peaks_of_other_tokens():
    peaks = ops.DensityPeaks(*np.zeros((3, 2, 36)))
    with pytest.raises(ValueError, match=r"peaks.density has shape \(2, 36\); expected \(2, 37\)"):
        ops.assign_clusters(tokens(*SHAPE), peaks, 3)


def test_centers_below_the_threshold_are_as_if_they_were_not_selected():
    x = tokens(2, 60, 4)
    peaks = ops.density_peaks(x)
    score = np.asarray(peaks.density * peaks.delta)
    threshold = np.median(np.sort(score)[:, -9:])
    found = ops.assign_clusters(x, peaks, 9, threshold=threshold)
    used = np.asarray(ops.used_clusters(peaks, found.centers, threshold))
    assert 2 <= used.sum() < 18
    for i, number in enumerate(used.sum(1)):
        assert used[i, :number].all()
        expected = ops.assign_clusters(x, peaks, int(number))
        np.testing.assert_array_equal(found.assignment[i], expected.assignment[i])
    alone = ops.assign_clusters(x, peaks, 9, threshold=np.inf)
    np.testing.assert_array_equal(alone.assignment, 0)  # the densest is always a centre
