"""Attention rollout against float64 loops."""

import numpy as np
import pytest

from tokenvit_jax import ops

rng = np.random.default_rng(0)


def weights(*shape):
    x = rng.exponential(size=shape)
    return (x / x.sum(-1, keepdims=True)).astype(np.float32)


def naive(maps):
    """Follows every token back, block by block; maps (L, N, T, T)."""
    tokens = maps.shape[-1]

    def shares(block, token):
        if block < 0:
            return np.eye(tokens)[token]
        total = 0.5 * shares(block - 1, token)
        for source in range(tokens):
            mean = np.mean([head[token, source] for head in maps[block].astype(np.float64)])
            total = total + 0.5 * mean * shares(block - 1, source)
        return total

    return np.array([shares(len(maps) - 1, token) for token in range(tokens)])


def test_equals_the_loops():
    given = weights(2, 3, 2, 4, 4)
    found = ops.attention_rollout(given)
    assert found.shape == (2, 4, 4)
    np.testing.assert_allclose(found, [naive(maps) for maps in given], atol=1e-6)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-6)


def test_the_order_of_the_blocks_counts():
    given = weights(1, 2, 1, 5, 5)
    assert np.abs(ops.attention_rollout(given) - ops.attention_rollout(given[:, ::-1])).max() > 0.01


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 3, 2, 4, 5), (2, 0, 2, 4, 4)])
def test_wrong_shapes_are_named(shape):
    with pytest.raises(ValueError, match=r"expected \(batch, blocks, heads, tokens, tokens\)"):
        ops.attention_rollout(np.zeros(shape))
