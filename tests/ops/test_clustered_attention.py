"""Attention of clustered queries against loops."""

import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenvit_jax import ops
from tokenvit_jax.measure.macs import count_macs

module = importlib.import_module("tokenvit_jax.ops.clustered_attention")  # `ops` has an equal name
RNG = np.random.default_rng(0)
Q, K, V = RNG.normal(size=(3, 2, 13, 2, 4))
Q[1] *= 1000  # the width follows the scale
Q[0, 5], Q[0, 7] = Q[0, 2], Q[0, 2]


def naive_clusters(x, num_clusters):
    """Returns the clusters of vectors (L, D): sets of indices, by the narrowest buckets."""
    directions, offsets, _ = (c.astype(np.float64) for c in module._hash_constants(x.shape[1]))
    along = (x - x.mean(0)) @ directions
    spread = np.sqrt((along**2).mean())

    def buckets(step):
        found = {}
        for i, row in enumerate(along):
            width = spread * 2 ** (module.FINEST + module.STEP * step)
            found.setdefault(tuple(np.floor(row / width + offsets)), set()).add(i)
        return set(map(frozenset, found.values()))

    low, high = -1, module.NUM_WIDTHS
    while high - low > 1:
        middle = (low + high + 1) // 2
        low, high = (low, middle) if len(buckets(middle)) <= num_clusters else (middle, high)
    return buckets(high) if high < module.NUM_WIDTHS else {frozenset(range(len(x)))}


def naive_attention(q, k, v, clusters):
    """Attends for one head; queries (L, D) in no cluster attend by themselves."""
    y = np.full_like(q, np.nan)
    clusters = [*clusters, *({i} for i in set(range(len(q))) - set(itertools.chain(*clusters)))]
    for members in map(list, clusters):
        logits = k @ q[members].mean(0) / 2
        weights = np.exp(logits - logits.max())
        y[members] = weights @ v / weights.sum()
    return y


@pytest.fixture(scope="module")
def clusters():
    """Returns the clusters of the last queries by number of clusters, in float64."""
    with jax.enable_x64(True):
        hashed = jax.jit(ops.hash_clusters, static_argnums=1)
        return {m: np.asarray(hashed(Q[:, 1:], m)) for m in (1, 5, 12)}


@pytest.mark.parametrize("num_clusters", [1, 5, 12])
def test_clusters_equal_the_loops(clusters, num_clusters):
    found = clusters[num_clusters]
    assert found.shape == (2, 2, 12) and found.dtype == np.int32
    for b, n in itertools.product(range(2), range(2)):
        expected = naive_clusters(Q[b, 1:, n], num_clusters)
        own = {frozenset(np.flatnonzero(found[b, n] == c).tolist()) for c in set(found[b, n])}
        assert own == expected and 1 <= len(own) <= num_clusters
        assert set(found[b, n]) == set(range(len(own)))
    # Nearly all are alone; equal queries never part.
    assert num_clusters == 1 or len(set(found[1, 0])) > num_clusters // 3
    assert (found[0, :, 4] == found[0, :, 1]).all() and (found[0, :, 6] == found[0, :, 1]).all()


def test_attention_equals_the_loops(clusters):
    assignment = clusters[5]
    with jax.enable_x64(True):
        y = jax.jit(ops.clustered_attention, static_argnums=4)(Q, K, V, assignment, 5)
    for b, n in itertools.product(range(2), range(2)):
        own = [{1 + i for i in np.flatnonzero(assignment[b, n] == c)} for c in range(5)]
        expected = naive_attention(Q[b, :, n], K[b, :, n], V[b, :, n], [c for c in own if c])
        np.testing.assert_allclose(y[b, :, n], expected, rtol=1e-9)


def test_one_query_per_cluster_is_plain_attention():
    q, k, v = (x.astype(np.float32) for x in (Q[:1], K[:1], V[:1]))
    own = jnp.broadcast_to(jnp.arange(13), (1, 2, 13))
    y = ops.clustered_attention(q, k, v, own, 13)
    np.testing.assert_allclose(y, ops.dot_product_attention(q, k, v), rtol=1e-5, atol=1e-6)


def test_gradients_pass_through_the_prototypes():
    q, k, v = (x.astype(np.float32) for x in (Q[:1], K[:1], V[:1]))

    @jax.jit
    @jax.value_and_grad
    def loss(q):
        y = ops.clustered_attention(q, k, v, ops.hash_clusters(q, 4), 4)
        return (y**2).sum()

    _, grad = loss(q)
    assert np.isfinite(grad).all() and (np.abs(grad).max(-1) > 0).all()
    np.testing.assert_allclose(grad[0, 2], grad[0, 5], rtol=1e-6)  # in one cluster


def test_equal_queries_form_one_cluster():
    np.testing.assert_array_equal(ops.hash_clusters(jnp.ones((1, 6, 2, 3)), 6), 0)


def test_costs():
    """Hashes cost L N D per round, prototypes attend like queries, and sums cost L N (D + 1)."""
    q = jax.ShapeDtypeStruct((2, 13, 3, 8), jnp.float32)
    at = jax.ShapeDtypeStruct((2, 3, 12), jnp.int32)
    assert count_macs(lambda q: ops.hash_clusters(q, 5), q) == 2 * 13 * 3 * 8 * module.ROUNDS
    sums = count_macs(
        lambda x, at: module.cluster_sums(x, at, 5),
        jax.ShapeDtypeStruct((6, 12, 9), jnp.float32), jax.ShapeDtypeStruct((6, 12), jnp.int32),
    )  # fmt: skip
    found = count_macs(lambda q, at: ops.clustered_attention(q, q, q, at, 5), q, at)
    assert found == 2 * 2 * (1 + 5) * 13 * 3 * 8 + sums


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"num_clusters is 0; it must be at least 1"):
        ops.hash_clusters(Q, 0)
    with pytest.raises(ValueError, match=r"x has shape \(13, 2, 4\); expected \(batch"):
        ops.hash_clusters(Q[0], 3)
    with pytest.raises(ValueError, match=r"assignment has shape \(2, 2, 14\); expected \(2, 2, at"):
        ops.clustered_attention(Q, K, V, np.zeros((2, 2, 14), int), 3)
