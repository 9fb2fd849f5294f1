"""Stochastic depth, applied by the layer or handed on as factors."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenvit_jax.layers import AddLayerNorm, DropPath


class Residual(nn.Module):
    """x + drop(branch), then its LayerNorm, with the factors or the dropped branch."""

    by_factors: bool

    @nn.compact
    def __call__(self, x, branch, train):
        drop, add = DropPath(0.4), AddLayerNorm()
        if self.by_factors:
            return add(x, branch, drop.factors(len(x), train))
        return add(x, drop(branch, train))


@pytest.mark.parametrize("train", [True, False])
def test_factors_are_those_of_the_layer(train):
    """The same draw from the same key, and the same values and gradients."""
    rng = np.random.default_rng(0)
    x, branch = (jnp.asarray(rng.normal(size=(16, 3, 5)), jnp.float32) for _ in range(2))
    variables = Residual(False).init(jax.random.key(0), x, branch, False)

    def run(module):
        def apply(x, branch):
            return module.apply(variables, x, branch, train, rngs={"dropout": jax.random.key(1)})

        (total, y), backward = jax.vjp(jax.jit(apply), x, branch)
        return total, y, *backward((jnp.cos(total), jnp.sin(y)))

    got, expected = run(Residual(True)), run(Residual(False))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    kept = np.any(np.asarray(got[0] - x) != 0, (1, 2))
    assert kept.all() != train
    assert kept.any()
