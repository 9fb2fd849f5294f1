"""Bipartite matching against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenvit_jax import ops
from tokenvit_jax.measure.macs import count_macs

X = np.random.default_rng(0).normal(size=(3, 13, 5))


def naive(x, num_merged):
    """Computes Appendix D of the paper with loops, for tokens (N, D) after a class token."""
    odd, even = list(range(1, len(x), 2)), list(range(0, len(x), 2))
    cosine = lambda i, j: x[i] @ x[j] / np.linalg.norm(x[i]) / np.linalg.norm(x[j])  # noqa: E731
    best = {i: max(even, key=lambda j: cosine(i, j)) for i in odd}
    merged = sorted(odd, key=lambda i: -cosine(i, best[i]))[:num_merged]
    groups = [[i] for i in odd if i not in merged]
    groups += [[j, *(i for i in merged if best[i] == j)] for j in even]
    assignment = np.zeros(len(x), int)
    for number, group in enumerate(groups):
        assignment[group] = number
    return assignment


@pytest.mark.parametrize("num_merged", [0, 1, 4, 6])
def test_equals_the_loops(num_merged):
    with jax.enable_x64(True):
        found = jax.jit(ops.bipartite_matching, static_argnums=1)(X, num_merged)
    assert found.dtype == jnp.int32
    for b in range(3):
        np.testing.assert_array_equal(found[b], naive(X[b], num_merged))
        assert set(np.asarray(found[b])) == set(range(13 - num_merged))  # no cluster is empty


def test_length_does_not_matter_but_direction():
    scaled = X * np.random.default_rng(1).uniform(0.5, 2, size=(3, 13, 1))
    found = ops.bipartite_matching(jnp.asarray(scaled, jnp.float32), 4)
    np.testing.assert_array_equal(found, ops.bipartite_matching(jnp.asarray(X, jnp.float32), 4))
    one_by_one = jax.vmap(lambda x: ops.bipartite_matching(x[None], 4)[0])(scaled)
    np.testing.assert_array_equal(found, one_by_one)


def test_tokens_of_zeros():
    """Tokens of zeros have no direction, but each still belongs to a cluster."""
    found = ops.bipartite_matching(jnp.zeros((1, 6, 3)), 2)
    assert sorted(set(np.asarray(found[0]))) == [0, 1, 2, 3]


def test_costs_a_quarter_of_all_pairs():
    x = jax.ShapeDtypeStruct((2, 13, 5), jnp.float32)
    assert count_macs(lambda x: ops.bipartite_matching(x, 3), x) == 2 * 6 * 7 * 5


@pytest.mark.parametrize("num_merged", [-1, 7])
def test_mistakes_are_named(num_merged):
    message = rf"num_merged is {num_merged}; it must be from 0 to 6 for tokens of shape \(3, 13, 5"
    with pytest.raises(ValueError, match=message):
        ops.bipartite_matching(X, num_merged)
    with pytest.raises(ValueError, match=r"tokens has shape \(13, 5\); expected \(batch"):
        ops.bipartite_matching(X[0], 3)
