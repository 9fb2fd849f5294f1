"""Training from another run: other classes, sizes and channels; layer decay and freezing."""

import dataclasses
import functools
import json
import re
import shutil
import sys
import types

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from make_task import check_config, make_task
from sampled import sampled
from small_model import NUM_CLASSES, SmallModel, random_batch, small_config

from tokenvit_jax.data import datasets
from tokenvit_jax.data.datasets import digits
from tokenvit_jax.errors import UserError
from tokenvit_jax.models.backbone import variable_shapes
from tokenvit_jax.tasks import create_task, default_config
from tokenvit_jax.tasks.classification import losses
from tokenvit_jax.training.checkpoint import load_checkpoint
from tokenvit_jax.training.initial import Initial, fit_variables, with_initial_settings
from tokenvit_jax.training.loop import train
from tokenvit_jax.training.new_run import write_run
from tokenvit_jax.training.optimizer import learning_rate_factors, make_optimizer
from tokenvit_jax.training.state import init_state
from tokenvit_jax.training.step import make_train_step
from tokenvit_jax.training.workdir import check_same_run, read_config, write_config
from tokenvit_jax.weights.channels import adapt_channels

PYRAMID = {"dims": (8, 8, 16, 16), "num_heads": (2, 2, 2, 2), "depths": (1, 2, 0, 1)}
OVERRIDES = {
    "vit_ti": {"dim": 8, "depth": 2, "num_heads": 2, "patch_size": 16, "position_size": (32, 32)},
    "dgt_t": PYRAMID | {"stem_dim": 8, "head_dim": 8},
    "clustr_t": PYRAMID,
    "pale_t": PYRAMID | {"position": "ape", "position_size": (64, 32)},
    "swin_t": PYRAMID | {"window_size": 4},
    "swinv2_t": PYRAMID | {"window_size": 4},
}


def config_of(model, **overrides):
    config = default_config("classification")
    config.model, config.model_overrides = model, OVERRIDES[model] | overrides
    config.image_size = 32
    return config


def shapes_of(task):
    """Returns the shapes of a model's variables by path."""
    size = (1, task.config.image_size, task.config.image_size, 3)
    images = jax.ShapeDtypeStruct(size, "float32")
    return flatten_dict(variable_shapes(task.make_model(), images), sep="/")


def run_of(task):
    """Returns a run with random variables, and its variables by path."""
    draw = np.random.default_rng(0)
    flat = {
        name: draw.normal(size=leaf.shape).astype(np.float32)
        for name, leaf in shapes_of(task).items()
    }
    return Initial("RUN", unflatten_dict(flat, sep="/"), task), flat


# ------------------------------------------------------------------------------------------------
# What another run gives
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", sampled(["vit_ti", "dgt_t"]))
def test_all_is_taken_but_the_classifier_of_other_classes(model):
    task = make_task(config_of(model))
    initial, theirs = run_of(make_task(config_of(model), 7))
    found, notes = fit_variables(initial, shapes_of(task), task)
    assert theirs.keys() - found.keys() == {"params/classifier/kernel", "params/classifier/bias"}
    assert all(found[name] is theirs[name] for name in found)
    assert notes == [
        "RUN has other classes (7 of digits, here 10 of digits): all is taken but classifier (new)"
    ]


@pytest.mark.parametrize(
    ("theirs", "ours", "same"),
    [
        (("a", "b"), ("a", "b"), True),
        (("a", "b"), ("b", "a"), False),
        (("a", "b"), None, True),
        (("a", "b"), ("class 0", "class 1"), True),
        (("a", "b", "c"), ("a", "b"), False),
    ],
)
def test_classes_are_compared_by_name(theirs, ours, same):
    infos = [
        dataclasses.replace(digits.INFO, num_classes=len(names or "ab"), classes=names)
        for names in (theirs, ours)
    ]
    assert infos[0].same_classes(infos[1]) == infos[1].same_classes(infos[0]) == same


def test_windows_are_resized_and_offset_0_stays_in_the_middle():
    task = make_task(config_of("swin_t", window_size=7))
    initial, theirs = run_of(make_task(config_of("swin_t")))
    found, notes = fit_variables(initial, shapes_of(task), task)
    name = "params/stages_1_1/attention/relative_position_bias"
    assert found[name].shape == (13, 13, 2)
    np.testing.assert_allclose(found[name][6, 6], theirs[name][3, 3], rtol=1e-5)
    assert notes == [
        "tables of RUN are resized: relative_position_bias (7, 7, 2) to (13, 13, 2) (4 times)"
    ]
    ours = make_task(config_of("swinv2_t", window_size=7))
    initial, theirs = run_of(make_task(config_of("swinv2_t")))
    found, notes = fit_variables(initial, shapes_of(ours), ours)
    assert found.keys() == theirs.keys() and notes == []  # an MLP gives the biases


def test_positions_of_another_grid_are_resized_even_to_equal_shapes():
    ours = make_task(config_of("pale_t", position_size=(32, 64)))
    initial, theirs = run_of(make_task(config_of("pale_t")))
    found, notes = fit_variables(initial, shapes_of(ours), ours)
    assert found["params/embeddings_0/layers_1/position"].shape == (8, 16, 8)
    assert len(notes) == 1 and "position (8, 4, 8) to (4, 8, 8), position (16, 8, 8)" in notes[0]
    ours = make_task(config_of("vit_ti", position_size=(64, 16)))  # 4 x 1 patches, not 2 x 2
    initial, theirs = run_of(make_task(config_of("vit_ti")))
    found, _ = fit_variables(initial, shapes_of(ours), ours)
    position = theirs["params/position"]
    grid = position[1:].reshape(2, 2, 8)
    expected = jax.image.resize(grid, (4, 1, 8), "bicubic").reshape(4, 8)
    np.testing.assert_allclose(found["params/position"][1:], expected, rtol=1e-5, atol=1e-6)


def test_first_layer_of_rgb_weights_is_adapted():
    kernel = np.random.default_rng(0).normal(size=(4, 4, 3, 8)).astype(np.float32)
    np.testing.assert_allclose(adapt_channels(kernel, 1)[..., 0, :], kernel.sum(2), rtol=1e-5)
    four = adapt_channels(kernel, 4)
    np.testing.assert_array_equal(four[:, :, :3], kernel)
    assert not four[:, :, 3].any() and four.dtype == np.float32
    task = make_task(config_of("vit_ti"))
    initial, theirs = run_of(task)
    ours = shapes_of(task)
    ours["params/patches/kernel"] = jax.ShapeDtypeStruct((16, 16, 4, 8), "float32")
    found, notes = fit_variables(initial, ours, task)
    expected = adapt_channels(theirs["params/patches/kernel"], 4)
    np.testing.assert_array_equal(found["params/patches/kernel"], expected)
    assert notes == ["patches/kernel of RUN is adapted from 3 to 4 channels"]


@pytest.mark.parametrize("model", sampled(["vit_b_r50", "vit_ti"], keep=(1,)))
def test_depth_starts_from_a_classifier_and_the_other_way_round(model):
    """DPT reads blocks: it has no last LayerNorm."""
    stem = {"first": 8, "widths": (8, 8, 8), "depths": (1, 1, 1), "num_groups": 4}
    settings = OVERRIDES["vit_ti"] | ({"stem": stem} if model == "vit_b_r50" else {})
    tasks = []
    for name, dataset in (("classification", "digits"), ("depth", "depth_scenes")):
        config = default_config(name)
        config.model, config.model_overrides, config.dataset = model, settings, dataset
        tasks.append(make_task(config))
    classifier, depth = tasks
    initial, theirs = run_of(classifier)
    found, notes = fit_variables(initial, shapes_of(depth), depth)
    norm = {f"params/norm/{name}" for name in ("scale", "bias")}
    left = {name for name in theirs if "classifier" in name} | norm
    assert {name.replace("/", "/backbone/", 1) for name in theirs.keys() - left} == found.keys()
    assert any("gives its backbone; the head of this model is new" in note for note in notes)
    initial, _ = run_of(depth)
    found, _ = fit_variables(initial, shapes_of(classifier), classifier)
    assert found.keys() == theirs.keys() - left


def test_a_run_of_another_family_or_with_other_settings_is_named():
    initial, _ = run_of(make_task(config_of("vit_ti")))
    other = make_task(config_of("swin_t"))
    with pytest.raises(UserError, match="RUN is a run of a VisionTransformer, this model is a Sw"):
        fit_variables(initial, shapes_of(other), other)
    config = config_of("vit_ti", num_heads=4, drop_path=0.1)
    config.data.normalization = "inception"
    task = make_task(config)
    _, notes = fit_variables(initial, shapes_of(task), task)
    assert notes == [
        "RUN has other settings: num_heads is 2 there, 4 here; "
        "data.normalization is imagenet there, inception here"
    ]


def test_settings_of_the_network_come_from_the_other_run():
    source = config_of("vit_ti", pool="mean", drop_path=0.3)
    config = config_of("vit_ti")
    config.model_overrides = {"drop_path": 0.1, "dim": 4}
    assert with_initial_settings(config, source) is config  # it does not start from a run
    config.initial.workdir = "RUN"
    found = with_initial_settings(config, source).model_overrides.to_dict()
    assert found == OVERRIDES["vit_ti"] | {"pool": "mean", "drop_path": 0.1, "dim": 4}
    source.model = "vit_s"
    assert with_initial_settings(config, source) is config


# ------------------------------------------------------------------------------------------------
# Layers
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sampled(OVERRIDES, keep=("vit_ti", "swin_t")))
def test_layers_are_counted_from_the_images_to_the_head(name):
    task = make_task(config_of(name))
    model, paths = task.make_model(), shapes_of(task)
    layers = {}
    for path in paths:
        path = path.partition("/")[2]
        layers.setdefault(path.split("/")[0], set()).add(model.layer_of(path))
        assert not model.is_head(path) or model.layer_of(path) == model.num_layers - 1
    assert all(len(found) == 1 for found in layers.values())
    layers = {module: found.pop() for module, found in layers.items()}
    assert set(layers.values()) == set(range(model.num_layers))
    if name == "vit_ti":
        expected = {"patches": 0, "position": 0, "class_token": 0, "blocks_0": 1, "blocks_1": 2}
        assert layers == expected | {"norm": 3, "classifier": 3}
    else:
        assert layers.pop("first_layers", 0) == 0
        expected = {"embeddings_0": 0, "stages_0_0": 1, "embeddings_1": 1, "stages_1_0": 2}
        expected |= {"stages_1_1": 3, "embeddings_2": 3, "embeddings_3": 3, "stages_3_0": 4}
        heads = {key: layers.pop(key) for key in [*layers] if model.is_head(key)}
        assert set(heads.values()) == {5}
        norms = {"norms_0": 1, "norms_1": 3, "norms_2": 3, "norms_3": 4}
        assert layers == expected | (norms if name == "clustr_t" else {})


def test_layer_decay_multiplies_the_factors_of_the_model():
    search = {"method": "soft_extract", "learning_rate_factor": 10.0}
    config = config_of("vit_ti", token_reducer=search)
    task = make_task(config)
    params = unflatten_dict(shapes_of(task), sep="/")["params"]
    config.optimizer.layer_decay = 0.5
    found = learning_rate_factors(config, task.make_model(), params)
    assert found["position"] == 0.5**3 and found["classifier"]["bias"] == found["norm"]["bias"] == 1
    assert found["blocks_1"]["norm1"]["scale"] == 0.5
    assert found["blocks_1"]["soft_extract"]["retention"] == 5.0
    segmenter = default_config("segmentation")
    segmenter.dataset, segmenter.image_size = "scenes", 32
    segmenter.model, segmenter.model_overrides = "vit_ti", OVERRIDES["vit_ti"]
    segmenter.head_overrides, segmenter.optimizer.layer_decay = {"depth": 1, "head_dim": 8}, 0.5
    task = create_task(segmenter)
    params = unflatten_dict(shapes_of(task), sep="/")["params"]
    found = learning_rate_factors(segmenter, task.make_model(), params)
    assert found["backbone"]["blocks_0"]["norm1"]["scale"] == 0.25
    assert set(jax.tree.leaves(found["head"])) == {1.0}
    segmenter.optimizer.layer_decay, segmenter.optimizer.backbone_factor = 1.0, 0.1
    found = learning_rate_factors(segmenter, task.make_model(), params)
    assert set(jax.tree.leaves(found["backbone"])) == {0.1}
    assert set(jax.tree.leaves(found["head"])) == {1.0}


@pytest.mark.parametrize("value", [0.0, 1.5])
def test_layer_decay_that_is_refused(value):
    config = config_of("vit_ti")
    config.optimizer.layer_decay = value
    with pytest.raises(UserError, match=r"config.optimizer.layer_decay=.* is not valid; valid:"):
        check_config(config)


# ------------------------------------------------------------------------------------------------
# Freezing
# ------------------------------------------------------------------------------------------------


def frozen_step(freeze, **entries):
    """Returns the states around a step of the small model, its metrics and its batch."""
    config = small_config()
    config.optimizer.freeze, config.ema_decay, config.optimizer.weight_decay = freeze, 0.5, 0.5
    config.update_from_flattened_dict(entries)
    model = SmallModel(drop_path=0.0)
    optimizer = make_optimizer(config, model)
    before = jax.jit(functools.partial(init_state, model, optimizer, config))()
    mean = before.model_state["batch_stats"]["norm"]["mean"]
    before.model_state["batch_stats"]["norm"]["mean"] = mean + 0.3
    step = jax.jit(make_train_step(make_task(config, NUM_CLASSES), model, optimizer))
    after, metrics = step(before, batch := random_batch(0))
    return before, after, metrics, batch


def test_what_is_frozen_neither_moves_nor_has_state_of_the_optimizer():
    before, after, metrics, batch = frozen_step("patches, norm,atten*")
    moved = jax.tree.map(
        lambda a, b: bool((a != b).any()),
        *({"params": x.params, **x.model_state} for x in (before, after)),
    )
    moved = {name for name, found in flatten_dict(moved, sep="/").items() if found}
    assert moved == {"params/head/kernel", "params/head/bias"}
    same = flatten_dict(jax.tree.map(lambda a, b: (a == b).all(), before.ema, after.ema), sep="/")
    assert all(same[name] for name in same.keys() - moved if not name.startswith("batch_stats"))
    head = sorted(x.shape for x in jax.tree.leaves(before.params["head"]))
    states = [x.shape for x in jax.tree.leaves(after.opt_state) if x.ndim]
    assert sorted(states) == sorted(2 * head)  # the two moments of Adam
    # Frozen norms normalise as in evaluation.
    task, variables = make_task(small_config(), NUM_CLASSES), {"params": before.params}
    images = task.normalize(batch["image"])
    model = SmallModel(drop_path=0.0)
    logits = jax.jit(functools.partial(model.apply, train=False))(
        variables | before.model_state, images
    )
    targets = losses.soft_targets(batch["label"], NUM_CLASSES, 0.0)
    expected = losses.cross_entropy(logits, targets)
    assert float(metrics["loss"]) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        (
            "patches,hed",
            "freeze='hed' matches no parameter; valid: attention, backbone, head, ",
        ),
        ("*", "config.optimizer.freeze='*' leaves no parameter to train; there are: attention"),
    ],
)
def test_patterns_that_are_refused(freeze, message):
    config = small_config()
    config.optimizer.freeze = freeze
    model = SmallModel()
    init = functools.partial(init_state, model, make_optimizer(config, model), config)
    with pytest.raises(UserError, match=re.escape(message)):
        jax.eval_shape(init)


# ------------------------------------------------------------------------------------------------
# Distillation
# ------------------------------------------------------------------------------------------------


def test_both_classifiers_of_a_distilled_model_learn_from_their_own_side():
    config = config_of("vit_ti", distilled=True, depth=1)
    config.distillation.weight, config.distillation.teacher = 1.0, "RUN"
    task = make_task(config)
    model, (initial, _) = task.make_model(), run_of(task)
    draw = np.random.default_rng(0)
    images = draw.normal(size=(4, 32, 32, 3)).astype(np.float32)
    inputs = {
        "image": images,
        "targets": np.eye(10, dtype=np.float32)[[1, 2, 3, 4]],
        "teacher_logits": draw.normal(size=(4, 10)).astype(np.float32),
    }
    rngs = dict.fromkeys(("batch", "dropout", "routing", "sample"), jax.random.key(0))

    @jax.jit
    def both(params):
        loss, grads = jax.value_and_grad(
            lambda params: task.loss(model, params, {}, inputs, rngs)[0]
        )(params)
        pair = model.apply({"params": params}, images, train=False, method="distillation_logits")
        return loss, grads, pair, model.apply({"params": params}, images, train=False)

    loss, grads, (ours, taught), mean = both(initial.variables["params"])
    np.testing.assert_allclose((ours + taught) / 2, mean, rtol=1e-5, atol=1e-6)
    labels = np.eye(10)[inputs["teacher_logits"].argmax(-1)]
    assert float(loss) == pytest.approx(float(losses.cross_entropy(taught, labels)), rel=1e-5)
    assert np.abs(grads["classifier"]["kernel"]).max() == 0
    assert np.abs(grads["distillation_classifier"]["kernel"]).max() > 1e-3


# ------------------------------------------------------------------------------------------------
# A run
# ------------------------------------------------------------------------------------------------


def test_runs_that_lack_new_entries_are_read_and_go_on(tmp_path, caplog):
    config = config_of("vit_ti")
    write_config(tmp_path, config)
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["digest"]
    del stored["distillation"], stored["optimizer"]["freeze"], stored["optimizer"]["layer_decay"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert read_config(tmp_path).to_dict() == config.to_dict()
    check_same_run(tmp_path, config, steps_done=0)
    assert caplog.text == ""
    for key, value in (("optimizer.freeze", "norm"), ("ema_decay", 0.5)):
        other = config.copy_and_resolve_references()
        other.update_from_flattened_dict({key: value})
        with pytest.raises(UserError, match=f"holds a run with config.{key}=.* now it is"):
            check_same_run(tmp_path, other, steps_done=0)
    distilled = config.copy_and_resolve_references()
    distilled.model_overrides.distilled = True
    name = "config.model_overrides.distilled"
    with pytest.raises(UserError, match=f"a run without {name}, now it is True"):
        check_same_run(tmp_path, distilled, steps_done=0)
    write_config(tmp_path, distilled)
    with pytest.raises(UserError, match=f"a run with {name}=True, now it is not set"):
        check_same_run(tmp_path, config, steps_done=0)


class LowDigits(digits.DigitsSource):
    """The digits, in five classes of two digits each."""

    def read(self, index):
        record = super().read(index)
        return {**record, "label": record["label"] // 2}


@pytest.fixture
def pairs(monkeypatch):
    """Registers a dataset with other classes."""
    info = dataclasses.replace(digits.INFO, name="pairs", num_classes=5, classes=tuple("abcde"))
    module = types.SimpleNamespace(INFO=info, open_split=lambda _, split: LowDigits(split))
    monkeypatch.setitem(sys.modules, "tokenvit_jax.data.datasets.pairs", module)
    monkeypatch.setattr(datasets, "NAMES", (*datasets.NAMES, "pairs"))


@pytest.mark.slow
def test_a_linear_probe_on_other_classes_goes_on_without_the_run_it_started_from(
    pairs, tmp_path, capsys
):
    first = config_of("vit_ti")
    initial, _ = run_of(create_task(first))
    write_run(tmp_path / "first", first, initial.variables)
    config = config_of("vit_ti")
    config.model_overrides = {}  # from the first run
    config.dataset, config.initial.workdir = "pairs", str(tmp_path / "first")
    config.batch_size, config.data.eval_batch_size = 8, 120
    config.optimizer.freeze, config.num_steps, config.log_every_steps = "backbone", 2, 1
    train(config, tmp_path / "second")
    said = capsys.readouterr().out
    assert "all is taken but classifier (new)" in said
    assert read_config(tmp_path / "second").model_overrides.dim == 8

    shutil.rmtree(tmp_path / "first")
    config.num_steps = 3
    train(config, tmp_path / "second")
    found = load_checkpoint(tmp_path / "second")
    assert found.step == 3
    params = found.variables["params"]
    for name in params.keys() - {"classifier"}:
        jax.tree.map(np.testing.assert_array_equal, params[name], initial.variables["params"][name])

    config.num_steps = 1
    with pytest.raises(UserError, match=r"num_steps=1 is below the 3 steps that the run in .* has"):
        train(config, tmp_path / "second")
    assert read_config(tmp_path / "second").num_steps == 3
    config.num_steps, config.optimizer.name = 4, "sgd"
    with pytest.raises(UserError, match=r"config.optimizer.name='adamw', now it is 'sgd'"):
        train(config, tmp_path / "second")
