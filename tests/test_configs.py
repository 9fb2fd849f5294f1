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

from tokenvit_jax.config import default_config
from tokenvit_jax.data import dataset_info
from tokenvit_jax.errors import UserError
from tokenvit_jax.published import TOKEN_POOLING
from tokenvit_jax.tasks import batches, segmentation, task_name, task_of
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
    "swin": ("", "digits"),
    "swinv2": ("", "digits"),
    "segmenter": ("", "pascal_context", "cityscapes", "scenes"),
}
# All networks of a family shrink to the same one, so that most steps are compiled once.
PYRAMID = {
    "dims": (8, 8, 16, 16), "num_heads": (2, 2, 2, 2), "depths": (1, 1, 0, 0), "drop_path": 0.1
}  # fmt: skip
PLAIN = {
    "dim": 8, "num_heads": 2, "depth": 2, "mlp_ratio": 2, "patch_size": 16,
    "position_size": (64, 64), "init_std": 0.1,
}  # fmt: skip
SMALL = {
    "dgt": PYRAMID | {"stem_dim": 8, "head_dim": 8},
    "clustr": PYRAMID | {"mlp_ratios": (2, 2, 2, 2)},
    "pale": PYRAMID | {"mlp_ratio": 2, "pale_sizes": (2, 2, 2, 1)},
    "deit": PLAIN,
    "segmenter": PLAIN,
    "swin": PYRAMID | {"mlp_ratio": 2, "window_size": 4},
    "swinv2": PYRAMID | {
        "mlp_ratio": 2, "window_size": 4, "pretrained_window_sizes": (4, 4, 4, 2)
    },
}  # fmt: skip
# What does not change a step, but its numbers.
SAME = {
    "num_steps": 1000, "optimizer.warmup_steps": 100, "optimizer.learning_rate": 1e-3,
    "batch_size": 4, "image_size": 64,
    "log_every_steps": 1, "eval_every_steps": 1, "checkpoint_every_steps": 1,
}  # fmt: skip
SMALL_DATASET = {"classification": "digits", "segmentation": "scenes"}
# Whose shrunk settings differ from the published ones in nothing that other families do not show.
ONE_STEP = ("swin", "swinv2", "segmenter")
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
    monkeypatch.setattr(batches, "open_split", lambda *_: range(1))
    batches.train_dataset(config)  # checks what it reads
    family, size = file.stem.split("_")
    assert config.model == f"{'vit' if family == 'segmenter' else family}_{size}"
    if family in ONE_STEP and arg in SMALL_DATASET.values():
        return
    shrink(config, family)
    model = task_of(config.dataset).make_model(config, 10)
    metrics = run_step(model, config.to_json_best_effort(sort_keys=True).replace(config.model, ""))
    assert 0 < metrics["loss"] < 3 * math.log(10)
    assert metrics["grad_norm"] > 0


def shrink(config, family):
    config.model_overrides.update(SMALL[family])
    if "keep" in config.model_overrides.get("token_reducer", ()):
        assert config.model_overrides.token_reducer.keep == ()  # what a search has found
        config.model_overrides.token_reducer.keep = (9, 3)
    if family == "segmenter":
        config.head_overrides = {"depth": 1, "head_dim": 4}
    config.dataset = SMALL_DATASET[task_name(dataset_info(config.dataset))]
    config.update_from_flattened_dict(SAME)
    # What a step does not read.
    default = default_config()
    default.data.normalization = config.data.normalization
    for key in ("data", "augment", "inference"):
        config[key] = default[key]


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
        if config.dataset == "scenes":
            batch["label"] = rng.integers(0, 10, (4, 64, 64), np.uint8)
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
    "swin": {"augment.erasing": 0.25, "augment.color_jitter": 0.0, "data.repeats": 1},
}
RECIPES["swinv2"] = RECIPES["swin"] | {"image_size": 256}
WARMUP_EPOCHS = {"dgt": 20, "clustr": 5, "pale": 20, "deit": 5, "swin": 20, "swinv2": 20}


@pytest.mark.parametrize(
    ("name", "drop_path", "clip_norm"),
    [
        ("dgt_t", 0.1, 5.0), ("dgt_s", 0.3, 5.0), ("dgt_b", 0.5, 5.0),
        ("clustr_t", 0.1, 0.0), ("clustr_s", 0.1, 0.0), ("clustr_b", 0.3, 1.0),
        ("pale_t", 0.1, 0.0), ("pale_s", 0.3, 0.0), ("pale_b", 0.5, 0.0),
        ("deit_ti", 0.1, 0.0), ("deit_s", 0.1, 0.0), ("deit_e318", 0.1, 0.0),
        ("deit_e252", 0.1, 0.0), ("deit_b", 0.1, 0.0),
        ("swin_t", 0.2, 5.0), ("swin_s", 0.3, 5.0), ("swin_b", 0.5, 5.0),
        ("swinv2_t", 0.2, 5.0), ("swinv2_s", 0.3, 5.0), ("swinv2_b", 0.5, 5.0),
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


# What segm/config.yml of the code of Segmenter states, and what its README does of ViT-L.
SEGMENTER = {
    "segmenter_s": {"": (64, 8, 1e-3, 512, 512, 512, 2)},
    "segmenter_l": {
        "": (64, 8, 1e-3, 640, 640, 640, 2),
        "pascal_context": (256, 16, 1e-3, 520, 480, 320, 2),
        "cityscapes": (216, 8, 1e-2, 1024, 768, 512, 1),
    },
}


@pytest.mark.parametrize(
    ("name", "arg"), [(name, arg) for name, args in SEGMENTER.items() for arg in args]
)
def test_published_recipe_of_segmenter(name, arg):
    (file,) = [file for file in FILES if file.stem == name]
    config = load(file, arg)
    epochs, batch_size, learning_rate, short_side, crop, stride, depth = SEGMENTER[name][arg]
    assert config.dataset == (arg or "ade20k")
    images = dataset_info(config.dataset).splits["train"]
    assert abs(config.num_steps * batch_size / images - epochs) < 0.01
    found = flatten_dict(config.to_dict(), sep=".")
    expected = {
        "batch_size": batch_size, "image_size": crop, "inference.stride": stride,
        "augment.short_side": short_side, "data.eval_short_side": short_side,
        "head_overrides.depth": depth, "model_overrides.drop_path": 0.1,
        "optimizer.name": "sgd", "optimizer.learning_rate": learning_rate, "optimizer.b1": 0.9,
        "optimizer.weight_decay": 0.0, "optimizer.schedule": "polynomial", "optimizer.power": 0.9,
        "optimizer.warmup_steps": 0, "optimizer.end_learning_rate": 1e-5, "clip_norm": 0.0,
        "augment.scale_range": (0.5, 2.0), "augment.max_class_share": 0.75, "augment.flip": 0.5,
        "augment.photometric": True, "data.normalization": "inception",
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected
    # Windows fit into the buffer, and an image of 4:3 does so as it is.
    assert min(config.data.eval_size) >= short_side
    assert max(config.data.eval_size) >= short_side * 4 / 3
    config.model_overrides.update(SMALL["segmenter"])
    config.head_overrides.head_dim = 4
    model = segmentation.make_model(config, 3)
    images = jax.ShapeDtypeStruct((1, *config.data.eval_size, 3), "float32")

    def predict(images):
        variables = model.init(jax.random.key(0), images[:, :64, :64], train=False)
        return segmentation.predict_logits(model, config, variables, images, np.array([[64, 64]]))

    assert jax.eval_shape(predict, images).shape == (1, *config.data.eval_size, 3)


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
