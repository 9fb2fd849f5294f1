"""A small Dynamic Group Transformer: training state, numerics, memory options, devices."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampled import sampled

import tokenvit_jax as tv
from tokenvit_jax.layers import advance_centroids

SMALL = {
    "stem_dim": 8, "dims": (8, 16, 16, 32), "num_heads": (1, 2, 2, 2), "depths": (1, 1, 0, 1),
    "num_groups": 4, "top_k": 6, "head_dim": 24, "num_classes": 5,
}  # fmt: skip
RANDOM = {"drop_path": 0.5, "dropout": 0.3}
NAMES = ("dgt_t", "dgt_s")  # pre-norm with scaled products; post-norm with cosine attention


@functools.cache
def images():
    return np.random.default_rng(0).normal(size=(8, 48, 32, 3)).astype(np.float32)


@functools.cache
def variables(name):
    model = tv.create_model(name, **SMALL)
    initial = jax.jit(functools.partial(model.init, train=False))(jax.random.key(0), images())
    if name == "dgt_s":  # post-norm branches start at zero: make them contribute
        initial["params"] = jax.tree_util.tree_map_with_path(
            lambda path, x: x + 0.5 * ("scale" in jax.tree_util.keystr(path)), initial["params"]
        )
    return initial


def loss_and_updates(model, variables, x, target, axis_name=None):
    state = {k: v for k, v in variables.items() if k != "params"}

    def loss(params):
        logits, updates = model.apply(
            {"params": params, **state}, x, train=True,
            rngs={"dropout": jax.random.key(1)}, mutable=list(state),
        )  # fmt: skip
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(x)), target]), updates

    (value, updates), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
    if axis_name:
        value, grads = jax.lax.pmean((value, grads), axis_name)
    updates["centroids"] = advance_centroids(updates["centroids"], 0.9, axis_name)
    return value, grads, updates


@functools.cache
def reference(name):
    model = tv.create_model(name, **SMALL, **RANDOM)
    step = jax.jit(functools.partial(loss_and_updates, model))
    return step(variables(name), images(), np.arange(8) % 5)


@pytest.mark.parametrize("name", sampled(NAMES))
def test_gradients_are_finite_and_reach_every_parameter(name):
    _, grads, _ = reference(name)
    chex.assert_tree_all_finite(grads)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        key = jax.tree_util.keystr(path)
        if key.endswith(("['ffn']['norm2']['bias']", "['ffn']['reduce']['bias']")):
            continue  # norm3 cancels both
        # A constant added to every key does not change the softmax.
        grad = (
            np.delete(grad, slice(len(grad) // 3, 2 * len(grad) // 3))
            if "qkv']['bias" in key
            else grad
        )
        assert np.abs(grad).max() > 0, key


@pytest.mark.parametrize("name", sampled(NAMES))
def test_centroids_stay_at_unit_norm_and_move(name):
    _, _, updates = reference(name)
    before, after = variables(name)["centroids"], updates["centroids"]
    chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
    for path, x in jax.tree_util.tree_leaves_with_path(after):
        if "'centroids'" in jax.tree_util.keystr(path[-1:]):
            np.testing.assert_allclose(np.linalg.norm(x, axis=-1), 1, atol=1e-5)
        else:
            np.testing.assert_array_equal(x, 0)  # sums and counts are cleared
    moved = [
        np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True)
    ]
    assert sum(m > 1e-4 for m in moved) == 2  # one set of centroids in each block of stages 1 and 2


def test_evaluation_freezes_the_state():
    model = tv.create_model("dgt_t", **SMALL)
    state = variables("dgt_t")
    mutable = ["batch_stats", "centroids"]
    apply = jax.jit(functools.partial(model.apply, train=False, mutable=mutable))
    _, updates = apply(state, images())
    chex.assert_trees_all_equal(updates, {k: state[k] for k in mutable})


def test_forward_passes_add_up_before_the_centroids_move():
    """Two micro-batches and one step equal one batch and one step."""
    model = tv.create_model("dgt_t", **SMALL)
    state = variables("dgt_t")
    # Frozen BatchNorm statistics make the halves independent of each other.
    frozen = {k: v for k, v in state.items() if k != "centroids"}

    @jax.jit
    def forward(centroids, x):
        _, updates = model.apply(
            {**frozen, "centroids": centroids}, x, train=True, mutable=["centroids", "batch_stats"],
            rngs={"dropout": jax.random.key(1)},
        )  # fmt: skip
        return updates["centroids"]

    half = forward(state["centroids"], images()[:4])
    both = forward(half, images()[:4])
    chex.assert_trees_all_close(both, jax.tree_util.tree_map_with_path(
        lambda path, x: x if "'centroids'" in jax.tree_util.keystr(path[-1:]) else 2 * x, half
    ), atol=1e-5)  # fmt: skip
    chex.assert_trees_all_close(
        advance_centroids(both, 0.9), advance_centroids(half, 0.9), atol=1e-6
    )


def test_rematerialisation_saves_memory():
    def kept_for_backward(remat):
        model = tv.create_model("dgt_t", **SMALL, remat=remat)
        apply = lambda params: model.apply(  # noqa: E731
            {**variables("dgt_t"), "params": params}, images(), train=True,
            rngs={"dropout": jax.random.key(1)}, mutable=["batch_stats", "centroids"],
        )[0].sum()  # fmt: skip
        _, backward = jax.eval_shape(
            functools.partial(jax.vjp, apply), variables("dgt_t")["params"]
        )
        return sum(x.size for x in jax.tree.leaves(backward))

    assert kept_for_backward(True) < 0.6 * kept_for_backward(False)


@pytest.mark.slow
def test_bfloat16_computes_near_float32():
    state = variables("dgt_t")
    model = tv.create_model("dgt_t", **SMALL)
    apply = lambda dtype: jax.jit(functools.partial(model.clone(dtype=dtype).apply, train=False))(  # noqa: E731
        state, images()
    )
    exact, low = apply(jnp.float32), apply(jnp.bfloat16)
    assert low.dtype == jnp.float32
    assert 0 < np.abs(exact - low).max() < 0.05 * np.abs(exact).max() + 0.05


def test_stochastic_depth_drops_whole_images():
    model = tv.create_model("dgt_t", **SMALL, drop_path=0.9)
    state = variables("dgt_t")
    apply = jax.jit(
        lambda seed: model.apply(
            state, jnp.repeat(images()[:1], 8, 0), train=True,
            rngs={"dropout": jax.random.key(seed)}, mutable=["batch_stats", "centroids"],
            method="features",
        )[0][-1]
    )  # fmt: skip
    rows = np.asarray(apply(0)).reshape(8, -1)
    assert len(np.unique(rows.round(4), axis=0)) > 1  # equal images, different paths
    assert np.abs(rows - np.asarray(apply(1)).reshape(8, -1)).max() > 0


@pytest.mark.slow
def test_pmap_and_rematerialisation_give_the_numbers_of_one_device():
    """Sums over devices equal sums over the whole batch: BatchNorm, centroids, masks, gradients."""
    expected = reference("dgt_t")
    model = tv.create_model("dgt_t", **SMALL, **RANDOM, axis_name="devices", remat=True)
    devices = min(4, jax.device_count())
    assert devices > 1
    step = jax.pmap(
        functools.partial(loss_and_updates, model, axis_name="devices"),
        axis_name="devices", in_axes=(None, 0, 0), out_axes=None, devices=jax.devices()[:devices],
    )  # fmt: skip
    x = images().reshape(devices, -1, *images().shape[1:])
    actual = step(variables("dgt_t"), x, (np.arange(8) % 5).reshape(devices, -1))
    chex.assert_trees_all_close(actual, expected, atol=2e-5)


def test_dense_and_grouped_agree_where_all_keys_are_selected():
    """With top_k >= H * W of the finest stage the groups do not matter."""
    state = variables("dgt_t")
    changed = jax.tree.map(lambda x: x, state)
    changed["centroids"] = jax.tree.map(lambda x: -x[:, ::-1], state["centroids"])
    model = tv.create_model("dgt_t", **SMALL | {"top_k": 96})
    apply = jax.jit(functools.partial(model.apply, train=False))
    np.testing.assert_array_equal(apply(state, images()), apply(changed, images()))
    few = tv.create_model("dgt_t", **SMALL)
    few_apply = jax.jit(functools.partial(few.apply, train=False))
    assert np.abs(few_apply(state, images()) - few_apply(changed, images())).max() > 1e-4
