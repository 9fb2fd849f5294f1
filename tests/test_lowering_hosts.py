"""Training steps of hosts with token reducers, windows and clustering lower for accelerators."""

import jax.numpy as jnp
import pytest
from lowering import array, lowers, step_lowers
from make_task import make_task
from sampled import sampled
from shipped_configs import load_config

from tokenvit_jax.models.backbone import variable_shapes
from tokenvit_jax.tasks import default_config
from tokenvit_jax.training.step import make_eval_step


@pytest.mark.parametrize(
    "method", sampled(["weighted_kmedoids", "kmeans", "importance", "evit", "tome"])
)
def test_training_step_with_a_token_reducer(method):
    config = load_config("deit_s", "pooled")
    config.model_overrides.depth = 2
    config.model_overrides.token_reducer.update({"method": method, "keep": (49, 7), "carry": True})
    step_lowers(config)


@pytest.mark.slow
def test_training_step_of_a_host_with_windows():
    config = default_config("classification")
    config.model = "swinv2_t"
    # The second block of a stage has shifted windows.
    config.model_overrides = {"depths": (1, 2, 1, 1), "drop_path": 0.1}
    step_lowers(config)


@pytest.mark.slow
def test_training_step_of_the_search():
    config = load_config("deit_s", "search")
    config.model_overrides.depth = 1
    step_lowers(config)


@pytest.mark.slow
def test_training_step_and_evaluation_of_a_clustered_segmenter():
    config = load_config("segmenter_ti")
    config.model_overrides.depth = 3
    config.model_overrides.expedite = {
        "alpha": 1, "beta": 2, "clusters": (20, 20), "where": "logits"
    }  # fmt: skip
    step_lowers(config, 512, label=(2, 512, 512))
    task = make_task(config)
    model = task.make_model()
    variables = variable_shapes(model, array(1, 512, 512, 3))
    pair = array(1, 2, dtype=jnp.int32)
    batch = {
        "image": array(1, 600, 700, 3, dtype=jnp.uint8), "image_size": pair,
        "label": array(1, 90, 80, dtype=jnp.uint8), "label_size": pair, "mask": array(1),
    }  # fmt: skip
    lowers(make_eval_step(task, model), variables, batch)
