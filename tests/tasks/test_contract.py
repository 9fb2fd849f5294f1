"""The contract that every task keeps; a new task needs one tiny configuration here.

A case may have a model of another kind, whose training step alone differs from the task's own case.
"""

import functools
import json
import pickle
import shutil
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import numpy as np
import pytest
from make_task import open_dataset
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from PIL import Image
from random_variables import random_state
from sampled import sampled
from timings import without_timings

from tokenvit_jax.data import IGNORED
from tokenvit_jax.tasks import TASKS, Task, create_task, default_config, tasks_with
from tokenvit_jax.training import devices
from tokenvit_jax.training.checkpoint import load_checkpoint
from tokenvit_jax.training.loop import train
from tokenvit_jax.training.optimizer import make_optimizer
from tokenvit_jax.training.state import init_state
from tokenvit_jax.training.step import make_eval_step, make_train_step
from tokenvit_jax.training.validate import check_task

BATCH_SIZE, SIZE = 16, 32
HOST = {"dim": 8, "depth": 1, "num_heads": 1, "patch_size": 8, "position_size": (SIZE, SIZE)}

TINY_SWIN = {
    "model": "swin_t",
    "model_overrides": {
        "dims": (4, 4, 8, 8), "num_heads": (1, 1, 1, 1), "depths": (0, 0, 1, 0),
        "mlp_ratio": 1, "window_size": 2,
    },
}  # fmt: skip


class Case(NamedTuple):
    """A task in a test, with one of its models.

    Attributes:
      entries: entries of its tiny configuration.
      foreign_key: an entry of another task.
      task: name of the task; "": that of the case.
      copies: copies of each image in a training batch. With two, micro-batches are equal, and so
        are their statistics in BatchNorm.
      ignore: returns an evaluation batch with a part of the ground truth ignored, and the same
        batch with other contents in this part; None: the task ignores nothing.
    """

    entries: dict
    foreign_key: str
    task: str = ""
    copies: int = 1
    ignore: Callable[[dict], tuple[dict, dict]] | None = None


def ignore_pixels(batch):
    labels = batch["label"].copy()
    labels[:, ::2] = IGNORED
    beyond = batch["image"].copy()
    for image, (height, width) in zip(beyond, batch["image_size"], strict=True):
        image[height:], image[:, width:] = 255, 255
    return {**batch, "label": labels}, {**batch, "label": labels, "image": beyond}


def forget_depth(batch):
    depth = batch["depth"].copy()
    depth[:, ::2] = 0
    return {**batch, "depth": depth}, {**batch, "depth": np.where(depth > 0, depth, -1)}


CASES = {
    "classification": Case(
        {"dataset": "digits", "image_size": (SIZE, 40), "in_channels": 1}, "inference.stride"
    ),
    "segmentation": Case(
        {
            "dataset": "scenes",
            "head_overrides": {"depth": 1, "head_dim": 8},
            "image_size": (SIZE, 40),
            "in_channels": 4,
            "data.eval_size": (48, 64),
            "data.eval_short_side": 40,  # a window sees no padding
            "data.label_size": (128, 128),
        },
        "mix.mixup",
        ignore=ignore_pixels,
    ),
    "depth": Case(
        {
            "dataset": "depth_scenes",
            "model_overrides": HOST | {"patch_size": 16, "init_std": 0.3},
            "head_overrides": {"channels": 4, "last_channels": 4},
            "image_size": (SIZE, 64),
            "data.eval_size": (64, SIZE),
            "data.depth_size": (136, 144),
            "depth.shift": 0.05,
        },
        "mix.mixup",
        ignore=forget_depth,
    ),
    "detection": Case(
        {
            "dataset": "scene_instances",
            **TINY_SWIN,
            "head_overrides": {
                "channels": 4, "hidden": 8, "num_mask_convs": 1, "max_detections": 3,
                "num_candidates": 8, "num_proposals": 8, "num_anchors": 16, "num_rois": 8,
                "init_std": 0.1,
            },
            "data.max_objects": 5,
            "image_size": 64,  # objects are about as large as the smallest anchors
            "batch_size": 32,  # on eight devices, in two micro-batches, two images of a group
        },
        "mix.mixup",
    ),
    "masks": Case(
        {
            "dataset": "scene_segments",
            **TINY_SWIN,
            "head_overrides": {
                "num_queries": 6, "channels": 32, "num_heads": 2, "num_points": 1,
                "encoder_depth": 1, "encoder_hidden": 8, "depth": 1, "hidden": 8,
            },
            "inference.kind": "semantic",  # whose metrics are not 0 for random weights
            "masks.num_points": 16,
            "data.max_segments": 5,
            "image_size": 128,
            "optimizer.learning_rate": 0.01,  # the loss is ten times as large as that of others
        },
        "mix.mixup",
    ),
    "pose": Case(
        {
            "dataset": "figures",
            **TINY_SWIN,
            "head_overrides": {"channels": 4, "num_heads": 2, "mlp_ratio": 1, "init_std": 0.1},
            "image_size": (64, SIZE),
            "optimizer.learning_rate": 1.0,  # the loss is a mean over all pixels
        },
        "mix.mixup",
    ),
    "htc": Case(
        {
            "dataset": "scene_instances",
            **TINY_SWIN,
            "head": "htc",
            "head_overrides": {
                "channels": 4, "hidden": 8, "num_mask_convs": 1, "max_detections": 3,
                "num_candidates": 8, "num_proposals": 8, "num_anchors": 16, "num_rois": 8,
                "num_box_convs": 1, "num_stuff": 6, "global_head_dim": 4, "init_std": 0.1,
            },
            "data.max_objects": 5,
            "image_size": 64,
            "batch_size": 32,
        },
        "mix.mixup",
        task="detection",
    ),
    "upernet": Case(
        {
            "dataset": "scenes",
            **TINY_SWIN,
            "head": "upernet",
            "head_overrides": {"channels": 4, "auxiliary_channels": 4, "dropout": 0.0},
        },
        "mix.mixup",
        task="segmentation",
        copies=2,
    ),
}  # fmt: skip
each_task = pytest.mark.parametrize("name", TASKS)
# They take long to compile.
SLOW = "htc", "masks", "pose", "upernet"
each_compiled_task = pytest.mark.parametrize(
    "name", sampled(TASKS, keep=[name for name in TASKS if name not in SLOW])
)


def tiny_config(name: str) -> ConfigDict:
    config = default_config(CASES[name].task or name)
    config.model, config.model_overrides = "vit_ti", HOST
    config.image_size, config.batch_size = SIZE, BATCH_SIZE
    config.data.eval_batch_size = 8
    config.optimizer.name, config.optimizer.learning_rate = "sgd", 0.1
    config.optimizer.weight_decay = 0.0  # a parameter moves by its gradient alone
    config.num_steps, config.log_every_steps = 4, 1
    config.eval_every_steps, config.checkpoint_every_steps = 4, 2
    for key, value in CASES[name].entries.items():
        if key.endswith("_overrides"):
            config[key] = value
        else:
            config.update_from_flattened_dict({key: value})
    return config


def test_every_task_has_a_case():
    assert {case.task or name for name, case in CASES.items()} == set(TASKS)


@pytest.mark.parametrize("name", CASES)
def test_defaults_are_valid(name):
    check_task(create_task(tiny_config(name)))


@each_task
def test_entries_of_another_task_are_refused(name):
    config, key = default_config(name), CASES[name].foreign_key
    others = tasks_with(key)
    assert others and name not in others
    with pytest.raises((KeyError, AttributeError, TypeError)):
        config.update_from_flattened_dict({key: 1})
    with pytest.raises((KeyError, AttributeError)):
        config[key.split(".")[0]].no_such_entry = 1


# ------------------------------------------------------------------------------------------------
# Examples
# ------------------------------------------------------------------------------------------------


@functools.cache
def records(name: str, train: bool):
    info = create_task(tiny_config(name)).info
    source = open_dataset(info.name, info.train_split if train else info.eval_split)
    return [source.read(index) for index in range(24)]


def example_batch(task: Task, train: bool, numbers: Iterable[int] = range(BATCH_SIZE)):
    """Returns a batch of the dataset's records; for numbers beyond the last, empty examples."""
    examples, found = task.examples(train=train), []
    for index in numbers:
        is_record = index < len(records(task.config.task, train))
        rng = np.random.default_rng(index) if train else None
        record = records(task.config.task, train)[index] if is_record else None
        example = examples(record, rng) if is_record else examples.empty()
        filling = {"index": np.int32(index if is_record else -1), "skipped": np.int32(0)}
        found.append({**example, **filling, "mask": np.float32(is_record)})
    return {name: np.stack([example[name] for example in found]) for name in found[0]}


@each_task
@pytest.mark.parametrize("train", [True, False])
def test_examples_equal_their_specs_and_can_be_sent_to_a_worker(name, train):
    examples = create_task(tiny_config(name)).examples(train=train)
    copy = pickle.loads(pickle.dumps(examples))
    for record in records(name, train)[:2]:
        made, again = (
            make(record, np.random.default_rng(0) if train else None) for make in (examples, copy)
        )
        for found in (made, again, examples.empty()):
            assert found.keys() == examples.specs.keys()
            for key, spec in examples.specs.items():
                assert (np.shape(found[key]), np.asarray(found[key]).dtype) == tuple(spec), key
        jax.tree.map(np.testing.assert_array_equal, made, again)


# ------------------------------------------------------------------------------------------------
# The step
# ------------------------------------------------------------------------------------------------


@functools.cache
def first_state(name: str):
    """Returns a state before the first step, in the host's memory."""
    config = tiny_config(name)
    model = create_task(config).make_model()
    std = config.model_overrides.get("init_std", 0.1)
    return jax.device_get(random_state(model, make_optimizer(config), config, std))


def place_state(name: str, abstract_state):
    return jax.tree.map(
        lambda x, y: jax.device_put(x, y.sharding), first_state(name), abstract_state
    )


def one_step(name: str, parallel: devices.Parallel, accumulate_steps: int = 1):
    """Returns loss and parameters after a step of plain gradient descent."""
    config = tiny_config(name)
    config.accumulate_steps = accumulate_steps
    task = create_task(config, parallel.axis_name)
    model, optimizer = task.make_model(), make_optimizer(config)
    init_fn = functools.partial(init_state, model, optimizer, config)
    abstract_state = parallel.abstract(init_fn)
    step = parallel.train_step(make_train_step(task, model, optimizer), abstract_state)
    before = place_state(name, abstract_state)
    copies = CASES[name].copies
    batch = example_batch(task, train=True, numbers=range(config.batch_size // copies))
    batch = {key: np.repeat(x, copies, axis=0) for key, x in batch.items()}
    state, metrics = step(before, parallel.put_batch(batch))
    return float(metrics["loss"]), first_state(name).params, jax.device_get(state.params)


@functools.cache
def step_on_one_device(name: str):
    one = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "make_mesh", lambda *args, **kwargs: one)
        return one_step(name, devices.MeshParallel())


FORMS = [(devices.MeshParallel, 1), (devices.MeshParallel, 2), (devices.PmapParallel, 1)]
# Compiling a step takes longest of all: these cases join two forms in one. By default, one task has
# two forms, and the others have none.
JOINED = {
    "depth": [(devices.MeshParallel, 1), (devices.PmapParallel, 2)],
    "detection": [(devices.PmapParallel, 2)],
    "htc": [(devices.PmapParallel, 2)],
    "masks": [(devices.PmapParallel, 2)],
    "pose": [(devices.PmapParallel, 2)],
    "segmentation": [(devices.PmapParallel, 2), (devices.MeshParallel, 1)],
    "upernet": [(devices.PmapParallel, 2)],
}
STEPS = sampled(
    [(name, *form) for name in CASES for form in JOINED.get(name, FORMS)],
    keep=[("classification", *form) for form in FORMS[1:]],
)


@pytest.mark.parametrize(("name", "parallel", "accumulate_steps"), STEPS)
def test_a_step_does_not_depend_on_devices_and_micro_batches(name, parallel, accumulate_steps):
    loss, _, params = one_step(name, parallel(), accumulate_steps)
    expected, _, expected_params = step_on_one_device(name)
    assert loss == pytest.approx(expected, rel=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        params,
        expected_params,
    )


# By default, test_dpt.py has the gradients of depth.
@pytest.mark.parametrize(
    "name", sampled(CASES, keep=("classification", "segmentation", "detection"))
)
def test_every_parameter_has_a_gradient(name):
    _, before, after = step_on_one_device(name)
    leaves = jax.tree_util.tree_leaves_with_path(jax.tree.map(lambda a, b: a != b, before, after))
    unmoved = [jax.tree_util.keystr(path) for path, moved in leaves if not moved.any()]
    assert unmoved == []


# ------------------------------------------------------------------------------------------------
# Evaluation
# ------------------------------------------------------------------------------------------------


@functools.cache
def evaluator(name: str):
    task = create_task(tiny_config(name))
    model = task.make_model()
    step = jax.jit(make_eval_step(task, model))
    variables = jax.device_put({"params": first_state(name).params})
    return task, model, variables, lambda batch: jax.device_get(step(variables, batch))


def metrics_of(name: str, batches):
    task, _, _, evaluate = evaluator(name)
    meter = task.meter()
    for batch in batches:
        meter.add(evaluate(batch))
    return meter.result()


def assert_same_metrics(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-5), key


@each_compiled_task
def test_metrics_do_not_depend_on_how_records_fill_batches(name):
    """The 24 records fill one batch and half of another; what fills the rest counts nothing."""
    task, rest = evaluator(name)[0], range(24, 32)
    batch = functools.partial(example_batch, task, False)
    passes = (
        [batch(range(16)), batch((*range(16, 24), *rest))],
        [batch((*range(8), *rest)), batch(range(8, 24))],
    )
    passes[1][0]["image"][8:] = 255
    found, other = (metrics_of(name, batches) for batches in passes)
    assert_same_metrics(found, other)
    assert all(key.startswith("eval/") and np.isfinite(value) for key, value in found.items())
    assert np.isfinite(task.score(found))


@each_task
def test_ignored_ground_truth_changes_no_metric(name):
    if CASES[name].ignore is None:
        assert not {"label_map", "depth"} & TASKS[name].reads
        return
    batch = example_batch(evaluator(name)[0], train=False)
    ignoring, spoilt = CASES[name].ignore(batch)
    found = metrics_of(name, [ignoring])
    assert found != metrics_of(name, [batch])
    assert_same_metrics(metrics_of(name, [spoilt]), found)


@each_compiled_task
def test_prediction_has_arrays_text_and_pictures(name):
    task, model, variables, _ = evaluator(name)
    image = records(name, train=False)[0]["image"]
    prediction = task.predictor(model, variables)(image)
    assert prediction.arrays and all(isinstance(x, np.ndarray) for x in prediction.arrays.values())
    assert prediction.text and "\n" not in prediction.text
    pictures = prediction.draw("caption")
    assert pictures and all(isinstance(x, Figure | Image.Image) for x in pictures.values())


# ------------------------------------------------------------------------------------------------
# A run
# ------------------------------------------------------------------------------------------------


# What is tested is the loop, and no task.
@pytest.mark.parametrize("name", sampled(TASKS, keep=("classification",)))
def test_a_resumed_run_is_bit_identical(name, tmp_path, monkeypatch):
    config = tiny_config(name)
    monkeypatch.setattr(
        devices.MeshParallel,
        "init",
        lambda self, init_fn: place_state(name, self.abstract(init_fn)),
    )
    train(config, tmp_path / "whole")
    # As if it had been killed after its second step; its log goes further, as it may then.
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "4")
    assert load_checkpoint(tmp_path / "resumed").step == 2
    train(config, tmp_path / "resumed")

    whole, resumed = (
        {
            line["step"]: without_timings(line)
            for line in map(json.loads, (tmp_path / run / "metrics.jsonl").open())
            if "loss" in line
        }
        for run in ("whole", "resumed")
    )
    assert whole == resumed and set(whole) == {1, 2, 3, 4}
    jax.tree.map(
        np.testing.assert_array_equal,
        *(load_checkpoint(tmp_path / run).variables for run in ("whole", "resumed")),
    )
