"""Every shipped config: loads, keeps the contract's keys, and runs one step when shrunk."""

import functools
import importlib.util
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from tokenvit_jax.data import pipeline, train_dataset
from tokenvit_jax.errors import UserError
from tokenvit_jax.published import TOKEN_POOLING
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
ARGS = {
    "dgt": ("", "digits"),
    "clustr": ("", "digits"),
    "pale": ("", "tokens", "digits", "digits_tokens"),
    "deit": ("", "search", "pooled", "digits", "digits_search", "digits_pooled"),
}
# All networks of a family shrink to the same one, so that most steps are compiled once.
PYRAMID = {
    "dims": (8, 8, 16, 16), "num_heads": (2, 2, 2, 2), "depths": (1, 1, 0, 0), "drop_path": 0.1
}  # fmt: skip
SMALL = {
    "dgt": PYRAMID | {"stem_dim": 8, "head_dim": 8},
    "clustr": PYRAMID | {"mlp_ratios": (2, 2, 2, 2)},
    "pale": PYRAMID | {"mlp_ratio": 2, "pale_sizes": (2, 2, 2, 1)},
    "deit": {
        "dim": 8, "num_heads": 2, "depth": 2, "mlp_ratio": 2, "patch_size": 16,
        "position_size": (64, 64), "init_std": 0.1,
    },
}  # fmt: skip
# What does not change a step.
SAME = {
    "num_steps": 1000, "optimizer.warmup_steps": 100, "batch_size": 4, "image_size": 64,
    "data.eval_batch_size": 4, "data.workers": 0, "data.repeats": 1, "log_every_steps": 1,
    "eval_every_steps": 1, "checkpoint_every_steps": 1, "dataset": "digits",
}  # fmt: skip
CASES = [(file, arg) for file in FILES for arg in ARGS[file.stem.split("_")[0]]]


def load(file, arg):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg)


@pytest.mark.parametrize(("file", "arg"), CASES, ids=lambda x: getattr(x, "stem", x))
def test_config_runs_one_step(file, arg, monkeypatch):
    config = load(file, arg)
    assert set(KEYS) <= set(config)
    if "tokens" in arg:
        with pytest.raises(UserError, match=r"config\.token_labels"):  # needs one of two
            check_config(config)
        config.token_labels.teacher = "a folder"
    check_config(config)
    monkeypatch.setattr(pipeline, "open_source", lambda *_: range(1))
    train_dataset(config)  # checks what it reads
    assert config.model == file.stem
    family = file.stem.split("_")[0]
    config.model_overrides.update(SMALL[family])
    if arg.endswith("pooled"):
        assert config.model_overrides.token_reducer.keep == ()  # what a search has found
        config.model_overrides.token_reducer.keep = (9, 3)
    config.update_from_flattened_dict(SAME)
    model = classification.make_model(config, 10)
    metrics = run_step(model, config.to_json_best_effort(sort_keys=True).replace(file.stem, ""))
    assert 0 < metrics["loss"] < 3 * math.log(10)
    assert metrics["grad_norm"] > 0


STEPS = {}


def run_step(model, text):
    """Runs a step of what the text says, once for equal networks and texts."""
    if (model, text) not in STEPS:
        config = ConfigDict(json.loads(text))
        optimizer = make_optimizer(config)
        state = jax.jit(functools.partial(init_state, model, optimizer, config))()
        step = jax.jit(make_train_step(model, optimizer, config, 10))
        rng = np.random.default_rng(0)
        batch = {
            "image": rng.integers(0, 256, (4, 64, 64, 3), np.uint8),
            "label": np.arange(4, dtype=np.int32),
            "skipped": np.zeros(4, np.int32),
        }
        if config.token_labels.weight:
            batch["token_labels"] = np.full((4, 2, 2, 10), 0.1, np.float32)
        state, metrics = step(state, batch)
        assert int(state.step) == 1
        STEPS[model, text] = jax.device_get(metrics)
    return STEPS[model, text]


# What the papers and the code they build on state, beside drop path and clipping.
RECIPE = {
    "batch_size": 1024, "image_size": 224, "label_smoothing": 0.1, "mix.mixup": 0.8,
    "mix.cutmix": 1.0, "augment.flip": 0.5, "optimizer.learning_rate": 1e-3,
    "optimizer.weight_decay": 0.05, "optimizer.warmup_learning_rate": 1e-6,
    "optimizer.end_learning_rate": 1e-5,
}  # fmt: skip
RECIPES = {
    "dgt": {"augment.erasing": 0.25, "augment.color_jitter": 0.0, "data.repeats": 1},
    "clustr": {"augment.erasing": 0.25, "augment.color_jitter": 0.4, "data.repeats": 3},
    "pale": {"augment.erasing": 0.0, "augment.color_jitter": 0.4, "data.repeats": 1},
    "deit": {"augment.erasing": 0.25, "augment.color_jitter": 0.0, "data.repeats": 3},
}
WARMUP_EPOCHS = {"dgt": 20, "clustr": 5, "pale": 20, "deit": 5}


@pytest.mark.parametrize(
    ("name", "drop_path", "clip_norm"),
    [
        ("dgt_t", 0.1, 5.0), ("dgt_s", 0.3, 5.0), ("dgt_b", 0.5, 5.0),
        ("clustr_t", 0.1, 0.0), ("clustr_s", 0.1, 0.0), ("clustr_b", 0.3, 1.0),
        ("pale_t", 0.1, 0.0), ("pale_s", 0.3, 0.0), ("pale_b", 0.5, 0.0),
        ("deit_ti", 0.1, 0.0), ("deit_s", 0.1, 0.0), ("deit_e318", 0.1, 0.0),
        ("deit_e252", 0.1, 0.0), ("deit_b", 0.1, 0.0),
    ],
)  # fmt: skip
def test_published_recipe(name, drop_path, clip_norm):
    (file,) = [file for file in FILES if file.stem == name]
    config = load(file, "")
    found = flatten_dict(config.to_dict(), sep=".")
    family = name.split("_")[0]
    expected = RECIPE | RECIPES[family] | {"clip_norm": clip_norm}
    assert {key: found[key] for key in expected} == expected
    assert config.model_overrides.drop_path == drop_path
    epochs = config.num_steps * config.batch_size / 1_281_167
    warmup = config.optimizer.warmup_steps * config.batch_size / 1_281_167
    assert abs(epochs - 300) < 0.3
    assert abs(warmup - WARMUP_EPOCHS[family]) < 0.03


@pytest.mark.parametrize("name", ["deit_s", "deit_e318", "deit_e252"])
def test_stages_of_token_pooling(name):
    (file,) = [file for file in FILES if file.stem == name]
    base, search, pooled = (load(file, arg) for arg in ("", "search", "pooled"))
    assert search.num_steps * 10 == base.num_steps == pooled.num_steps
    assert search.retention.penalty > 0 == pooled.retention.penalty
    for number, level in enumerate(TOKEN_POOLING[name]):
        config = load(file, f"level{number}")
        assert config.model_overrides.token_reducer.keep == level.keep
        config.model_overrides.token_reducer.keep = ()
        assert config.to_dict() == pooled.to_dict()


def test_unknown_argument_is_named():
    with pytest.raises(
        UserError, match="config argument 'cifar' is not valid; valid: none, digits"
    ):
        load(FILES[0], "cifar")
