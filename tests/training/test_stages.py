"""The three stages of Token Pooling: a run, the search that starts from it, and the pooled one."""

import functools

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from make_task import make_task
from random_variables import random_state

from tokenvit_jax.errors import UserError
from tokenvit_jax.models.backbone import variable_shapes
from tokenvit_jax.models.reducers import searched_keep
from tokenvit_jax.tasks import default_config
from tokenvit_jax.tasks.classification import losses
from tokenvit_jax.training import devices
from tokenvit_jax.training.checkpoint import load_checkpoint
from tokenvit_jax.training.evaluation import evaluate_run
from tokenvit_jax.training.initial import (
    fit_variables,
    load_initial,
    start_from,
    with_searched_keep,
)
from tokenvit_jax.training.loop import train
from tokenvit_jax.training.optimizer import make_optimizer
from tokenvit_jax.training.state import init_state, step_rng
from tokenvit_jax.training.step import make_train_step
from tokenvit_jax.training.workdir import read_config

HOST = {
    "dim": 8, "depth": 2, "num_heads": 2, "mlp_ratio": 1, "patch_size": 16,
    "position_size": (48, 48),
}  # fmt: skip
BATCH_SIZE = 16


def stage(reducer=None, **host):
    config = default_config("classification")
    config.model, config.model_overrides = "deit_s", HOST | host
    if reducer:
        config.model_overrides.token_reducer = reducer
    config.image_size, config.batch_size, config.data.eval_batch_size = 48, BATCH_SIZE, 120
    config.num_steps, config.log_every_steps = 2, 1
    config.eval_every_steps = config.checkpoint_every_steps = 2
    return config


def search(penalty=0.5, factor=100.0):
    return stage({"method": "soft_extract", "penalty": penalty, "learning_rate_factor": factor})


def batch():
    draw = np.random.default_rng(0)
    return {
        "image": draw.integers(0, 256, (BATCH_SIZE, 48, 48, 3), np.uint8),
        "label": draw.integers(0, 10, BATCH_SIZE, np.int32),
        "skipped": np.zeros(BATCH_SIZE, np.int32),
    }


@functools.cache
def steps(factor, penalty=0.5, parallel=devices.MeshParallel):
    """Returns state, metrics and earlier state of two steps of a search on eight devices."""
    config, layout = search(penalty, factor), parallel()
    task = make_task(config, axis_name=layout.axis_name)
    model, optimizer = task.make_model(), make_optimizer(config)
    init_fn = functools.partial(init_state, model, optimizer, config)
    step = make_train_step(task, model, optimizer)
    step = layout.train_step(step, layout.abstract(init_fn))
    state, found = layout.init(init_fn), []
    for _ in range(2):
        before = jax.device_get(state)
        state, metrics = step(state, layout.put_batch(batch()))
        found.append((before, jax.device_get(state), jax.device_get(metrics)))
    return found


def retention(params):
    return np.stack([params[f"blocks_{i}"]["soft_extract"]["retention"] for i in range(2)])


def test_loss_grows_with_what_is_retained():
    """The loss grows by penalty times l times the sum over the 9 ranks of block l = 1, 2."""
    config, plain = search(), stage()
    apply = jax.jit(functools.partial(make_task(config).make_model().apply, train=True))
    for before, _, metrics in steps(100.0):
        _, model_rng = jax.random.split(step_rng(config.seed, before.step))
        images = (batch()["image"] / 255.0 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        rngs = dict(zip(("dropout", "routing"), jax.random.split(model_rng), strict=True))
        logits = apply({"params": before.params}, images, rngs=rngs)
        targets = losses.soft_targets(batch()["label"], 10, plain.label_smoothing)
        penalty = 0.5 * ([1, 2] @ retention(before.params).sum(1))
        expected = losses.cross_entropy(logits, targets) + penalty
        np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)


def test_retention_stays_between_0_and_1_and_moves_faster():
    (first, after, metrics), _ = steps(100.0)
    np.testing.assert_array_equal(retention(first.params), 1)
    np.testing.assert_allclose(metrics["retention/tokens"], retention(after.params).sum())
    # The learning rate is 1e-3 at first, and Adam's first step is as long.
    np.testing.assert_allclose(retention(after.params), 0.9, atol=1e-5)
    (_, fast, _), _ = steps(1e4)
    np.testing.assert_array_equal(retention(fast.params), 0)  # clipped
    kernel = lambda state: state.params["blocks_0"]["mlp"]["fc1"]["kernel"]  # noqa: E731
    np.testing.assert_allclose(kernel(fast), kernel(after), rtol=1e-5)


def pooled_step(parallel):
    """Returns loss and gradient norm of a step with a reducer that draws and clusters."""
    config = stage({"keep": (5,), "method": "weighted_kmedoids", "initial": "random"}, depth=1)
    config.model_overrides.drop_path = 0.2
    layout = parallel()
    task = make_task(config, axis_name=layout.axis_name)
    model, optimizer = task.make_model(), make_optimizer(config)
    init_fn = functools.partial(init_state, model, optimizer, config)
    state = layout.abstract(init_fn)
    step = layout.train_step(make_train_step(task, model, optimizer), state)
    places = jax.tree.map(lambda x: x.sharding, state)
    state = jax.device_put(random_state(model, optimizer, config), places)
    _, metrics = step(state, layout.put_batch(batch()))
    return float(metrics["loss"]), float(metrics["grad_norm"])


@pytest.mark.slow
def test_pmap_pools_like_the_mesh_and_like_one_device(monkeypatch):
    found = pooled_step(devices.PmapParallel)
    mesh = pooled_step(devices.MeshParallel)
    one = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp"))
    monkeypatch.setattr(jax, "make_mesh", lambda *args, **kwargs: one)
    alone = pooled_step(devices.MeshParallel)
    for other in (mesh, alone):
        np.testing.assert_allclose(found, other, rtol=2e-5)


@pytest.mark.slow
def test_pmap_searches_like_the_mesh():
    for found, expected in zip(
        steps(100.0, parallel=devices.PmapParallel), steps(100.0), strict=True
    ):
        np.testing.assert_allclose(found[2]["loss"], expected[2]["loss"], rtol=1e-5)
        np.testing.assert_allclose(
            retention(found[1].params), retention(expected[1].params), rtol=1e-5
        )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Workdirs of the three stages, two steps each, on the digits."""
    folder = tmp_path_factory.mktemp("stages")
    configs = {
        "base": stage(),
        "search": search(factor=300.0),
        "pooled": stage({"keep": (), "method": "weighted_kmedoids"}),
    }
    configs["search"].initial.workdir = str(folder / "base")
    configs["pooled"].initial.workdir = str(folder / "search")
    configs["pooled"].ema_decay = 0.5
    for name, config in configs.items():
        train(config, folder / name)
    return folder


@pytest.mark.slow
def test_stages_follow_each_other(runs):
    found = searched_keep(load_checkpoint(runs / "search").variables["params"])
    assert len(found) == 2 and max(found) < 9
    config = read_config(runs / "pooled")
    assert config.model_overrides.token_reducer.keep == found
    metrics = evaluate_run(runs / "pooled")
    assert metrics["step"] == 2 and 0 <= metrics["eval/accuracy"] <= 1


@pytest.mark.slow
def test_a_run_starts_with_the_parameters_of_another(runs):
    config = read_config(runs / "search")
    config.ema_decay = 0.5
    initial = load_initial(config)
    task = make_task(config)
    model, optimizer = task.make_model(), make_optimizer(config)
    parallel = devices.MeshParallel(fsdp=4)
    fresh = parallel.init(functools.partial(init_state, model, optimizer, config))
    layout = jax.tree.map(lambda x: x.sharding, fresh)
    state, notes = start_from(fresh, initial, task)
    assert notes == []
    assert jax.tree.map(lambda x: x.sharding, state) == layout
    np.testing.assert_array_equal(retention(state.params), 1)  # the first stage has none
    jax.tree.map(np.testing.assert_array_equal, state.ema["params"], state.params)
    for name in ("position", "class_token"):
        np.testing.assert_array_equal(state.params[name], initial.variables["params"][name])
    back = load_initial(read_config(runs / "pooled"))
    assert "soft_extract" in back.variables["params"]["blocks_0"]  # not in the third stage


def flat_shapes(config):
    """Returns the shapes of a model's variables by path."""
    images = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), "float32")
    return flatten_dict(variable_shapes(make_task(config).make_model(), images), sep="/")


@pytest.mark.slow
def test_a_segmentation_model_starts_from_a_classifier(runs):
    """The backbone is loaded; the classifier is dropped, and the head keeps its first values."""
    config = default_config("segmentation")
    config.model, config.model_overrides, config.image_size = "deit_s", HOST, 48
    config.dataset, config.head_overrides = "scenes", {"depth": 1, "head_dim": 8}
    config.initial.workdir = str(runs / "base")
    initial = load_initial(config)
    task = make_task(config)
    model, optimizer = task.make_model(), make_optimizer(config)
    shapes = jax.eval_shape(functools.partial(init_state, model, optimizer, config))
    fresh = jax.tree.map(lambda x: jax.device_put(np.full(x.shape, 7, x.dtype)), shapes)
    state, notes = start_from(fresh, initial, task)
    assert notes == [f"{initial.path} gives its backbone; the head of this model is new"]
    assert jax.tree.structure(state) == jax.tree.structure(fresh)
    jax.tree.map(np.testing.assert_array_equal, state.params["head"], fresh.params["head"])
    expected = {k: v for k, v in initial.variables["params"].items() if k != "classifier"}
    jax.tree.map(np.testing.assert_array_equal, state.params["backbone"], expected)

    # Other tables of positions are resized.
    config.model_overrides.position_size = (64, 64)
    found, notes = fit_variables(initial, flat_shapes(config), make_task(config))
    assert notes[1:] == [f"tables of {initial.path} are resized: position (10, 8) to (17, 8)"]
    position = initial.variables["params"]["position"]
    np.testing.assert_array_equal(found["params/backbone/position"][0], position[0])
    expected = jax.image.resize(position[1:].reshape(3, 3, 8), (4, 4, 8), "bicubic")
    np.testing.assert_allclose(
        found["params/backbone/position"][1:], expected.reshape(16, 8), rtol=1e-5, atol=1e-7
    )


@pytest.mark.slow
def test_mistakes_are_named(runs, tmp_path):
    config = stage({"keep": (), "method": "kmeans"})
    with pytest.raises(
        UserError, match=r"keep=\(\) takes the numbers that a search found, but config.initial"
    ):
        with_searched_keep(config, None)
    config.initial.workdir = str(runs / "base")
    with pytest.raises(
        UserError, match=r"config.initial.workdir='.*base' was no search; valid: the"
    ):
        with_searched_keep(config, load_initial(config))
    config.initial.workdir = str(tmp_path)
    with pytest.raises(UserError, match=r"config.initial.workdir=.*holds no checkpoints"):
        load_initial(config)
    config.initial.workdir, config.initial.checkpoint = str(runs / "base"), "7"
    with pytest.raises(UserError, match=r"config.initial.workdir=.*no checkpoint '7'"):
        load_initial(config)
    config.initial.checkpoint = "last"
    wider = stage(dim=16)
    with pytest.raises(UserError, match=r"entries differ: .*params/class_token is \(1, 8\) there"):
        fit_variables(load_initial(config), flat_shapes(wider), make_task(wider))
    config = stage({"keep": (3, 2), "method": "kmeans", "penalty": 0.1})
    message = r"token_reducer.penalty=0.1 is not valid; valid: 0.0 with method='kmeans'"
    with pytest.raises(UserError, match=message):
        make_task(config).make_model()


def test_given_numbers_are_not_searched():
    config = stage({"keep": (3, 2), "method": "kmeans"})
    assert with_searched_keep(config, None) is config


def test_reducer_that_is_not_valid_is_left_to_the_model():
    for reducer in (3, "tome", {"method": "none"}):
        config = stage()
        config.model_overrides.token_reducer = reducer
        assert with_searched_keep(config, None) is config
    config, resumed = stage({"keep": (), "method": "kmeans"}), stage()
    resumed.model_overrides.token_reducer = None
    with pytest.raises(UserError, match="no search"):
        with_searched_keep(config, None, resumed)
