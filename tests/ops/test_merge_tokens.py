"""Merging of tokens against plain loops, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenvit_jax import ops
from tokenvit_jax.kernels import cluster_sums, cluster_sums_tpu
from tokenvit_jax.ops.counted import MAC_FORMULAS, PREFIX

NUM_CLUSTERS = 5


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def example(scale=1.0):
    """Returns tokens (2, 14, 3), an assignment with cluster 3 empty, and scores."""
    rng = np.random.default_rng(0)
    assignment = rng.choice([0, 1, 2, 4], (2, 14)).astype(np.int32)
    return rng.normal(size=(2, 14, 3)), assignment, scale * rng.normal(size=(2, 14))


def reference(x, assignment, scores):
    merged = np.zeros((len(x), NUM_CLUSTERS, x.shape[2]))
    for image in range(len(x)):
        for cluster in range(NUM_CLUSTERS):
            total = 1e-6 if scores is not None else 0
            for token in np.flatnonzero(assignment[image] == cluster):
                weight = np.exp(scores[image, token]) if scores is not None else 1
                merged[image, cluster] += weight * x[image, token]
                total += weight
            merged[image, cluster] /= total or 1
    return merged


@pytest.mark.parametrize("scale", [None, 0.1, 30.0])
def test_reference(scale):
    x, assignment, scores = example(scale or 1.0)
    scores = scores if scale else None
    merged = ops.merge_tokens(x, assignment, NUM_CLUSTERS, scores)
    np.testing.assert_allclose(merged, reference(x, assignment, scores), rtol=1e-9)
    assert not merged[:, 3].any()


@pytest.mark.parametrize("chunk", [1, 60, 10**6])
def test_sums_by_products(chunk):
    # The form for accelerators.
    x, assignment, _ = example()
    by_products, by_scatter = (
        cluster_sums.sums_by_products(x, assignment, NUM_CLUSTERS, chunk),
        cluster_sums.sums_by_scatter(x, assignment, NUM_CLUSTERS),
    )
    np.testing.assert_allclose(by_products, by_scatter, atol=1e-12)


def merge_plainly(x, assignment, scores):
    """Computes Eq. 3 with a membership matrix; differentiable."""
    member = jax.nn.one_hot(assignment, NUM_CLUSTERS, dtype=x.dtype)
    weights = member * jnp.exp(scores)[..., None]
    return jnp.einsum("bnm,bnc->bmc", weights / (weights.sum(1, keepdims=True) + 1e-6), x)


def test_gradient():
    x, assignment, scores = example()
    d_merged = np.random.default_rng(1).normal(size=(2, NUM_CLUSTERS, 3))

    def gradient(merge):
        return jax.jit(jax.grad(lambda x, s: jnp.sum(merge(x, s) * d_merged), (0, 1)))(x, scores)

    found = gradient(lambda x, s: ops.merge_tokens(x, assignment, NUM_CLUSTERS, s))
    expected = gradient(lambda x, s: merge_plainly(x, assignment, s))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)
        assert jnp.abs(a).min() > 0
    mean = gradient(lambda x, s: ops.merge_tokens(x, assignment, NUM_CLUSTERS))[0]
    same = gradient(lambda x, s: merge_plainly(x, assignment, 40 + 0 * s))[0]
    np.testing.assert_allclose(mean, same, atol=1e-12)


def test_second_derivatives():
    """Those of a gradient penalty: the sums of weights are saved for the backward pass."""
    x, assignment, scores = example()

    def penalty(merge):
        first = jax.grad(lambda x, s: jnp.sum(merge(x, s) ** 2), (0, 1))
        return jax.jit(jax.grad(lambda x, s: sum(jnp.sum(g**2) for g in first(x, s)), (0, 1)))

    found = penalty(lambda x, s: ops.merge_tokens(x, assignment, NUM_CLUSTERS, s))(x, scores)
    expected = penalty(lambda x, s: merge_plainly(x, assignment, s))(x, scores)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
        assert jnp.abs(a).min() > 0


def test_scores_of_any_size():
    # In float32 exp(300) overflows, and exp(-90) is negligible beside 1e-6.
    x, assignment, _ = example()
    x = x.astype(np.float32)
    scores = np.where(assignment == 0, 300, np.where(assignment == 1, 20, -90)).astype(np.float32)
    scores[:, 7:] -= 150
    scores[:, 0] = -np.inf

    def loss(x, scores):
        merged = ops.merge_tokens(x, assignment, NUM_CLUSTERS, scores)
        return jnp.sum(merged**2), merged

    gradients, merged = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(x, scores)
    expected = reference(x, assignment, scores.astype(np.float64))
    np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=1e-30)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    assert not gradients[0][:, 0].any()
    assert not gradients[1][:, 0].any()


def test_bfloat16():
    x, assignment, scores = (jnp.asarray(a) for a in example())
    x, scores = x.astype(jnp.bfloat16), scores.astype(jnp.bfloat16)
    merged = ops.merge_tokens(x, assignment, NUM_CLUSTERS, scores)
    assert merged.dtype == jnp.bfloat16
    expected = reference(*(np.asarray(a, np.float64) for a in (x, assignment, scores)))
    np.testing.assert_allclose(merged.astype(np.float64), expected, rtol=1e-2)


def test_vmap_and_pmap():
    x, assignment, scores = (a[:, None] for a in example())
    merge = lambda *args: ops.merge_tokens(*args[:2], NUM_CLUSTERS, args[2])  # noqa: E731
    expected = merge(x[:, 0], assignment[:, 0], scores[:, 0])[:, None]
    for map_over in (jax.vmap, jax.pmap):
        merged = map_over(merge)(x, assignment, scores)
        np.testing.assert_allclose(merged, expected, rtol=1e-12)


def test_macs():
    macs = MAC_FORMULAS[PREFIX + "merge_tokens"]
    assert macs([(2, 14, 3), (2, 14), (2, 14)], [(2, 5, 3)]) == 2 * 14 * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": np.ones((14, 3))}, r"tokens has shape \(14, 3\); expected \(batch, tokens"),
        ({"assignment": np.ones((2, 13), np.int32)}, r"assignment has shape \(2, 13\); expected"),
        ({"assignment": np.ones((2, 14))}, "assignment has type float64; expected integers"),
        ({"scores": np.ones((2, 13))}, r"scores has shape \(2, 13\); expected \(2, 14\)"),
        ({"num_clusters": 0}, "num_clusters is 0; it must be at least 1"),
    ],
)
def test_mistakes(change, message):
    x, assignment, scores = example()
    valid = {"tokens": x, "assignment": assignment, "num_clusters": 5, "scores": scores}
    with pytest.raises(ValueError, match=message):
        ops.merge_tokens(**valid | change)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda dtype: dtype.__name__)
def test_kernels(dtype, monkeypatch):
    """Kernels, interpreted: on a GPU two blocks of tokens, clusters and channels, all ragged."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 75, 70)), dtype)
    assignment = rng.choice(67, (2, 75)).astype(np.int32)  # of 70: some are empty
    scores = jnp.asarray(20 * rng.normal(size=(2, 75)), dtype)
    scores = scores.at[0, 3].set(-jnp.inf)
    means, shift, total = jax.jit(
        lambda x, at, s: cluster_sums.means_by_kernel(x, at, s, 70, 1e-6, interpret=True)
    )(x, assignment, scores)
    exact_x, exact_scores = np.asarray(x, np.float64), np.asarray(scores, np.float64)
    member = assignment[:, :, None] == np.arange(70)
    largest = np.where(member, exact_scores[..., None], 0).max(1)
    weights = member * np.exp(exact_scores[..., None] - largest[:, None])
    sums = weights.sum(1) + 1e-6 * np.exp(-largest)
    np.testing.assert_array_equal(shift, largest)
    np.testing.assert_allclose(total, sums, rtol=1e-5)
    expected = np.einsum("bnm,bnc->bmc", weights, exact_x) / sums[..., None]
    np.testing.assert_allclose(means, expected, rtol=1e-5, atol=1e-6)
    assert means.dtype == jnp.float32
    monkeypatch.setattr(cluster_sums_tpu, "BLOCK", 64)
    on_tpu = jax.jit(lambda x, at, s: cluster_sums_tpu.means(x, at, s, 70, 1e-6, interpret=True))(
        x, assignment, scores
    )
    for a, b in zip(on_tpu, (means, shift, total), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    found = cluster_sums.sums_by_kernel(x, assignment, 70, interpret=True)
    assert found.dtype == dtype
    expected = np.einsum("bnm,bnc->bmc", member.astype(float), exact_x)
    tolerance = 1e-2 if dtype == jnp.bfloat16 else 1e-5
    np.testing.assert_allclose(np.asarray(found, float), expected, rtol=tolerance, atol=1e-6)
