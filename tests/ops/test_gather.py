"""Rows at indices per image, heads and unit norm against loops."""

import jax
import jax.numpy as jnp
import numpy as np

from tokenvit_jax.ops.gather import put, take
from tokenvit_jax.ops.heads import merge_heads, split_heads, split_qkv
from tokenvit_jax.ops.unit_norm import unit_norm


def test_take():
    rng = np.random.default_rng(0)
    x, index = rng.normal(size=(2, 7, 3, 4)), rng.integers(7, size=(2, 5))
    np.testing.assert_array_equal(
        take(jnp.asarray(x, jnp.float32), index),
        np.stack([rows[at] for rows, at in zip(x, index, strict=True)]).astype(np.float32),
    )
    index = rng.integers(3, size=(2, 7, 5))  # for every image and head
    found = take(jnp.asarray(x, jnp.float32), index)
    for b, n in np.ndindex(2, 7):
        np.testing.assert_array_equal(found[b, n], x[b, n, index[b, n]].astype(np.float32))


def test_put_drops_what_is_behind_the_end():
    x = jnp.zeros((2, 4), jnp.int32)
    found = put(x, jnp.array([[2, 4], [4, 0]]), jnp.array([[5, 6], [7, 8]], jnp.int32))
    np.testing.assert_array_equal(found, [[0, 0, 5, 0], [8, 0, 0, 0]])


def test_heads():
    qkv = np.arange(2 * 5 * 18, dtype=np.float32).reshape(2, 5, 18)
    parts = np.split(qkv, 3, axis=-1)
    for heads, part in zip(split_qkv(jnp.asarray(qkv), 2), parts, strict=True):
        np.testing.assert_array_equal(heads[:, :, 1], part[..., 3:])
        np.testing.assert_array_equal(heads, split_heads(part, 2))
        np.testing.assert_array_equal(merge_heads(heads), part)


def test_unit_norm():
    x = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    x[0, 0] = 0
    expected = x / np.maximum(np.linalg.norm(x.astype(np.float64), axis=-1, keepdims=True), 1e-30)
    for norm in (unit_norm, lambda x: unit_norm(x, 1e-12)):
        np.testing.assert_allclose(norm(jnp.asarray(x)), expected, atol=1e-6)
        assert norm(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.float32
    gradient = jax.jit(jax.grad(lambda x: unit_norm(x, 1e-12).sum()))(jnp.zeros((2, 3)))
    assert np.isfinite(gradient).all()
