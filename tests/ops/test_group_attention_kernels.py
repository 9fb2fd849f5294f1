"""Kernels of group attention, in interpret mode, against the forms in XLA's operations."""

import functools
import importlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenvit_jax import ops
from tokenvit_jax.kernels import (
    cudnn,
    gpus,
    group_attention_fused,
    group_attention_heads,
    group_attention_sorted,
    group_routing,
)
from tokenvit_jax.kernels.group_attention_dense import attend_dense
from tokenvit_jax.kernels.group_attention_fused import attend_fused
from tokenvit_jax.kernels.group_attention_heads import attend_heads, selected_keys
from tokenvit_jax.kernels.group_attention_sorted import attend_sorted, sort_groups
from tokenvit_jax.kernels.group_sums import sum_groups
from tokenvit_jax.kernels.joined import parts_of
from tokenvit_jax.ops.selection import largest_mask
from tokenvit_jax.ops.unit_norm import unit_norm

# The package exports a function with the same name.
module = importlib.import_module("tokenvit_jax.ops.group_attention")


def heads_first(*xs):
    return [jnp.swapaxes(x, 1, 2) for x in xs]


def normal(*shape, count=1, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(count)]


def integers(low, high, *shape, seed=0):
    """Returns floats with many ties, and zeros of both signs."""
    rng = np.random.default_rng(seed)
    x = rng.integers(low, high, shape) * rng.choice([-1.0, 1.0], shape)
    return jnp.asarray(x, jnp.float32)


def assert_all_close(found, expected, atol):
    chex.assert_trees_all_close(found, expected, atol=atol, rtol=atol)


@pytest.mark.parametrize(("length", "groups", "top_k"), [(70, 20, 23), (3, 5, 1)], ids=str)
def test_routing_selects_and_assigns_like_the_default(length, groups, top_k):
    q, k = integers(-2, 3, 2, length, 2, 16), integers(-2, 3, 2, length, 2, 16, seed=1)
    centroids = integers(-1, 2, 2, groups, 16, seed=2)
    assigned, words = group_routing.route((q, k, k), centroids, top_k, interpret=True)
    q, k = heads_first(q, k)
    np.testing.assert_array_equal(assigned, module._assign(q, centroids))
    np.testing.assert_array_equal(
        group_routing.unpack(words, groups), largest_mask(module._key_scores(k, centroids), top_k)
    )


@pytest.mark.parametrize(
    ("capability", "length", "dim", "expected"),
    [
        ((9, 0), 784, 32, None),
        ((9, 0), 1024, 64, None),
        ((9, 0), 784, 128, "784 tokens with head dim 128 need 266240 bytes of shared memory"),
        ((8, 0), 1024, 64, None),
        ((8, 9), 784, 32, None),
        ((8, 9), 1024, 64, "1024 tokens with head dim 64 need 133120 bytes of shared memory"),
        ((8, 9), 1025, 32, "1025 tokens are more than 1024"),
    ],
)
def test_keys_must_fit_into_shared_memory(capability, length, dim, expected):
    q = jax.ShapeDtypeStruct((2, length, 4, dim), jnp.bfloat16)
    with cudnn.assumed(gpus.Gpu("a GPU", capability, 91200)):
        found = group_routing.routing_misfit(q, 48)
    assert found is None if expected is None else found.startswith(expected)


def test_selection_of_extreme_scores():
    scores = np.array([np.nan, -np.inf, np.inf, -0.0, 0.0, 1e-30, -1e-30, 3e38, np.nan, -3e38])
    scores = jnp.asarray(np.stack([scores, scores[::-1]], -1), jnp.float32)
    ordered = jnp.where(scores == 0, 0.0, scores)[None, None]
    padded = jnp.pad(scores, ((0, 6), (0, 0)), constant_values=np.inf)
    both = jax.jit(
        lambda top_k: (
            group_routing.largest(padded, 10, top_k, axis=0),
            largest_mask(ordered, top_k)[0, 0],
        )
    )
    for top_k in range(1, 11):
        found, expected = both(top_k)
        np.testing.assert_array_equal(found[:10], expected)
        assert not found[10:].any()


def differentiated(form, q, k, v, d_output):
    def run(d_output, *qkv):
        output, pull = jax.vjp(form, *qkv)
        return output, pull(d_output)

    return jax.jit(run)(d_output, q, k, v)


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("at_once", [True, False])
def test_fused_attention_equals_the_dense_form(at_once, joined, monkeypatch):
    monkeypatch.setattr(group_attention_fused, "_MOST_AT_ONCE", 256 if at_once else 0)
    arrays = normal(2, 70, 1, 16, count=4)  # two blocks, the second of 16
    (centroids,) = normal(1, 20, 16, seed=1)
    parts = parts_of(*arrays[:3], joined)
    assigned, words = group_routing.route(parts, centroids, 23, interpret=True)
    selected = group_routing.unpack(words, 20)

    def dense(q, k, v):
        q, k, v = heads_first(0.3 * q, k, v)
        return heads_first(attend_dense(q, k, v, assigned, selected))[0]

    def fused(q, k, v):
        return attend_fused(parts_of(q, k, v, joined), assigned, words, 0.3, interpret=True)

    found, expected = (differentiated(form, *arrays) for form in (fused, dense))
    assert_all_close(found, expected, 2e-6)


def test_sorted_attention_equals_the_dense_form(monkeypatch):
    # Several tiles in three groups, one in the last; chunks of keys; two programs for each.
    for name, value in {"_TILE": 16, "_CHUNK": 16, "_PROGRAMS": 16, "_WORD": 2}.items():
        monkeypatch.setattr(group_attention_sorted, name, value)
    length, groups, top_k = 75, 4, 20
    arrays = normal(1, length, 2, 16, count=4)
    centroids, scores = *normal(2, groups, 16, seed=1), integers(0, 9, 1, 2, length, groups)
    centroids = centroids.at[:, 3].set(0)
    assigned = group_routing.assign(arrays[0], centroids, interpret=True)
    np.testing.assert_array_equal(assigned, module._assign(*heads_first(arrays[0]), centroids))
    assert (jnp.bincount(assigned[0, 0], length=groups) > 16).sum() == 3
    selected = largest_mask(jnp.where(scores == 0, 0.0, scores), top_k)
    routing = sort_groups(assigned, jnp.swapaxes(scores, 2, 3), top_k, interpret=True)
    np.testing.assert_array_equal(routing.places >= 0, jnp.swapaxes(selected, 2, 3))

    def dense(q, k, v):
        q, k, v = heads_first(0.3 * q, k, v)
        return heads_first(attend_dense(q, k, v, assigned, selected))[0]

    def by_group(q, k, v):
        return attend_sorted(q, k, v, routing, 0.3, interpret=True)

    found, expected = (differentiated(form, *arrays) for form in (by_group, dense))
    assert_all_close(found, expected, 2e-6)


@pytest.mark.parametrize("queries", [32, 16], ids=["one whole slice", "a loop of slices"])
def test_attention_by_heads_equals_the_dense_form(queries, monkeypatch):
    monkeypatch.setattr(group_attention_heads, "_QUERIES", queries)
    arrays = normal(1, 37, 4, 32, count=4)
    (centroids,) = normal(4, 5, 32, seed=1)
    dense = functools.partial(ops.group_attention, top_k=7, scale=0.3, path="dense")

    def by_heads(q, k, v):
        unit = unit_norm(centroids)
        output, groups, bias = attend_heads(q, k, v, unit, 7, 0.3, interpret=True)
        return output, groups, selected_keys(bias, 4, 5)

    _, groups, selected = jax.jit(by_heads)(*arrays[:3])
    expected = dense(*arrays[:3], centroids)
    np.testing.assert_array_equal(groups, expected.groups)
    keys = jnp.sort(expected.keys)  # (B, N, G, k)
    rows = jnp.nonzero(jnp.swapaxes(selected, 2, 3))[3]
    np.testing.assert_array_equal(rows.reshape(keys.shape), keys)
    found, expected = (
        differentiated(form, *arrays)
        for form in (lambda *x: by_heads(*x)[0], lambda *x: dense(*x, centroids).output)
    )
    assert_all_close(found, expected, 2e-6)


def test_tokens_on_a_tpu_are_limited_by_its_memory():
    q = jax.ShapeDtypeStruct((1, 3136, 2, 32), jnp.bfloat16)
    limits = {"TPU v4": "3136 tokens of bfloat16 are more than 1024", "TPU v5 lite": None}
    for kind, misfit in limits.items():
        device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
        mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            assert group_attention_heads.heads_misfit(q, 48) == misfit
    assert group_attention_heads.heads_misfit(q, 48) == limits["TPU v4"]


def test_long_rows_are_selected_alike(monkeypatch):
    """Beyond the largest kernel, by lax.top_k; the order of a group's keys does not matter."""
    groups, scores = jnp.zeros((1, 2, 20), jnp.int32), integers(-4, 5, 1, 2, 3, 20)
    expected = sort_groups(groups, scores, 6, interpret=True)
    monkeypatch.setattr(group_attention_sorted, "MAX_LENGTH", 16)
    found = sort_groups(groups, scores, 6, interpret=True)
    np.testing.assert_array_equal(jnp.sort(found.keys[..., :-1]), expected.keys[..., :-1])
    np.testing.assert_array_equal(found.places < 0, expected.places < 0)
    at = jnp.maximum(found.places.astype(jnp.int32), 0)
    kept = jnp.take_along_axis(found.keys, at, 3)
    np.testing.assert_array_equal(kept[found.places >= 0], jnp.nonzero(found.places >= 0)[3])


def test_sums_of_groups():
    (q,) = normal(2, 70, 2, 16)
    q = q.at[0, 0].set(0)
    groups = jnp.asarray(np.random.default_rng(1).integers(0, 4, (2, 2, 70)), jnp.int32)
    found = sum_groups(q, groups, 5, interpret=True).sum(0)
    assert_all_close(
        ops.GroupSums(found[..., :-1], found[..., -1]), ops.group_sums(q, groups, 5), 2e-6
    )
    gradient = jax.grad(lambda q: sum_groups(q, groups, 5, interpret=True).sum())(q)
    np.testing.assert_array_equal(gradient, 0)
