"""Every shipped config: loads, keeps the contract's keys, and runs one step when shrunk."""

import functools
import importlib.util
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from tokenvit_jax.errors import UserError
from tokenvit_jax.tasks import classification
from tokenvit_jax.training.optimizer import make_optimizer
from tokenvit_jax.training.state import init_state
from tokenvit_jax.training.step import make_train_step
from tokenvit_jax.training.validate import check_config

FILES = sorted(Path(__file__).parent.parent.glob("configs/*.py"))
KEYS = (
    "model", "model_overrides", "dataset", "seed", "num_steps", "batch_size", "image_size", "dtype",
    "parallel", "log_every_steps", "eval_every_steps", "checkpoint_every_steps",
)  # fmt: skip
SMALL = {
    "stem_dim": 8, "dims": (8, 8, 16, 16), "num_heads": (1, 1, 2, 2), "depths": (1, 1, 1, 1),
    "head_dim": 8,
}  # fmt: skip


def load(file, arg):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg)


@pytest.mark.parametrize("arg", ["", "digits"])
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_config_runs_one_step(file, arg):
    config = load(file, arg)
    assert set(KEYS) <= set(config)
    check_config(config)
    assert config.model == file.stem
    config.model_overrides.update(SMALL)
    config.batch_size, config.image_size = 4, 32

    model = classification.make_model(config, 10)
    optimizer = make_optimizer(config)
    init = functools.partial(init_state, model, optimizer, config)
    state = jax.jit(init)()
    step = jax.jit(make_train_step(model, optimizer, config, 10))
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (4, 32, 32, 3), np.uint8),
        "label": np.arange(4, dtype=np.int32),
        "skipped": np.zeros(4, np.int32),
    }
    state, metrics = step(state, batch)
    assert int(state.step) == 1
    assert 0 < float(metrics["loss"]) < 2 * math.log(10)
    assert float(metrics["grad_norm"]) > 0


def test_published_length_is_300_epochs():
    config = load(FILES[0], "")
    epochs = config.num_steps * config.batch_size / 1_281_167
    assert abs(epochs - 300) < 0.3


def test_unknown_argument_is_named():
    with pytest.raises(
        UserError, match="config argument 'cifar' is not valid; valid: none, digits"
    ):
        load(FILES[0], "cifar")
