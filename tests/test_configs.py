"""Every shipped config has the contract's keys, and runs one step when it is shrunk."""

import functools
import json
import math

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from make_task import check_config, make_task
from ml_collections import ConfigDict
from random_variables import random_state
from shipped_configs import CASES, load_config

from tokenvit_jax.data import builtin_info
from tokenvit_jax.errors import UserError
from tokenvit_jax.published import TOKEN_POOLING
from tokenvit_jax.recipes.imagenet import ImageNetRecipe
from tokenvit_jax.tasks import default_config
from tokenvit_jax.tasks.segmentation.inference import predict_logits
from tokenvit_jax.training.optimizer import make_optimizer
from tokenvit_jax.training.step import make_train_step

KEYS = (
    "model", "model_overrides", "dataset", "seed", "num_steps", "batch_size", "image_size", "dtype",
    "parallel", "log_every_steps", "eval_every_steps", "checkpoint_every_steps",
)  # fmt: skip
# All networks of a family shrink to the same one, so that most steps compile once.
PYRAMID = {
    "dims": (8, 8, 16, 16), "num_heads": (2, 2, 2, 2), "depths": (1, 0, 0, 0), "drop_path": 0.1
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
# Configs with the name of a head; their arguments name a model.
HEADS = ("upernet", "semantic_fpn", "mask_rcnn", "retinanet", "htc")
# Entries that change a step's numbers, but not its program.
SAME = {
    "num_steps": 1000, "optimizer.warmup_steps": 100, "optimizer.learning_rate": 1e-3,
    "batch_size": 4, "image_size": 64,
    "log_every_steps": 1, "eval_every_steps": 1, "checkpoint_every_steps": 1,
}  # fmt: skip
SMALL_DATASET = {"classification": "digits", "segmentation": "scenes"}
# Families whose shrunk configs exercise nothing beyond the published ones and other families.
ONE_STEP = ("swin", "swinv2", "segmenter")
# These join what two other steps exercise: of the same network in bfloat16, and of another network
# of the family in float32.
JOINED = ("dgt_s:digits", "dgt_b:digits", *(f"pale_{size}:digits_tokens" for size in "tsb"))
# Arguments whose steps other tests run: other blocks, the digits' network, training with a teacher,
# and the stages of Token Pooling. tests/tasks/test_contract.py runs steps of the other tasks.
SAME_STEP = (
    "swin_block", "cswin_block", "cmt_block", "fashion_mnist", "distilled", "digits_distilled",
    "digits_search", "digits_pooled",
)  # fmt: skip
QUICK = "deit_s"  # runs a step by default


@pytest.mark.parametrize(("name", "arg"), CASES)
def test_config_is_complete_and_valid(name, arg):
    config = load_config(name, arg)
    assert set(KEYS) <= set(config)
    if "tokens" in arg:
        with pytest.raises(UserError, match=r"config\.token_labels"):  # needs a teacher or files
            check_config(config)
        config.token_labels.teacher = "a folder"
    if "distilled" in arg:
        with pytest.raises(UserError, match=r"missing: config\.distillation\.teacher"):
            check_config(config)
        config.distillation.teacher = "a folder"
    check_config(config)
    make_task(config).examples(train=True)
    if name == "finetune":
        assert config.initial.workdir and config.initial.checkpoint == "last"
        name = arg.split(",")[0]
    if name == "dpt":
        assert config.model == ("vit_ti" if arg == "scenes" else "vit_b_r50")
    elif name in HEADS:
        model = "swin_t" if arg == "scenes" else arg.removesuffix("_3x").removesuffix("_48")
        assert (config.head, config.model) == (name, model)
    elif name == "mask2former":
        assert config.model == "swin_t" if arg.startswith("scenes") else arg.endswith(config.model)
    elif name == "pose":
        assert config.model == ("clustr_t" if arg == "figures" else arg)
    else:
        family, size = name.split("_")
        assert config.model == f"{'vit' if family == 'segmenter' else family}_{size}"
    if arg == "fashion_mnist":  # the digits run a step of the same network
        assert config.model_overrides == load_config(name, "digits").model_overrides


def stepping():
    """Yields the configs whose steps are run here, most of them slow."""
    for name, arg in CASES:
        family = name.split("_")[0]
        if family not in SMALL or f"{name}:{arg}" in JOINED or arg in SAME_STEP:
            continue
        if family in ONE_STEP and arg in SMALL_DATASET.values():
            continue
        quick = (name, arg) == (QUICK, "")
        yield pytest.param(name, arg, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("name", "arg"), stepping())
def test_config_runs_one_step(name, arg):
    config = load_config(name, arg)
    if "tokens" in arg:
        config.token_labels.teacher = "a folder"
    if "distilled" in arg:
        config.distillation.teacher = "a folder"
    shrink(config, name.split("_")[0])
    model = make_task(config, 10).make_model()
    # Without the name, which a step does not read: the sizes of a family share one compilation.
    metrics = run_step(model, json.dumps({**config.to_dict(), "model": ""}, sort_keys=True))
    assert 0 < metrics["loss"] < 3 * math.log(10)
    assert metrics["grad_norm"] > 0


def shrink(config, family):
    config.model_overrides.update(SMALL[family])
    if "keep" in config.model_overrides.get("token_reducer", ()):
        assert config.model_overrides.token_reducer.keep == ()  # the numbers that a search found
        config.model_overrides.token_reducer.keep = (9, 3)
    if family == "clustr":
        config.clip_norm = 0.0  # ClusTR-B clips as all DGTs do
    if family == "segmenter":
        config.head_overrides = {"depth": 1, "head_dim": 4}
    config.dataset = SMALL_DATASET[config.task]
    config.update_from_flattened_dict(SAME)
    # Entries that a step does not read.
    default = default_config(config.task)
    default.data.normalization = config.data.normalization
    for key in {"data", "augment", "inference"} & set(config):
        config[key] = default[key]


STEPS = {}


def run_step(model, text):
    """Runs one step of the config in the text; equal networks and texts run once."""
    if (model, text) not in STEPS:
        config = ConfigDict(json.loads(text))
        optimizer = make_optimizer(config)
        state = random_state(model, optimizer, config)
        step = jax.jit(make_train_step(make_task(config, 10), model, optimizer))
        rng = np.random.default_rng(0)
        batch = {
            "image": rng.integers(0, 256, (4, 64, 64, 3), np.uint8),
            "label": np.arange(4, dtype=np.int32),
            "skipped": np.zeros(4, np.int32),
        }
        if config.dataset == "scenes":
            batch["label"] = rng.integers(0, 10, (4, 64, 64), np.uint8)
        if "token_labels" in config and config.token_labels.weight:
            batch["token_labels"] = np.full((4, 2, 2, 10), 0.1, np.float32)
        state, metrics = step(state, batch)
        assert int(state.step) == 1
        STEPS[model, text] = jax.device_get(metrics)
    return STEPS[model, text]


# Values from the papers and the code that they build on, besides drop path and clipping.
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
    config = load_config(name)
    found = flatten_dict(config.to_dict(), sep=".")
    family = name.split("_")[0]
    expected = RECIPE | RECIPES[family] | {"clip_norm": clip_norm}
    assert {key: found[key] for key in expected} == expected
    assert config.model_overrides.drop_path == drop_path
    epochs = config.num_steps * config.batch_size / 1_281_167
    warmup = config.optimizer.warmup_steps * config.batch_size / 1_281_167
    assert abs(epochs - 300) < 0.3
    assert abs(warmup - WARMUP_EPOCHS[family]) < 0.03


@pytest.mark.parametrize(
    ("arg", "epochs", "peak", "warmup", "end", "weight_decay", "layer_decay", "clip_norm"),
    [
        ("vit_b", 100, 2e-3, 0.0, 1e-6, 0.05, 0.65, 0.0),
        ("swin_t", 30, 4e-5, 4e-8, 4e-7, 1e-8, 1.0, 5.0),
        ("clustr_s", 30, 4e-5, 4e-8, 4e-7, 1e-8, 1.0, 5.0),
    ],
)
def test_published_recipe_of_fine_tuning(
    arg, epochs, peak, warmup, end, weight_decay, layer_decay, clip_norm
):
    config = load_config("finetune", arg)
    assert round(config.num_steps * 1024 / 1_281_167) == epochs and config.batch_size == 1024
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.warmup_learning_rate) == (peak, warmup)
    assert (optimizer.end_learning_rate, optimizer.weight_decay) == (end, weight_decay)
    assert (optimizer.layer_decay, config.clip_norm) == (layer_decay, clip_norm)
    few = load_config("finetune", f"{arg},2048")
    assert few.num_steps == 2 * epochs and few.optimizer.warmup_steps == 10
    small = load_config("finetune", f"{arg},2048,256")
    assert small.num_steps == 8 * epochs and small.optimizer.learning_rate == peak / 4
    assert small.optimizer.end_learning_rate == pytest.approx(end / 4)
    for wrong in (f"{arg},0", f"{arg},many", f"{arg},1,2,3", "vit"):
        with pytest.raises(UserError, match="config argument"):
            load_config("finetune", wrong)


# Values from the authors' segm/config.yml, and for ViT-L from their README.
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
    config = load_config(name, arg)
    epochs, batch_size, learning_rate, short_side, crop, stride, depth = SEGMENTER[name][arg]
    assert config.dataset == (arg or "ade20k")
    images = builtin_info(config.dataset).splits["train"]
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
    # The buffer holds a window, and an image of 4:3 without shrinking it.
    assert min(config.data.eval_size) >= short_side
    assert max(config.data.eval_size) >= short_side * 4 / 3
    config.model_overrides.update(SMALL["segmenter"])
    config.head_overrides.head_dim = 4
    model = make_task(config, 3).make_model()
    images = jax.ShapeDtypeStruct((1, *config.data.eval_size, 3), "float32")

    def predict(images):
        variables = model.init(jax.random.key(0), images[:, :64, :64], train=False)
        return predict_logits(model, config, variables, images, np.array([[64, 64]]))

    assert jax.eval_shape(predict, images).shape == (1, *config.data.eval_size, 3)


@pytest.mark.parametrize("name", ["deit_s", "deit_e318", "deit_e252"])
def test_stages_of_token_pooling(name):
    base, search, pooled = (load_config(name, arg) for arg in ("", "search", "pooled"))
    assert search.num_steps * 10 == base.num_steps == pooled.num_steps
    assert search.model_overrides.token_reducer.penalty > 0
    assert "penalty" not in pooled.model_overrides.token_reducer
    for number, level in enumerate(TOKEN_POOLING[name]):
        config = load_config(name, f"level{number}")
        assert config.model_overrides.token_reducer.keep == level.keep
        config.model_overrides.token_reducer.keep = ()
        assert config.to_dict() == pooled.to_dict()


def test_unknown_argument_is_rejected():
    with pytest.raises(
        UserError, match="config argument 'cifar' is not valid; valid: none, digits"
    ):
        load_config("clustr_b", "cifar")


def test_unknown_augmentation_is_rejected():
    recipe = functools.partial(
        ImageNetRecipe, image_size=224, batch_size=8, epochs=1, warmup_epochs=0,
        learning_rate=1e-3, weight_decay=0.05, clip_norm=0.0,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"'erase' is not valid .*'erasing'.*; valid: crop, flip"):
        recipe(augmentations=("crop", "erase"))
