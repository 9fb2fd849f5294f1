"""Attention with a mask for every query, against float64 loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenvit_jax.ops import dot_product_attention, masked_attention

RNG = np.random.default_rng(0)
Q, K, V = (RNG.normal(size=(2, n, 3, 4)).astype(np.float32) for n in (5, 7, 7))
MASK = RNG.uniform(size=(2, 5, 7)) < 0.4
MASK[0, 2] = MASK[1, 0] = False  # see nothing, hence everything
MASK[1, 4] = True


def naive(q, k, v, mask):
    y = np.zeros(q.shape)
    for image, query, head in np.ndindex(*q.shape[:3]):
        seen = np.flatnonzero(mask[image, query])
        seen = seen if len(seen) else np.arange(k.shape[1])
        logits = [q[image, query, head].astype(np.float64) @ k[image, j, head] / 2 for j in seen]
        weights = np.exp(logits) / np.exp(logits).sum()
        y[image, query, head] = weights @ v[image, seen, head]
    return y


def test_equals_loops():
    np.testing.assert_allclose(masked_attention(Q, K, V, MASK), naive(Q, K, V, MASK), atol=1e-6)


def test_no_mask_is_plain_attention():
    plain = dot_product_attention(Q, K, V)
    for value in (False, True):
        y = masked_attention(Q, K, V, np.full_like(MASK, value))
        np.testing.assert_allclose(y, plain, atol=1e-6)


def test_keys_that_nobody_sees_have_no_gradient():
    mask = MASK | True
    mask[..., 3] = False
    probe = RNG.normal(size=Q.shape)
    gradient = jax.jit(jax.grad(lambda *x: jnp.sum(probe * masked_attention(*x, mask)), (0, 1, 2)))(
        Q, K, V
    )
    for x in gradient[1:]:
        assert not np.any(x[:, 3])
        assert np.all(np.any(np.delete(x, 3, 1), (2, 3)))
    assert np.all(np.any(gradient[0], -1))


def test_transformations():
    y = masked_attention(Q, K, V, MASK)
    one = jax.vmap(lambda *x: masked_attention(*(part[None] for part in x))[0])
    np.testing.assert_allclose(one(Q, K, V, MASK), y, atol=1e-6)
    split = [x[:, None] for x in (Q, K, V, MASK)]
    np.testing.assert_allclose(jax.pmap(masked_attention)(*split)[:, 0], y, atol=1e-6)
    narrow = masked_attention(*(x.astype(jnp.bfloat16) for x in (Q, K, V)), MASK)
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(narrow.astype(np.float32), y, atol=0.05)


def test_wrong_shape():
    with pytest.raises(ValueError, match=r"mask has shape \(2, 5, 6\); expected \(2, 5, 7\)"):
        masked_attention(Q, K, V, MASK[..., 1:])
