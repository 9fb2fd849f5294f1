"""Group attention against float64 loops: values, gradients, and any division into groups."""

import functools
import importlib
import re

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampled import sampled

from tokenvit_jax import ops
from tokenvit_jax.kernels import chunked, top_indices
from tokenvit_jax.kernels.group_attention_tiles import num_tiles, plan_tiles
from tokenvit_jax.ops.group_attention import cheaper_path, cheaper_path_on_cpu
from tokenvit_jax.ops.selection import largest_mask
from tokenvit_jax.ops.unit_norm import unit_norm

# The package exports a function with the same name.
module = importlib.import_module("tokenvit_jax.ops.group_attention")

PATHS = ("dense", "tiles")


def inputs(batch=2, length=37, heads=2, dim=8, groups=5, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(batch, length, heads, dim)).astype(dtype) for _ in range(3))
    return q, k, v, rng.normal(size=(heads, groups, dim)).astype(dtype)


def naive(q, k, v, centroids, top_k, scale=None):
    """Computes Eqs. 1 and 2, one query at a time."""
    q, k, v, centroids = (np.asarray(x, np.float64) for x in (q, k, v, centroids))
    batch, length, heads, dim = q.shape
    num_groups, top_k = centroids.shape[1], min(top_k, length)
    scale = dim**-0.5 if scale is None else scale
    output = np.zeros_like(q)
    groups = np.zeros((batch, heads, length), int)
    keys = np.zeros((batch, heads, num_groups, top_k), int)
    for b in range(batch):
        for n in range(heads):
            unit = centroids[n] / np.linalg.norm(centroids[n], axis=-1, keepdims=True)
            for g in range(num_groups):
                scores = k[b, :, n] @ unit[g]
                keys[b, n, g] = np.argsort(-scores, kind="stable")[:top_k]
            for i in range(length):
                groups[b, n, i] = np.argmax(unit @ q[b, i, n])
                chosen = keys[b, n, groups[b, n, i]]
                logits = scale * k[b, chosen, n] @ q[b, i, n]
                weights = np.exp(logits - logits.max())
                output[b, i, n] = weights @ v[b, chosen, n] / weights.sum()
    return output, groups, keys


@functools.cache
def compiled(top_k, path, scale=None):
    return jax.jit(functools.partial(ops.group_attention, top_k=top_k, path=path, scale=scale))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("shape", "top_k", "scale"),
    sampled(
        [
            ({}, 7, None),
            ({"length": 64, "groups": 3}, 63, 1.5),
            ({"length": 150, "groups": 2, "batch": 1}, 20, None),  # several tiles per group
            ({"length": 3, "groups": 11}, 2, None),  # fewer queries than groups
            ({"length": 33, "groups": 1}, 1, None),  # one group, one key
        ],
        keep=(0, 2, 3),
    ),
)
def test_equals_the_loops(path, shape, top_k, scale):
    arrays = inputs(**shape)
    output, groups, keys = naive(*arrays, top_k, scale)
    result = compiled(top_k, path, scale)(*arrays)
    np.testing.assert_array_equal(result.groups, groups)
    np.testing.assert_array_equal(result.keys, keys)
    np.testing.assert_allclose(result.output, output, atol=2e-6, rtol=2e-6)
    chex.assert_type([result.groups, result.keys], jnp.int32)


@pytest.mark.parametrize("path", PATHS)
def test_float64_stays_exact(path):
    with jax.enable_x64(True):
        arrays = inputs(dtype=np.float64)
        result = ops.group_attention(*arrays, top_k=7, path=path)
        assert result.output.dtype == jnp.float64
        np.testing.assert_allclose(result.output, naive(*arrays, 7)[0], atol=1e-13)


@pytest.mark.parametrize("path", PATHS)
def test_bfloat16_routes_in_float32(path):
    q, k, v, centroids = inputs(length=200, dim=32)
    low = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    exact = [np.asarray(x, np.float32) for x in low]
    rounded = np.asarray(unit_norm(centroids).astype(jnp.bfloat16), np.float32)
    result = ops.group_attention(*low, centroids, top_k=20, path=path)
    assert result.output.dtype == jnp.bfloat16
    # The products of bfloat16 numbers are summed in float32, so few scores tie.
    scores = np.einsum("blnd,ngd->bngl", exact[1], rounded)
    assert np.mean(np.argsort(-scores, -1, "stable")[..., :20] == result.keys) > 0.999
    expected = ops.group_attention(*exact, rounded, top_k=20, path=path).output
    np.testing.assert_allclose(result.output.astype(jnp.float32), expected, atol=0.05)


def test_all_keys_selected_is_dense_attention():
    q, k, v, centroids = inputs(length=40)
    for top_k in (40, 98):
        result = ops.group_attention(q, k, v, centroids, top_k=top_k)
        np.testing.assert_array_equal(result.output, ops.dot_product_attention(q, k, v))
        assert result.keys.shape == (2, 2, 5, 40)


def assigned(name, length, num_groups, heads):
    """Returns queries (1, L, N, G) whose groups around unit vectors have the given sizes."""
    sizes = {
        "one huge group": [length],
        "empty groups": [length // 2, 0, 0, length - length // 2],
        "one query each": [1] * (num_groups - 1) + [length - num_groups + 1],
    }[name]
    group = np.repeat(np.arange(len(sizes)), sizes)
    rng = np.random.default_rng(1)
    noise = rng.normal(size=(1, length, heads, num_groups))
    return 5 * np.eye(num_groups)[group][None, :, None] + 0.1 * noise


@pytest.mark.parametrize("name", ["one huge group", "empty groups", "one query each"])
def test_any_assignment_gives_the_same_values_and_gradients(name):
    length, num_groups, heads = 131, 6, 2
    q = assigned(name, length, num_groups, heads)
    rng = np.random.default_rng(2)
    k, v, weight = (rng.normal(size=q.shape) for _ in range(3))
    centroids = np.broadcast_to(np.eye(num_groups), (heads, num_groups, num_groups))

    def loss(path, q, k, v):
        result = ops.group_attention(q, k, v, centroids, top_k=9, path=path)
        return jnp.sum(result.output * weight), result

    results = {}
    for path in PATHS:
        grad = jax.grad(functools.partial(loss, path), argnums=(0, 1, 2), has_aux=True)
        with jax.enable_x64(True):
            results[path] = jax.device_get(jax.jit(grad)(q, k, v))
    for dense, tiles in zip(*(jax.tree.leaves(results[p]) for p in PATHS), strict=True):
        np.testing.assert_allclose(dense, tiles, atol=1e-12)
    np.testing.assert_allclose(
        results["tiles"][1].output, naive(q, k, v, centroids, 9)[0], atol=1e-12
    )
    assert all(np.abs(g).max() > 1e-3 for g in results["tiles"][0])


@pytest.mark.parametrize("path", PATHS)
def test_gradient_by_finite_differences(path):
    with jax.enable_x64(True):
        q, k, v, centroids = inputs(batch=1, length=70, groups=3, dtype=np.float64)
        attend = lambda q, k, v: (  # noqa: E731
            ops.group_attention(q, k, v, centroids, top_k=6, path=path).output
        )
        jax.test_util.check_grads(attend, (q, k, v), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


def test_routing_carries_no_gradient():
    q, k, v, centroids = inputs()
    grad = jax.jit(jax.grad(lambda e: ops.group_attention(q, k, v, e, top_k=7).output.sum()))(
        centroids
    )
    np.testing.assert_array_equal(grad, 0)


@pytest.mark.parametrize("path", sampled(PATHS))
def test_transforms(path):
    arrays = inputs(batch=4)
    expected = compiled(7, path)(*arrays)
    attend = functools.partial(ops.group_attention, top_k=7, path=path)
    with jax.disable_jit():
        chex.assert_trees_all_close(attend(*arrays), expected, atol=1e-6)
    per_image = jax.vmap(attend, in_axes=(0, 0, 0, None))
    stacked = [x[:, None] for x in arrays[:3]]
    mapped = jax.tree.map(lambda x: x[:, 0], per_image(*stacked, arrays[3]))
    chex.assert_trees_all_close(mapped, expected, atol=1e-6)
    devices = min(4, jax.device_count())
    sharded = [x.reshape(devices, -1, *x.shape[1:]) for x in arrays[:3]]
    parallel = jax.pmap(attend, in_axes=(0, 0, 0, None))(*sharded, arrays[3])
    parallel = jax.tree.map(lambda x: x.reshape(4, *x.shape[2:]), parallel)
    chex.assert_trees_all_close(parallel, expected, atol=1e-6)


PLANS = [(64, 4, 32), (65, 7, 32), (40, 48, 16), (31, 1, 8), (100, 9, 16)]


@functools.cache
def compiled_plan(num_groups, tile):
    return jax.jit(functools.partial(plan_tiles, num_groups=num_groups, tile=tile))


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(st.sampled_from(PLANS), st.data())
def test_tile_plan_is_a_partition(plan_shape, data):
    length, num_groups, tile = plan_shape
    used = data.draw(st.lists(st.integers(0, num_groups - 1), min_size=1, unique=True))
    groups = np.array(data.draw(st.lists(st.sampled_from(used), min_size=length, max_size=length)))
    plan = compiled_plan(num_groups, tile)(jnp.asarray(groups[None, None], jnp.int32))
    query_of_slot, slot_of_query, group_of_tile, filled = (np.asarray(x[0, 0]) for x in plan)
    assert len(set(slot_of_query)) == length  # every query has its own slot
    np.testing.assert_array_equal(query_of_slot[slot_of_query], np.arange(length))
    np.testing.assert_array_equal(group_of_tile[slot_of_query // tile], groups)
    assert filled.sum() == length
    np.testing.assert_array_equal(np.flatnonzero(filled), np.sort(slot_of_query))


def test_tile_bound_is_reached():
    """With g - 1 groups of one query and one group with the rest, no smaller bound holds."""
    length, num_groups, tile = 5 * 16 + 8, 9, 16
    sizes = np.array([1] * (num_groups - 1) + [length - num_groups + 1])
    assert np.sum(-(-sizes // tile)) == num_tiles(length, num_groups, tile)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.data())
def test_selection_mask_takes_the_first_of_equals(data):
    values = st.sampled_from([-1.5, -0.0, 0.0, 1e-30, 1.0, 1.0000001, 7.0, -3e38])
    scores = np.array(data.draw(st.lists(values, min_size=24, max_size=24)), np.float32)
    top_k = data.draw(st.sampled_from([1, 5, 23]))
    shaped = jnp.where(scores == 0, 0, scores).reshape(1, 1, 24, 1)
    mask = jax.jit(largest_mask, static_argnums=1)(shaped, top_k)
    expected = np.argsort(-scores, kind="stable")[:top_k]
    np.testing.assert_array_equal(np.flatnonzero(mask), np.sort(expected))


def test_sorting_selects_what_top_k_selects():
    scores = np.random.default_rng(0).integers(-3, 3, (2, 2, 5, 40)).astype(np.float32)
    np.testing.assert_array_equal(top_indices.by_sorting(scores, 9), jax.lax.top_k(scores, 9)[1])


@pytest.mark.parametrize("path", PATHS)
def test_a_batch_that_is_split_over_a_mesh_stays_split(path, monkeypatch):
    """Neither values nor gradients move a part of the batch to another device."""
    # The form for accelerators; top_k, which runs on CPU, cannot be divided.
    monkeypatch.setattr(module, "top_indices", top_indices.by_sorting)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.NamedSharding(mesh, jax.P("data"))
    q, k, v, centroids = inputs(batch=4, seed=3)
    arrays = [jax.device_put(x, split) for x in (q, k, v)]

    def loss(q, k, v):
        result = ops.group_attention.__wrapped__(q, k, v, centroids, top_k=7, path=path)
        return jnp.sum(result.output**2), result

    grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True)).lower(*arrays).compile()
    moved = re.findall(r"(?:all-gather|all-to-all|collective-permute)\(.*", grad.as_text())
    assert moved == []
    chex.assert_trees_all_close(grad(*arrays)[1], compiled(7, path)(q, k, v, centroids), atol=1e-6)


def test_dense_chunks_of_queries_change_nothing(monkeypatch):
    q, k, v, centroids = inputs()

    def run(q, k, v):
        attend = ops.group_attention.__wrapped__  # not compiled yet: it reads the limit
        attend = functools.partial(attend, centroids=centroids, top_k=7, path="dense")
        output, pull = jax.vjp(lambda *x: attend(*x).output, q, k, v)
        return output, pull(output)

    whole = jax.jit(run)(q, k, v)
    monkeypatch.setattr(chunked, "MAX_LOGITS", 2000)  # 5,476 logits: chunks of 13, 13 and 11
    in_chunks = lambda *x: run(*x)  # noqa: E731  (a function that was not traced yet)
    assert "scan" in str(jax.make_jaxpr(in_chunks)(q, k, v))
    chex.assert_trees_all_close(jax.jit(in_chunks)(q, k, v), whole, atol=1e-6)


def test_path_is_chosen_from_the_shapes():
    chosen = {length: cheaper_path(length, 48, 98) for length in (99, 196, 784, 3136, 16384)}
    assert chosen == {99: "dense", 196: "dense", 784: "dense", 3136: "tiles", 16384: "tiles"}


def test_path_on_a_cpu_is_chosen_from_the_shapes():
    shapes = ((8, 576, 4), (8, 784, 4), (1, 784, 4), (1, 3136, 2))  # batch, length, heads
    chosen = [cheaper_path_on_cpu((*shape, 32), 48, 98) for shape in shapes]
    # One image of 784 tokens: 4 x 784 x 784 logits fit into the cache.
    assert chosen == ["dense", "tiles", "dense", "tiles"]


def test_tiles_instead_of_chunks_change_nothing(monkeypatch):
    q, k, v, centroids = inputs()
    attend = ops.group_attention.__wrapped__  # not compiled yet: it reads the limit

    def run(q, k, v):
        output, pull = jax.vjp(lambda *x: attend(*x, centroids, top_k=3).output, q, k, v)
        return output, pull(output)

    whole = jax.jit(run)(q, k, v)
    monkeypatch.setattr(chunked, "MAX_LOGITS", 2000)
    monkeypatch.setattr(module, "SMALLEST_TILE", {"cpu": 4, "default": 32})
    assert module.cheaper_path_on_cpu(q.shape, centroids.shape[1], 3) == "tiles"
    in_tiles = lambda *x: run(*x)  # noqa: E731  (a function that was not traced yet)
    chex.assert_trees_all_close(jax.jit(in_tiles)(q, k, v), whole, atol=1e-6)


def naive_update(centroids, q, groups, old_weight):
    moved = np.array(centroids, np.float64)
    for n in range(moved.shape[0]):
        for g in range(moved.shape[1]):
            members = np.asarray(q, np.float64)[:, :, n][np.asarray(groups)[:, n] == g]
            if len(members):
                unit = members / np.linalg.norm(members, axis=-1, keepdims=True)
                new = old_weight * moved[n, g] + (1 - old_weight) * unit.mean(0)
                moved[n, g] = new / np.linalg.norm(new)
    return moved


@pytest.mark.parametrize("old_weight", [0.0, 0.9, 1.0])
def test_update_equals_the_loops(old_weight):
    q, k, v, centroids = inputs(groups=40)  # more groups than some heads fill
    centroids /= np.linalg.norm(centroids, axis=-1, keepdims=True)
    groups = ops.group_attention(q, k, v, centroids, top_k=7).groups
    assert len(np.unique(groups[:, 0])) < 40
    moved = ops.update_centroids(centroids, q, groups, old_weight=old_weight)
    np.testing.assert_allclose(moved, naive_update(centroids, q, groups, old_weight), atol=1e-6)


def test_update_over_a_mapped_axis_is_the_update_of_the_whole_batch():
    q, k, v, centroids = inputs(batch=4)
    centroids /= np.linalg.norm(centroids, axis=-1, keepdims=True)
    groups = np.array(ops.group_attention(q, k, v, centroids, top_k=7).groups)
    groups[0] = 0  # so that the mean of per-device means would differ
    update = functools.partial(ops.update_centroids, old_weight=0.5)
    mapped = jax.vmap(
        functools.partial(update, axis_name="devices"), (None, 0, 0), axis_name="devices"
    )(centroids, q[:, None], groups[:, None])
    whole = update(centroids, q, groups)
    np.testing.assert_allclose(mapped, np.broadcast_to(whole, mapped.shape), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 0}, "top_k is 0; it must be at least 1"),
        ({"path": "fast"}, "path is 'fast'; it must be one of auto, dense, tiles"),
        ({"k": np.zeros((2, 36, 2, 8))}, r"k has shape \(2, 36, 2, 8\) and v"),
        ({"q": np.zeros((2, 36, 2, 8))}, r"expected the shape of q, \(2, 36, 2, 8\)"),
        ({"q": np.zeros((37, 2, 8))}, r"q has shape \(37, 2, 8\); expected \(batch"),
        ({"centroids": np.zeros((2, 5, 7))}, r"expected \(2, groups, 8\)"),
        ({"centroids": np.zeros((2, 0, 8))}, "centroids has 0 groups"),
    ],
)
def test_bad_input_is_named(change, message):
    q, k, v, centroids = inputs()
    arguments = {"q": q, "k": k, "v": v, "centroids": centroids, "top_k": 7} | change
    with pytest.raises(ValueError, match=message):
        ops.group_attention(**arguments)


def test_update_names_bad_input():
    q, _, _, centroids = inputs()
    with pytest.raises(ValueError, match=r"groups has shape \(2, 37\); expected \(2, 2, 37\)"):
        ops.update_centroids(centroids, q, np.zeros((2, 37), int), old_weight=0.9)
    with pytest.raises(ValueError, match=r"q has shape .* expected \(batch, length, 2, 8\)"):
        ops.update_centroids(centroids, q[..., :4], np.zeros((2, 2, 37), int), old_weight=0.9)
