"""K-Means and K-Medoids against float64 loops and arrays of an independent implementation."""

import functools
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampled import sampled

from tokenvit_jax import ops
from tokenvit_jax.kernels.token_pooling import kmeans_of_images, kmedoids_of_images
from tokenvit_jax.measure.macs import count_macs

GOLDEN = Path(__file__).parent / "golden"
SHAPE = (2, 23, 4)


def tokens(batch, length, dim, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, length, dim))


def first(num_clusters, seed=1):
    """Returns different initial centres for every image."""
    draw = np.random.default_rng(seed)
    return np.stack([draw.permutation(SHAPE[1])[:num_clusters] for _ in range(SHAPE[0])])


def nearest(x, centers):
    """Returns the index of each token's nearest centre, with loops."""
    return np.array([np.argmin([((t - c) ** 2).sum() for c in centers]) for t in x])


def naive_medoids(x, initial, weights, iterations):
    medoids = list(initial)
    for _ in range(iterations):
        assignment = nearest(x, x[medoids])
        for k in range(len(medoids)):
            members = np.flatnonzero(assignment == k)
            cost = [sum(weights[i] * ((x[i] - x[j]) ** 2).sum() for i in members) for j in members]
            if len(members):
                medoids[k] = members[np.argmin(cost)]
    return medoids, nearest(x, x[medoids])


def naive_means(x, initial, weights, iterations):
    centers = x[initial]
    for _ in range(iterations):
        assignment = nearest(x, centers)
        for k in range(len(centers)):
            members = assignment == k
            if weights[members].sum() > 0:
                centers[k] = (weights[members, None] * x[members]).sum(0) / weights[members].sum()
    return centers, nearest(x, centers)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("num_clusters", "iterations"),
    sampled([(1, 5), (6, 0), (6, 3), (17, 5), (22, 2), (23, 5)], keep=(2, 3)),
)
def test_equals_the_loops(num_clusters, iterations, weighted):
    x, initial = tokens(*SHAPE), first(num_clusters)
    weights = np.random.default_rng(2).uniform(size=SHAPE[:2])
    given = weights if weighted else None
    with jax.enable_x64(True):
        medoids = ops.kmedoids(x, initial, given, iterations=iterations)
        means = ops.kmeans(x, initial, given, iterations=iterations)
    for b in range(SHAPE[0]):
        w = weights[b] if weighted else np.ones(SHAPE[1])
        indices, assignment = naive_medoids(x[b], initial[b], w, iterations)
        np.testing.assert_array_equal(medoids.indices[b], indices)
        np.testing.assert_array_equal(medoids.assignment[b], assignment)
        centers, assignment = naive_means(x[b], initial[b], w, iterations)
        np.testing.assert_allclose(means.centers[b], centers, rtol=1e-10)
        np.testing.assert_array_equal(means.assignment[b], assignment)
    for found in (medoids, means):
        counts = [np.bincount(row, minlength=num_clusters) for row in found.assignment]
        np.testing.assert_array_equal(found.counts, counts)


@pytest.mark.parametrize("file", ["tp_ref_n20_k20", "tp_ref_n49_k16"])
@pytest.mark.parametrize("weighted", ["unweighted", "weighted"])
def test_equals_another_implementation_round_by_round(file, weighted):
    golden = np.load(GOLDEN / f"{file}.npz")
    weights = golden["significance_sum_heads_queries"][None]
    arguments = (golden["tokens"][None], golden["topk_index"][None])
    arguments += (weights,) if weighted == "weighted" else ()
    with jax.enable_x64(True):
        for rounds in (0, 1, 5, 10):
            medoids = ops.kmedoids(*arguments, iterations=rounds)
            means = ops.kmeans(*arguments, iterations=rounds)
            indices = golden[f"kmedoids_{weighted}_index_per_iter"][rounds]
            centers = golden[f"kmeans_{weighted}_centers_per_iter"][rounds]
            np.testing.assert_array_equal(medoids.indices[0], indices)
            np.testing.assert_allclose(means.centers[0], centers, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(medoids.assignment[0], golden[f"kmedoids_{weighted}_assign"])
    np.testing.assert_array_equal(medoids.counts[0], golden[f"kmedoids_{weighted}_counts"])
    np.testing.assert_array_equal(means.assignment[0], golden[f"kmeans_{weighted}_assign"])


def test_rounds_never_raise_the_objective():
    x, initial = tokens(*SHAPE), first(5)
    weights = np.random.default_rng(2).uniform(size=SHAPE[:2])

    def objective(centers):
        distances = ((x[:, :, None] - np.asarray(centers)[:, None]) ** 2).sum(-1)
        return (weights * distances.min(-1)).sum(1)

    with jax.enable_x64(True):
        by_means, by_medoids = [], []
        for rounds in range(6):
            by_means.append(objective(ops.kmeans(x, initial, weights, iterations=rounds).centers))
            medoids = ops.kmedoids(x, initial, weights, iterations=rounds).indices
            by_medoids.append(objective(np.take_along_axis(x, np.asarray(medoids)[..., None], 1)))
    for values in (np.array(by_means), np.array(by_medoids)):
        assert (np.diff(values, axis=0) <= 1e-12).all()
        assert (values[-1] < values[0]).any()


def test_order_of_tokens_does_not_matter():
    x, initial = tokens(*SHAPE), first(5)
    order = np.random.default_rng(3).permutation(SHAPE[1])
    place = np.argsort(order)
    with jax.enable_x64(True):
        for op in (ops.kmeans, ops.kmedoids):
            plain, moved = op(x, initial), op(x[:, order], place[initial])
            np.testing.assert_array_equal(moved.assignment, plain.assignment[:, order])
            np.testing.assert_array_equal(moved.counts, plain.counts)


def test_equal_tokens_and_empty_clusters():
    x = np.zeros((1, 6, 3))
    x[0, 5] = 1.0
    initial = np.array([[2, 0, 5]])
    medoids, means = ops.kmedoids(x, initial), ops.kmeans(x, initial)
    np.testing.assert_array_equal(medoids.counts, [[5, 0, 1]])
    np.testing.assert_array_equal(medoids.indices, [[0, 0, 5]])  # the first among equal tokens
    np.testing.assert_array_equal(means.counts, [[5, 0, 1]])
    np.testing.assert_allclose(means.centers[0], x[0, [0, 0, 5]], atol=1e-7)


def test_equal_tokens_in_one_image_change_nothing_in_another():
    """K-Medoids takes a different path for a batch with equal tokens."""
    x, initial = tokens(*SHAPE), first(9)
    apart = ops.kmedoids(x, initial)
    equal = ops.kmedoids(np.concatenate([x, np.zeros_like(x[:1])]), initial[[0, 1, 0]])
    for found, expected in zip(equal, apart, strict=True):
        np.testing.assert_array_equal(found[:2], expected)
    np.testing.assert_array_equal(equal.counts[2], [23] + 8 * [0])


@pytest.mark.parametrize(
    ("length", "num_clusters", "dtype"), [(75, 70, jnp.bfloat16), (21, 6, jnp.float32)]
)
def test_kmedoids_of_the_kernel(length, num_clusters, dtype):
    """With equal tokens, equal medoids, ties, and numbers that are exact in any order."""
    draw = np.random.default_rng(4)
    x = draw.integers(-2, 3, (2, length, 3)).astype(float)
    x[:, length // 2] = x[:, 0]
    x -= x.sum(1, keepdims=True) * (np.arange(length) == 1)[:, None]  # the mean is 0
    initial = np.stack([draw.permutation(length)[:num_clusters] for _ in range(2)])
    initial[:, 3] = initial[:, 1]
    weights = draw.integers(0, 3, (2, length)).astype(np.float32)
    run = functools.partial(kmedoids_of_images, iterations=3, interpret=True)
    medoids, assignment, counts = run(
        jnp.asarray(x, dtype), jnp.asarray(weights), jnp.asarray(initial, jnp.int32)
    )
    for b in range(2):
        expected = naive_medoids(x[b], initial[b], weights[b], 3)
        np.testing.assert_array_equal(medoids[b], expected[0])
        np.testing.assert_array_equal(assignment[b], expected[1])
        sizes = np.bincount(expected[1], minlength=num_clusters)
        np.testing.assert_array_equal(counts[b], sizes)


def test_kmeans_of_the_kernel():
    """With equal tokens, an empty cluster and weights of 0."""
    draw = np.random.default_rng(4)
    x = draw.normal(size=(2, 21, 5)).astype(np.float32)
    x[:, 7] = x[:, 0]
    initial = np.stack([draw.permutation(21)[:6] for _ in range(2)])
    initial[:, 3] = initial[:, 1]
    weights = draw.integers(0, 3, (2, 21)).astype(np.float32)
    run = functools.partial(kmeans_of_images, iterations=3, interpret=True)
    centers, assignment, counts, members = run(x, weights, jnp.asarray(initial, jnp.int32))
    for b in range(2):
        expected = naive_means(x[b].astype(float), initial[b], weights[b], 3)
        np.testing.assert_allclose(centers[b], expected[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(assignment[b], expected[1])
        np.testing.assert_array_equal(counts[b], np.bincount(expected[1], minlength=6))
        before = naive_means(x[b].astype(float), initial[b], weights[b], 2)[1]
        np.testing.assert_array_equal(members[b], before)


@pytest.mark.parametrize("form", [kmedoids_of_images, kmeans_of_images])
def test_kernels_read_no_tokens_that_there_are_not(form):
    x = jnp.asarray(np.random.default_rng(4).normal(size=(1, 21, 5)), jnp.float32)
    run = functools.partial(form, iterations=1, interpret=True)
    outside, inside = (
        run(x, jnp.ones((1, 21)), jnp.asarray([initial], jnp.int32))
        for initial in ([-3, 5, 2**30], [0, 5, 20])
    )
    for found, expected in zip(outside, inside, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_gradients():
    """K-Means differentiates the means of the last round; K-Medoids has no gradient."""
    x, initial = tokens(*SHAPE), first(4)
    weights = np.random.default_rng(2).uniform(0.5, 1.0, SHAPE[:2])
    direction = tokens(2, 4, 4, seed=5)

    def mean_loss(x, weights):
        return (ops.kmeans(x, initial, weights).centers * direction).sum()

    with jax.enable_x64(True):
        found = jax.jit(jax.grad(mean_loss, argnums=(0, 1)))(x, weights)
        centers = ops.kmeans(x, initial, weights, iterations=4).centers
        for b in range(SHAPE[0]):
            assignment = nearest(x[b], np.asarray(centers[b]))
            for k in range(4):
                members = assignment == k
                w = weights[b, members]
                center = (w[:, None] * x[b, members]).sum(0) / w.sum()
                np.testing.assert_allclose(
                    found[0][b, members], w[:, None] * direction[b, k] / w.sum(), atol=1e-12
                )
                expected = (x[b, members] - center) @ direction[b, k] / w.sum()
                np.testing.assert_allclose(found[1][b, members], expected, atol=1e-12)
    floats = jax.grad(lambda w: ops.kmedoids(x, initial, w).counts.sum().astype(w.dtype))
    np.testing.assert_array_equal(floats(jnp.asarray(weights, jnp.float32)), 0)


@pytest.mark.parametrize("op", [ops.kmeans, ops.kmedoids])
def test_transforms_and_types(op):
    x, initial = tokens(*SHAPE).astype(np.float32), first(5)
    jitted = jax.jit(op)
    whole = jitted(x, initial)
    with jax.disable_jit():
        chex.assert_trees_all_close(op(x, initial), whole, rtol=1e-5)
    one_by_one = jax.jit(jax.vmap(op))(x[:, None], initial[:, None])
    chex.assert_trees_all_close(jax.tree.map(lambda y: y[:, 0], one_by_one), whole, rtol=1e-5)
    mapped = jax.pmap(op)(x[:, None], initial[:, None])
    chex.assert_trees_all_close(jax.tree.map(lambda y: y[:, 0], mapped), whole, rtol=1e-5)
    low = jitted(jnp.asarray(x, jnp.bfloat16), initial)
    exact = jitted(np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32), initial)
    np.testing.assert_array_equal(low.assignment, exact.assignment)
    if op is ops.kmeans:
        assert low.centers.dtype == jnp.bfloat16


def test_macs():
    x, initial = tokens(*SHAPE), first(5)
    assert count_macs(lambda x: ops.kmedoids(x, initial), x) == 2 * 23 * 23 * 4
    assert count_macs(lambda x: ops.kmeans(x, initial, iterations=3), x) == 3 * 2 * 5 * 23 * 4


@pytest.mark.parametrize("op", [ops.kmeans, ops.kmedoids])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": np.zeros((23, 4))}, r"tokens has shape \(23, 4\)"),
        ({"initial": np.zeros(5, int)}, r"initial has shape \(5,\); expected \(2, clusters\)"),
        ({"initial": np.zeros((2, 5))}, "initial has type float"),
        ({"initial": np.zeros((2, 24), int)}, "it must name from 1 to 23 of the tokens"),
        ({"initial": np.zeros((2, 0), int)}, "it must name from 1 to 23 of the tokens"),
        ({"weights": np.zeros((2, 5))}, r"weights has shape \(2, 5\); expected \(2, 23\)"),
        ({"iterations": -1}, "iterations is -1; it must be at least 0"),
    ],
)
def test_mistakes(op, change, message):
    arguments = {"tokens": tokens(*SHAPE), "initial": first(5)} | change
    with pytest.raises(ValueError, match=message):
        op(**arguments)
