import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tokenvit_jax as tv
from tokenvit_jax.config import default_config
from tokenvit_jax.training.optimizer import (
    learning_rate_schedule,
    make_optimizer,
    weight_decay_mask,
)


def test_decay_applies_to_kernels_of_dgt_and_to_nothing_else():
    model = tv.create_model("dgt_s")
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    params = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    leaves = jax.tree_util.tree_leaves_with_path(weight_decay_mask(params["params"]))
    by_name = {}
    for path, decays in leaves:
        by_name.setdefault(path[-1].key, set()).add(decays)
    assert by_name.pop("kernel") == {True}
    assert set(by_name) == {"bias", "scale", "logit_scale"}
    assert all(values == {False} for values in by_name.values())


@pytest.mark.parametrize(
    ("name", "decays"),
    [
        ("kernel", True),
        ("pos_embed", False),
        ("relative_position_bias", False),
        ("cls_token", False),
        ("logit_scale", False),
        ("bias", False),
    ],
)
def test_decay_of_matrices_goes_by_name(name, decays):
    assert weight_decay_mask({"layer": {name: jnp.ones((2, 3))}}) == {"layer": {name: decays}}


def test_an_mlp_of_position_biases_does_not_decay():
    params = {"attention": {"position_bias": {"fc1": {"kernel": jnp.ones((2, 3))}}}}
    assert jax.tree.leaves(weight_decay_mask(params)) == [False]


def test_vectors_never_decay():
    assert weight_decay_mask({"kernel": jnp.ones(3)}) == {"kernel": False}


def test_schedule_warms_up_and_decays_to_the_end():
    config = default_config()
    config.num_steps = 101
    config.optimizer.learning_rate = 1.0
    config.optimizer.warmup_steps = 20
    config.optimizer.warmup_learning_rate = 0.2
    config.optimizer.end_learning_rate = 0.1
    schedule = learning_rate_schedule(config)
    steps = np.arange(101)
    cosine = 0.1 + 0.9 * (1 + np.cos(np.pi * (steps - 20) / 80)) / 2
    expected = np.where(steps < 20, 0.2 + 0.8 * steps / 20, cosine)
    np.testing.assert_allclose([float(schedule(step)) for step in steps], expected, rtol=1e-5)


def test_schedule_of_one_step_is_finite():
    config = default_config()
    config.num_steps = 1
    assert float(learning_rate_schedule(config)(0)) == pytest.approx(1e-3)


def test_weight_decay_shrinks_kernels_by_the_learning_rate_and_clipping_bounds_the_gradient():
    config = default_config()
    config.clip_norm = 1.0
    config.optimizer.learning_rate = 0.1
    config.optimizer.weight_decay = 0.5
    params = {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full((2,), 3.0)}
    optimizer = make_optimizer(config)
    state = optimizer.init(params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, state, params)
    np.testing.assert_allclose(updates["kernel"], -0.1 * 0.5 * params["kernel"], rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 0.0)

    large = jax.tree.map(lambda x: 100.0 * x, params)
    _, state = optimizer.update(large, state, params)
    mu = optax.tree_utils.tree_get(state, "mu")
    assert float(optax.global_norm(mu)) == pytest.approx(0.1, rel=1e-5)  # (1 - b1) * clip_norm
