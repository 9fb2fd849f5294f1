"""Every entry of every task refuses bad values and values that change nothing, in one line."""

import math

import pytest
from make_task import check_config
from ml_collections import FieldReference

from tokenvit_jax import config as config_module
from tokenvit_jax.config import ENTRIES, NEEDS
from tokenvit_jax.data import INTERPOLATIONS, NORMALIZATIONS
from tokenvit_jax.data.images import MODES
from tokenvit_jax.data.token_labels import CELL_SIZE
from tokenvit_jax.errors import UserError
from tokenvit_jax.tasks import (
    TASKS,
    check_values,
    create_task,
    default_config,
    entries_of,
    tasks_with,
)
from tokenvit_jax.tasks.pose.model import HEADS as POSE_HEADS
from tokenvit_jax.tasks.segmentation.model import HEADS
from tokenvit_jax.training.validate import check_task
from tokenvit_jax.valid import Form, Group, Number, OneOf, Several, Text, ZeroOr, check

DATASETS = {
    "classification": "digits", "segmentation": "scenes", "depth": "depth_scenes",
    "detection": "scene_instances", "masks": "scene_segments",
    "pose": "figures",
}  # fmt: skip
NAN, INF = math.nan, math.inf
# Values that no entry takes.
NONSENSE = [None, NAN, INF, -INF, -1, -0.5, 1j, 10**12, 10**400, b"a", "a\0b", " ", object(), set()]
# Kind of the default -> values of another kind.
WRONG_KIND = {
    bool: [0, 1, "True", "", (), {}],
    int: [2.5, 1.0, True, "1", "", (1,) * 3, {}, []],
    float: [True, "0.5", "", (0.5,), {}, []],
    str: [1, 0.5, True, ("a",), {}, []],
    tuple: [1, 0.5, "a", "", True, {}, ("",), ((),), (None, None), (-1, -1), (0.5, NAN), (2, 1, 3)],
    dict: [1, "a", "", (), [], {1: 2}],
}
# Values at the limits, and the other forms of a value that are right.
RIGHT = {
    "batch_size": [1, 2**20],
    "clip_norm": [0, 5, 1e-3],
    "data.classes": [(), ("cat", "dog"), ["cat"]],
    "data.eval_crop": [1, 0.1],
    "data.eval_size": [(0, 0), (32, 48), [48, 32]],
    "data.split": [0, 0.999],
    "dataset": ["digits", "tfds:a/b:1.*", "my_package.my_dataset"],
    "dtype": ["float32", "bfloat16"],
    "augment.crop_scale": [(1, 1), (0.08, 1.0), [0.5, 0.5]],
    "augment.randaugment.magnitude": [0, 10, 3.5],
    "image_size": [32, (32, 64), [224, 224], 2**15],
    "inference.scales": [(1.0,), (1,), (2, 1, 3), (0.5, 0.75, 1.0)],
    "inference.min_sides": [(2, 1, 3), (0,), ()],
    "inference.max_sides": [(2, 1, 3), (0,), ()],
    "inference.window": [0, 32, (0, 64), "whole"],
    "initial.checkpoint": ["last", "best", "0", "1200"],
    "initial.workdir": ["", "runs/a b", "~/run"],
    "model_overrides": [{}, {"depth": 2}],
    "num_steps": [1, 2**31 - 1],
    "optimizer.milestones": [(), (1,), (10, 20, 30)],
    "optimizer.freeze": ["", "backbone", "patches, blocks_[0-3]"],
    "optimizer.learning_rate": [1, 1e-9, 1000],
    "pose.part_weights": [(), (1.0,) * 5, (2, 1, 3)],
    "profile": ["", "1:1", "10:12"],
    "seed": [0, 2**32 - 1],
}
# Values at or just beyond the limits that are wrong.
WRONG = {
    "augment.color_range": [(0.0, 1.0), (1.1, 0.9)],
    "augment.crop_ratio": [(0, 0), (2.0, 1.0)],
    "augment.crop_scale": [(0, 0), (5, 1), (1,), (0.5, 2.0), (1.0, 0.5)],
    "augment.flip": [1.1, 7],
    "augment.erasing": [7],
    "augment.max_class_share": [0.0],
    "augment.randaugment.magnitude": [10.5],
    "augment.scale_range": [(2.0, 1.0), (0.0, 1.0), (1, 1e9)],
    "augment.short_sides": [(31,), (480, 0), (480.0,), 480],
    "data.classes": [("a", ""), (" ",), "cat"],
    "data.data_dir": [""],
    "data.eval_crop": [0.0, 1.5, 1e-9],
    "data.eval_size": [(32, 0), (31, 32), (0,), (32, 10**12)],
    "data.label_size": [(-1, 8), (0, 8)],
    "data.depth_size": [(-1, 8), (0, 8)],
    "data.split": [1, 1.0],
    "depth.limits": [(0.0, 80.0), (10.0, 1.0)],
    "depth.scale": [0.0],
    "dataset": ["", ".x", "a..b", "a b", "tfds:", "a.", "../a"],
    "ema_decay": [1, 1.0],
    "image_size": [31, 0, (31, 64), "64", (8, 2, 1), 2**15 + 1],
    "in_channels": [0, 2, 5, 3.0],
    "inference.scales": [(), (0.0, 1.0), (-0.5,), (11,), 1.5],
    "inference.stride": [(8, 2, 1), "a", "whole"],
    "initial.checkpoint": ["", "first", "1.5", "+1", "1 ", "last\n"],
    "label_smoothing": [1, 1.0],
    "mix.probability": [0, 0.0],
    "model": [""],
    "num_steps": [0, 2**31],
    "optimizer.b1": [1, 1.0, 2],
    "optimizer.b2": [1.0, 2],
    "optimizer.freeze": [",", "a,,b", "a,"],
    "optimizer.layer_decay": [0, 1.5],
    "optimizer.learning_rate": [0, 0.0, 1e30],
    "optimizer.milestone_factor": [0, 0.0, 1.5],
    "optimizer.milestones": [(0,), (20, 10), (1.5,), 10],
    "profile": ["3", "0:2", "1:", "1-2", "1:2:3", "a:b"],
    "seed": [2**32],
    "token_labels.teacher": [" "],
}


def kind_of(entry):
    """Returns the type of the values that an entry takes."""
    default = entry.default
    default = default.get() if isinstance(default, FieldReference) else default
    return type(default)


def values_for(key, entry):
    """Returns bad values of an entry, and good ones."""
    kind, rule = kind_of(entry), entry.valid
    bad = [*NONSENSE, *WRONG_KIND[kind], *WRONG.get(key, ())]
    good = list(RIGHT.get(key, ()))
    if isinstance(rule, ZeroOr):
        good, rule = [*good, 0], rule.rule
        bad += [rule.low / 2, -rule.low]
    if isinstance(rule, Number):
        good += [value for value in (rule.low, rule.high) if value is not None]
        good = [value for value in good if not (rule.above and value == rule.low)]
        good = [value for value in good if not (rule.below and value == rule.high)]
        bad += [rule.high * 2 + 1, rule.high + 1]
    if isinstance(rule, OneOf):
        good += rule.values
        bad += [rule.values[0] * 2, "", "Other"] if kind is str else []
    if isinstance(rule, Several) and rule.ascending:
        bad += [(1.0, 0.5), (0.5,), (0.1, 0.2, 0.3), (-1, 1), (0.5, INF), (10**12,) * 2, ("a", "b")]
    if kind is tuple:
        bad = [value for value in bad if value not in good]
    if isinstance(rule, Text | Form):
        bad += ["a\0"]
    if kind is dict:
        good += [{"a": None}]
    return bad, good


@pytest.mark.parametrize("task", TASKS)
def test_bad_values_of_every_entry_are_refused_and_good_ones_accepted(task, record_property):
    refused = accepted = 0
    for key, entry in entries_of(task).items():
        bad, good = values_for(key, entry)
        assert len(bad) >= 12
        for value in bad:
            with pytest.raises(UserError) as error:
                check(f"config.{key}", value, entry.valid)
                pytest.fail(f"config.{key} takes {value!r}")
            message = str(error.value)
            assert message.startswith(f"config.{key}=") and "; valid: " in message
            assert "\n" not in message and len(message) < 500
            refused += 1
        for value in good:
            check(f"config.{key}", value, entry.valid)
            accepted += 1
    record_property("refused", refused)
    record_property("accepted", accepted)
    assert refused > 1000 and accepted > 80


@pytest.mark.parametrize("task", TASKS)
def test_defaults_are_valid_and_values_of_a_config_are_checked_in_order(task):
    config = default_config(task)
    config.dataset = DATASETS[task]
    check_config(config)
    config.num_steps, config.batch_size = 0, 0
    with pytest.raises(UserError, match=r"^config\.batch_size=0 is not valid; valid: whole num"):
        check_values(config)
    config.batch_size = 8
    # The type of an entry is that of its default, but None, nan and 2.0 for 1 pass a ConfigDict.
    for key, value in {"num_steps": None, "augment.flip": NAN, "optimizer.b1": 2}.items():
        changed = default_config(task)
        changed.update_from_flattened_dict({key: value})
        with pytest.raises(UserError, match=f"^config.{key}=.* is not valid; valid: "):
            check_values(changed)


@pytest.mark.parametrize(
    "changes",
    [
        {"dataset": None}, {"dataset": ".x"}, {"data.classes": None}, {"data.split": NAN},
        {"task": None}, {"data.data_dir": ""},
    ],
    ids=str,
)  # fmt: skip
def test_what_a_task_is_made_from_is_checked_first(changes):
    config = default_config("classification")
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=f"^config.{next(iter(changes))}=.* is not valid; valid"):
        create_task(config)


@pytest.mark.parametrize("dataset", ["folder", "tfds:x"])
def test_home_of_an_unknown_user_is_no_folder(dataset):
    config = default_config("classification")
    config.dataset, config.data.data_dir = dataset, "~nobody_here/data"
    with pytest.raises(UserError, match="data_dir=~nobody_here/data"):
        create_task(config)


def test_choices_are_those_of_the_code():
    choices = {key: e.valid.values for key, e in entries_of("classification").items()
               if isinstance(e.valid, OneOf)}  # fmt: skip
    assert choices["in_channels"] == tuple(MODES)
    assert choices["data.normalization"] == tuple(NORMALIZATIONS)
    assert choices["data.eval_interpolation"] == tuple(INTERPOLATIONS)
    assert entries_of("segmentation")["head"].valid.values == tuple(HEADS)
    assert entries_of("pose")["head"].valid.values == tuple(POSE_HEADS)
    assert config_module.MIN_IMAGE_SIZE == CELL_SIZE


# ------------------------------------------------------------------------------------------------
# Values that change nothing
# ------------------------------------------------------------------------------------------------

# Entry that changes nothing by itself -> a value, and entries with which it has an effect. None: it
# has one by itself, but not with the entries below.
WITHOUT_EFFECT = {
    "initial.checkpoint": ("best", {"initial.workdir": "run"}),
    "optimizer.b2": (0.95, None),
    "optimizer.end_learning_rate": (1e-6, None),
    "optimizer.milestones": ((10, 20), {"optimizer.schedule": "step"}),
    "optimizer.milestone_factor": (
        0.2, {"optimizer.schedule": "step", "optimizer.milestones": (10, 20)}
    ),
    "optimizer.power": (0.9, {"optimizer.schedule": "polynomial"}),
    "optimizer.warmup_learning_rate": (1e-5, {"optimizer.warmup_steps": 10}),
    "auxiliary_weight": (0.2, {"head": "upernet"}),
    "augment.crop_ratio": ((0.5, 2.0), {"augment.crop_scale": (0.5, 1.0)}),
    "augment.randaugment.magnitude": (5.0, {"augment.randaugment.num_ops": 2}),
    "augment.randaugment.magnitude_std": (1.0, {"augment.randaugment.num_ops": 2}),
    "mix.probability": (0.5, {"mix.cutmix": 1.0}),
    "mix.switch_probability": (0.1, {"mix.cutmix": 1.0, "mix.mixup": 0.5}),
    "token_labels.teacher": ("run", {"token_labels.weight": 0.5}),
    "token_labels.files": ("labels", {"token_labels.weight": 0.5}),
    "token_labels.teacher_checkpoint": (
        "last", {"token_labels.weight": 0.5, "token_labels.teacher": "run"}
    ),
    "distillation.teacher": ("run", {"distillation.weight": 0.5}),
    "distillation.teacher_checkpoint": (
        "best", {"distillation.weight": 0.5, "distillation.teacher": "run"}
    ),
    "distillation.kind": ("soft", {"distillation.weight": 0.5, "distillation.teacher": "run"}),
    "distillation.temperature": (
        2.0,
        {"distillation.weight": 0.5, "distillation.teacher": "run", "distillation.kind": "soft"},
    ),
    "inference.stride": (16, {"image_size": 32, "data.eval_size": (64, 64)}),
    "augment.short_sides": ((160,), None),
    "augment.long_side": (320, None),
    "augment.detr_crop": (True, None),
    "inference.long_side": (800, {"inference.short_sides": (320, 480)}),
    "inference.min_sides": ((32, 0), {"inference.short_sides": (320, 480)}),
    "inference.max_sides": ((0, 96), {"inference.short_sides": (320, 480)}),
}  # fmt: skip

UNDONE_BY = {
    "optimizer.b2": {"optimizer.name": "sgd"},
    "optimizer.end_learning_rate": {"optimizer.schedule": "step"},
    "augment.short_sides": {"augment.jitter": (0.5, 2.0)},
    "augment.long_side": {"augment.jitter": (0.5, 2.0)},
    "augment.detr_crop": {"augment.jitter": (0.5, 2.0)},
}


def test_every_need_has_a_case():
    keys = {key for needs in (NEEDS, *(cls.needs for cls in TASKS.values())) for need in needs
            for key in need.keys}  # fmt: skip
    assert keys == set(WITHOUT_EFFECT)


@pytest.mark.parametrize("key", WITHOUT_EFFECT)
def test_value_that_changes_nothing_is_refused_when_training_starts(key):
    value, others = WITHOUT_EFFECT[key]
    for task in tasks_with(key):
        if not any(key in need.keys for need in (*NEEDS, *TASKS[task].needs)):
            continue  # the entry of this name always changes something in this task
        config = default_config(task)
        config.dataset = DATASETS[task]
        config.update_from_flattened_dict({key: value})
        if others is None:
            check_config(config)
            config.update_from_flattened_dict(UNDONE_BY[key])
        with pytest.raises(UserError) as error:
            check_config(config)
        assert str(error.value).startswith(f"config.{key}={value!r} changes nothing without ")
        assert "config." in str(error.value).split("without")[1]
        check_task(create_task(config), training=False)  # a run that exists can be evaluated
        if others is not None:
            config.update_from_flattened_dict(others)
            check_config(config)


def test_crop_of_a_dataset_without_crops_is_refused():
    config = default_config("classification")
    assert not create_task(config).info.center_crop
    config.data.eval_crop = 0.9
    with pytest.raises(UserError, match=r"eval_crop=0.9 changes nothing: config.dataset='digits'"):
        check_config(config)
    check_task(create_task(config), training=False)


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("classification", {"profile": "3:2"}, "profile='3:2' is not valid; valid: steps 'first"),
        ("classification", {"profile": "9:1001"}, "from 1 to config.num_steps=1000"),
        ("classification", {"optimizer.warmup_steps": 1000}, "warmup_steps=1000 must be below"),
        ("segmentation", {"inference.window": 300}, "do not fit into config.data.eval_size=(224,"),
        ("segmentation", {"inference.stride": 300}, "valid: up to the windows' 224 x 224 pixels"),
        ("depth", {"image_size": 240}, "image_size=240 x 240 is not valid: DPT needs height and"),
        (
            "depth",
            {"data.eval_size": (48, 64)},
            "eval_size=48 x 64 is not valid: DPT needs",
        ),
        ("depth", {"depth.limits": (2.0, 2.0)}, "no depth is between them; valid: (low, high)"),
        ("depth", {"model": "swin_t"}, "config.model='swin_t' is not valid: DPT reads blocks of"),
        ("pose", {"model": "vit_ti"}, "config.model='vit_ti' is not valid: heads for poses read"),
        ("pose", {"image_size": (250, 192)}, "(250, 192) is not valid; valid: height and width in"),
        (
            "pose",
            {"pose.part_weights": (1.0, 2.0)},
            "(1.0, 2.0) has 2 factors; valid: one for each of body, foot, face, left_hand, right",
        ),
    ],
)
def test_entries_that_do_not_go_together(task, changes, message):
    config = default_config(task)
    config.dataset = DATASETS[task]
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError) as error:
        check_config(config)
    assert message in str(error.value)


# ------------------------------------------------------------------------------------------------
# Entries of the other task
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "task, key, value",
    [
        ("segmentation", "augment.crop_scale", (0.5, 1.0)),
        ("segmentation", "augment.randaugment.num_ops", 2),
        ("segmentation", "augment.rotation", 10.0),
        ("depth", "augment.crop_scale", (0.5, 1.0)),
        ("classification", "depth.scale", 2.0),
        ("segmentation", "mix.mixup", 0.8),
        ("segmentation", "label_smoothing", 0.1),
        ("classification", "inference.stride", 32),
        ("classification", "inference.flip", True),
        ("segmentation", "token_labels.weight", 0.5),
        ("classification", "augment.scale_range", (0.5, 2.0)),
        ("classification", "augment.photometric", True),
        ("classification", "data.eval_size", (64, 64)),
    ],
)
def test_option_of_the_other_task_is_refused(task, key, value):
    config = default_config(task)
    with pytest.raises((KeyError, AttributeError)):
        config.update_from_flattened_dict({key: value})
    owners = tasks_with(key)
    assert owners and task not in owners
    assert all(key in entries_of(owner) for owner in owners)


def test_all_entries_are_described():
    entries = [entry for task in TASKS for entry in entries_of(task).values()]
    assert all(entry.meaning and str(entry.valid) for entry in entries)
    assert ENTRIES["data.on_corrupt"].text.endswith("(raise, skip)")
    described = [entry for entry in entries if not isinstance(entry.valid, Text | Group)]
    assert all(entry.text == f"{entry.meaning} ({entry.valid})" for entry in described)
