"""Stochastic depth: the factors of all branches, and their application."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenvit_jax.layers import KEPT, AddLayerNorm, DropPaths, drop_branch

RATE, DEPTH, BATCH = 0.4, 5, 4000


@pytest.fixture(scope="module")
def factors():
    """The factors of all branches, (blocks, branches, B)."""
    draw = jax.jit(lambda key: DropPaths(RATE, DEPTH).apply({}, BATCH, True, rngs={"dropout": key}))
    first, *others = draw(jax.random.key(0))
    assert first == KEPT
    return np.array(others)


def test_rates_rise_linearly_from_0(factors):
    shares = np.mean(factors == 0, -1)
    rates = RATE * np.arange(1, DEPTH)[:, None] / (DEPTH - 1)
    # Five standard deviations of a share of BATCH images.
    assert np.all(abs(shares - rates) <= 5 * np.sqrt(rates * (1 - rates) / BATCH))
    for block, (rate,) in zip(factors, rates, strict=True):
        np.testing.assert_allclose(block[block != 0], 1 / (1 - rate), rtol=1e-6)


def test_branches_and_blocks_are_dropped_independently(factors):
    dropped = (factors == 0).reshape(-1, BATCH)
    correlation = np.corrcoef(dropped) - np.eye(len(dropped))
    assert abs(correlation).max() < 5 / np.sqrt(BATCH)


@pytest.mark.parametrize(
    ("rate", "depth", "train"), [(RATE, DEPTH, False), (0.0, DEPTH, True), (RATE, 1, True)]
)
def test_nothing_is_drawn_where_nothing_is_dropped(rate, depth, train):
    assert DropPaths(rate, depth).apply({}, BATCH, train) == [KEPT] * depth


@pytest.mark.parametrize("kept", [True, False])
def test_a_norm_applies_the_factors_like_a_branch(kept):
    """The same values and gradients."""
    rng = np.random.default_rng(0)
    x, branch = (jnp.asarray(rng.normal(size=(16, 3, 5)), jnp.float32) for _ in range(2))
    factors = None if kept else jnp.asarray(rng.integers(0, 2, 16) / 0.7, jnp.float32)
    variables = AddLayerNorm().init(jax.random.key(0), x, branch)

    def run(add):
        (total, y), backward = jax.vjp(jax.jit(add), x, branch)
        return total, y, *backward((jnp.cos(total), jnp.sin(y)))

    norm = AddLayerNorm().bind(variables)
    got = run(lambda x, branch: norm(x, branch, factors))
    expected = run(lambda x, branch: norm(x, drop_branch(branch, factors)))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert np.any(np.asarray(got[0] - x) != 0, (1, 2)).all() == kept
