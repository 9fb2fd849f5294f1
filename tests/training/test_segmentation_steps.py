"""Training and evaluation of segmentation give the same numbers on any devices."""

import functools

import jax
import numpy as np
import pytest
from make_task import make_task

from tokenvit_jax.data import IGNORED
from tokenvit_jax.tasks import default_config
from tokenvit_jax.training import devices
from tokenvit_jax.training.optimizer import make_optimizer
from tokenvit_jax.training.state import init_state
from tokenvit_jax.training.step import make_eval_step, make_train_step

BATCH, SIZE, K = 16, 32, 5


def config(**overrides):
    config = default_config("segmentation")
    config.dataset, config.model = "scenes", "vit_ti"
    config.model_overrides = {
        "dim": 8, "depth": 1, "num_heads": 1, "patch_size": 8, "position_size": (SIZE, SIZE)
    }  # fmt: skip
    config.head_overrides = {"depth": 1, "head_dim": 8}
    config.image_size, config.batch_size, config.num_steps = SIZE, BATCH, 10
    config.optimizer.learning_rate = 1e-2
    config.update_from_flattened_dict(overrides)
    return config


def batch():
    """Most labels of the last images are ignored."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, K, (BATCH, SIZE, SIZE)).astype(np.uint8)
    labels[BATCH // 2 :, :, 4:] = IGNORED
    return {
        "image": rng.integers(0, 256, (BATCH, SIZE, SIZE, 3), dtype=np.uint8),
        "label": labels,
        "skipped": np.zeros(BATCH, np.int32),
    }


def eval_batch():
    sizes = np.random.default_rng(1).integers(8, SIZE + 1, (BATCH, 2)).astype(np.int32)
    mask = (np.arange(BATCH) < 13).astype(np.float32)
    return batch() | {"image_size": sizes, "label_size": sizes, "mask": mask}


def run(parallel, config):
    """Returns the loss of a step and the sums of the evaluation after it."""
    task = make_task(config, K, parallel.axis_name)
    model = task.make_model()
    optimizer = make_optimizer(config)
    init_fn = functools.partial(init_state, model, optimizer, config)
    step = make_train_step(task, model, optimizer)
    step = parallel.train_step(step, parallel.abstract(init_fn))
    state, metrics = step(parallel.init(init_fn), parallel.put_batch(batch()))
    evaluate = parallel.eval_step(make_eval_step(task, model))
    outcome = evaluate({"params": state.params}, parallel.put_batch(eval_batch()))
    return jax.device_get(metrics), parallel.fetch(outcome).sums


@functools.cache
def on_eight_devices():
    return run(devices.MeshParallel(), config())


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [devices.PmapParallel, devices.MeshParallel])
def test_any_layout_and_any_micro_batches(parallel):
    metrics, sums = on_eight_devices()
    changed = config(accumulate_steps=2) if parallel is devices.MeshParallel else config()
    other_metrics, other_sums = run(parallel(), changed)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(other_metrics[name], metrics[name], rtol=1e-4)
    np.testing.assert_allclose(other_sums["loss"], sums["loss"], rtol=1e-3)
    assert np.abs(other_sums["confusion"] - sums["confusion"]).sum() <= 4  # ties


def test_every_labelled_pixel_is_counted_once():
    _, sums = on_eight_devices()
    labels = eval_batch()["label"][:13]
    expected = np.bincount(labels[labels != IGNORED], minlength=K)
    np.testing.assert_array_equal(sums["confusion"].sum(1), expected)
