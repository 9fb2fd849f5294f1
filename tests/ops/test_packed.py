"""Updates of all vectors at once equal updates one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tokenvit_jax.ops import packed
from tokenvit_jax.ops.packed import Packing, map_packed, update_packed
from tokenvit_jax.training.optimizer import weight_decay_mask


@pytest.fixture(params=["default", "tpu"])
def accelerator(monkeypatch, request):
    """Takes the form for an accelerator, which runs on a CPU, too."""

    def by_platform(_, *args, default, cpu, tpu=None, shared):
        del cpu, shared
        return (default if request.param == "default" else tpu or default)(*args)

    monkeypatch.setattr(packed, "by_platform", by_platform)


def tree(seed):
    rng = np.random.default_rng(seed)
    shapes = {
        "a": {"kernel": (2, 3), "bias": (3,), "scale": ()},
        "b": {"kernel": (3, 1), "bias": (1,), "scale": (3,)},
    }
    leaf = lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return jax.tree.map(leaf, shapes, is_leaf=lambda x: isinstance(x, tuple))


def assert_near(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), actual, expected)


def test_packing_is_undone():
    params = tree(0)
    packing = Packing(params)
    both = packing.pack(params)
    assert both["vectors"].shape == (3 + 1 + 1 + 3,)
    assert len(jax.tree.leaves(both["others"])) == 2
    jax.tree.map(np.testing.assert_array_equal, packing.unpack(both), params)
    state = (jnp.int32(3), {"mean": params, "other": params["a"]})
    parts = packing.pack_parts(state)
    assert len(jax.tree.leaves(parts)) == 1 + 3 + 3
    jax.tree.map(np.testing.assert_array_equal, packing.unpack_parts(parts), state)


def test_map(accelerator):
    def update(p, g):
        return p - 0.1 * g

    jax.tree.map(
        np.testing.assert_array_equal,
        map_packed(update, tree(0), tree(1)),
        jax.tree.map(update, tree(0), tree(1)),
    )


@pytest.mark.parametrize("frozen", [False, True])
def test_optimizer(accelerator, frozen):
    """With clipping, weight decay of matrices and, perhaps, parameters that are frozen."""
    plain = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(0.1, weight_decay=0.5, mask=weight_decay_mask)
    )
    ours = optax.GradientTransformation(
        plain.init, lambda *args: update_packed(plain.update, *args)
    )
    labels = {"a": {"kernel": "on", "bias": "off", "scale": "on"}, "b": "on"}
    results = []
    for optimizer in (plain, ours):
        if frozen:
            optimizer = optax.partition({"on": optimizer, "off": optax.set_to_zero()}, labels)
        params = tree(0)
        state = optimizer.init(params)
        update = jax.jit(optimizer.update)
        for seed in (1, 2):
            updates, state = update(tree(seed), state, params)
            params = optax.apply_updates(params, updates)
        results.append((params, state))
    assert_near(*results[::-1])


def test_arrays_of_one_shape(accelerator, monkeypatch):
    """Small arrays of a shape that is frequent are joined, too; a cast has float32 gradients."""
    monkeypatch.setattr(packed, "_MANY", 2)
    arrays = [jnp.full(shape, i / 3) for i, shape in enumerate([(2, 3), (4,), (2, 3), (3, 3), ()])]
    others = [x + 1 for x in arrays]
    jax.tree.map(
        np.testing.assert_array_equal,
        map_packed(jnp.multiply, arrays, others, limit=6),
        [x * y for x, y in zip(arrays, others, strict=True)],
    )
    cast, pull = jax.vjp(lambda arrays: packed.cast_packed(arrays, jnp.bfloat16), arrays)
    jax.tree.map(np.testing.assert_array_equal, cast, [x.astype(jnp.bfloat16) for x in arrays])
    (gradients,) = pull(cast)
    jax.tree.map(np.testing.assert_array_equal, gradients, [x.astype(jnp.float32) for x in cast])


def test_norm(accelerator, monkeypatch):
    """Arrays of a frequent shape are joined, large arrays are not."""
    monkeypatch.setattr(packed, "_MANY", 2)
    monkeypatch.setattr(packed, "_LARGE", 20)
    rng = np.random.default_rng(0)
    shapes = [(2, 3), (4,), (2, 3), (5, 5), (5, 5), (), (3, 3)]
    arrays = {i: jnp.asarray(rng.normal(size=shape), jnp.float32) for i, shape in enumerate(shapes)}
    values = np.concatenate([np.ravel(x) for x in arrays.values()]).astype(np.float64)
    np.testing.assert_allclose(packed.norm_packed(arrays), np.linalg.norm(values), rtol=1e-6)


def test_rows(accelerator):
    """Arrays with equal rows are joined, however many rows they have."""
    rows = (2, 1, 3)
    lists = [jnp.arange(2.0 * n).reshape(n, 2) + n for n in rows], [jnp.ones(n) + n for n in rows]
    both = lambda x, y: (x.sum(1) + y, x * y[:, None])  # noqa: E731
    expected = [both(*arrays) for arrays in zip(*lists, strict=True)]
    jax.tree.map(np.testing.assert_array_equal, packed.map_rows(both, *lists), expected)
