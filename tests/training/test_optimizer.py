import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from make_task import check_config

import tokenvit_jax as tv
from tokenvit_jax.errors import UserError
from tokenvit_jax.models.backbone import variable_shapes
from tokenvit_jax.tasks import default_config
from tokenvit_jax.training.optimizer import (
    learning_rate_schedule,
    make_optimizer,
    weight_decay_mask,
)


def test_decay_applies_to_kernels_of_dgt_and_to_nothing_else():
    model = tv.create_model("dgt_s")
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    params = variable_shapes(model, images)
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
        ("queries", False),
        ("level_embedding", False),
    ],
)
def test_decay_of_matrices_goes_by_name(name, decays):
    assert weight_decay_mask({"layer": {name: jnp.ones((2, 3))}}) == {"layer": {name: decays}}


def test_an_mlp_of_position_biases_does_not_decay():
    params = {"attention": {"position_bias": {"fc1": {"kernel": jnp.ones((2, 3))}}}}
    assert jax.tree.leaves(weight_decay_mask(params)) == [False]


def test_vectors_never_decay():
    assert weight_decay_mask({"kernel": jnp.ones(3)}) == {"kernel": False}


STEPS = np.arange(101)


@pytest.mark.parametrize(
    ("schedule", "warmup", "decay"),
    [
        ("cosine", 20, (1 + np.cos(np.pi * (STEPS - 20) / 80)) / 2),
        ("polynomial", 20, (1 - (STEPS - 20) / 80).clip(0, 1) ** 0.9),
        ("polynomial", 0, (1 - STEPS / 100) ** 0.9),
    ],
)
def test_schedule_warms_up_and_decays_to_the_end(schedule, warmup, decay):
    config = default_config("classification")
    config.num_steps = 101
    config.optimizer.learning_rate = 1.0
    config.optimizer.schedule = schedule
    config.optimizer.power = 0.9
    config.optimizer.warmup_steps = warmup
    config.optimizer.warmup_learning_rate = 0.2
    config.optimizer.end_learning_rate = 0.1
    found = [float(rate) for rate in map(learning_rate_schedule(config), STEPS)]
    expected = np.where(warmup > STEPS, 0.2 + 0.8 * STEPS / max(warmup, 1), 0.1 + 0.9 * decay)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_step_schedule_falls_at_its_milestones():
    config = default_config("classification")
    config.num_steps = 101
    config.optimizer.learning_rate = 1.0
    config.optimizer.schedule = "step"
    config.optimizer.warmup_steps = 20
    config.optimizer.warmup_learning_rate = 0.2
    config.optimizer.milestones, config.optimizer.milestone_factor = (60, 90), 0.25
    check_config(config)
    found = [float(rate) for rate in map(learning_rate_schedule(config), STEPS)]
    expected = [
        0.2 + 0.8 * step / 20 if step < 20 else 0.25 ** ((step >= 60) + (step >= 90))
        for step in range(101)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("milestones", [(20, 90), (60, 101), (60, 60)])
def test_milestones_are_after_the_warm_up_and_before_the_end(milestones):
    config = default_config("classification")
    config.num_steps = 101
    config.optimizer.schedule, config.optimizer.warmup_steps = "step", 20
    config.optimizer.milestones = milestones
    message = (
        f"config.optimizer.milestones={milestones} is not valid; valid: different steps above "
        "config.optimizer.warmup_steps=20 and below config.num_steps=101"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        check_config(config)


@pytest.mark.parametrize("schedule", ["cosine", "polynomial", "step"])
def test_schedule_of_one_step_is_finite(schedule):
    config = default_config("classification")
    config.num_steps = 1
    config.optimizer.schedule = schedule
    assert float(learning_rate_schedule(config)(0)) == pytest.approx(1e-3)


def test_weight_decay_shrinks_kernels_by_the_learning_rate_and_clipping_bounds_the_gradient():
    config = default_config("classification")
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


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_all_parameters_decay_on_request(name):
    config = default_config("classification")
    config.optimizer.name, config.optimizer.decay = name, "all"
    config.optimizer.learning_rate, config.optimizer.weight_decay = 0.1, 0.5
    config.optimizer.b1 = 0.0
    params = {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full((2,), 2.0)}
    optimizer = make_optimizer(config)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    jax.tree.map(
        lambda update, x: np.testing.assert_allclose(update, -0.1 * 0.5 * x, rtol=1e-6),
        updates,
        params,
    )


def test_sgd_has_the_momentum_of_nesterov_and_decay_in_the_gradient():
    config = default_config("classification")
    config.num_steps = 3
    config.optimizer.name = "sgd"
    config.optimizer.schedule = "polynomial"
    config.optimizer.learning_rate = config.optimizer.end_learning_rate = 0.1
    config.optimizer.weight_decay = 0.5
    params = {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full((2,), 3.0)}
    optimizer = make_optimizer(config)
    state = optimizer.init(params)
    expected, velocity = {"kernel": 3.0, "bias": 3.0}, {"kernel": 0.0, "bias": 0.0}
    for slope in (1.0, -2.0, 0.5):
        grads = jax.tree.map(lambda x, slope=slope: jnp.full_like(x, slope), params)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for name, decay in (("kernel", 0.5), ("bias", 0.0)):
            slope_here = slope + decay * expected[name]
            velocity[name] = 0.9 * velocity[name] + slope_here
            expected[name] -= 0.1 * (slope_here + 0.9 * velocity[name])
            np.testing.assert_allclose(params[name], expected[name], rtol=1e-6)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("name", "adam", "config.optimizer.name='adam' is not valid; valid: adamw, sgd"),
        ("schedule", "stair", "config.optimizer.schedule='stair' is not valid; valid: cosine, pol"),
        ("milestones", (9, 5), "milestones=.9, 5. is not valid; valid: ascending values"),
        ("power", -1.0, "config.optimizer.power=-1.0 is not valid; valid: numbers from 0"),
        ("b1", 1.5, "config.optimizer.b1=1.5 is not valid; valid: numbers from 0"),
    ],
)
def test_settings_that_are_refused(key, value, message):
    config = default_config("classification")
    config.optimizer[key] = value
    with pytest.raises(UserError, match=message):
        check_config(config)
