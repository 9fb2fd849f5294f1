"""MixToken and token labels: the targets of a step, and their sources."""

import functools
import re

import jax
import numpy as np
import pytest
from make_task import check_config, make_task
from token_model import TokenModel, token_config, use_token_model, write_run

from tokenvit_jax.errors import UserError
from tokenvit_jax.tasks import default_config
from tokenvit_jax.tasks.classification import losses, teaching
from tokenvit_jax.tasks.classification.mixing import draw_token_mixing
from tokenvit_jax.training import devices, teacher
from tokenvit_jax.training.batches import check_train_batch
from tokenvit_jax.training.optimizer import make_optimizer
from tokenvit_jax.training.state import init_state, step_rng
from tokenvit_jax.training.step import make_train_step
from tokenvit_jax.training.workdir import write_config

NUM_CLASSES = 10
BATCH, GRID = 32, 3


def normalize(images, normalization):
    config = token_config()
    config.data.normalization = normalization
    return make_task(config).normalize(images)


def random_batch(seed=0):
    """Returns a batch whose token labels have the form of label files."""
    rng = np.random.default_rng(seed)
    cells = (BATCH, GRID, GRID)
    return {
        "image": rng.integers(0, 256, (BATCH, 96, 96, 3), dtype=np.uint8),
        "label": rng.integers(0, NUM_CLASSES, BATCH, dtype=np.int32),
        "skipped": np.zeros(BATCH, np.int32),
        "token_classes": rng.integers(0, NUM_CLASSES, (*cells, 8), dtype=np.int32),
        "token_scores": rng.dirichlet(np.ones(8), cells).astype(np.float32),
    }


def naive_labels(batch):
    labels = np.zeros((BATCH, GRID, GRID, NUM_CLASSES))
    for place in np.ndindex(batch["token_classes"].shape):
        labels[(*place[:3], batch["token_classes"][place])] += batch["token_scores"][place]
    return labels


def with_dense_labels(batch):
    sparse = ("token_classes", "token_scores")
    rest = {name: values for name, values in batch.items() if name not in sparse}
    return {**rest, "token_labels": naive_labels(batch).astype(np.float32)}


def naive_loss(params, batch, config, mixing):
    """Loss of one micro-batch, in float64, with loops over images and cells."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    pixels = np.asarray(normalize(batch["image"], "imagenet"), np.float64)
    targets = np.full((len(pixels), NUM_CLASSES), 0.1 / NUM_CLASSES)
    targets[np.arange(len(pixels)), batch["label"]] += 0.9
    cells = pixels.reshape(-1, GRID, 32, GRID, 32, 3).transpose(0, 1, 3, 2, 4, 5)
    kernel = params["patches"]["kernel"].reshape(-1, 6)
    tokens = cells.reshape(*cells.shape[:3], -1) @ kernel + params["patches"]["bias"]

    labels = batch["token_labels"]
    top, bottom, left, right = (0, 0, 0, 0) if mixing is None else map(int, mixing.box)
    own = 1 - (bottom - top) * (right - left) / GRID**2
    class_loss = token_loss = 0.0
    for i in range(len(pixels)):
        x, y = tokens[i].copy(), labels[i].copy()
        for row in range(top, bottom):
            for column in range(left, right):
                x[row, column] = tokens[i ^ 1, row, column]
                y[row, column] = labels[i ^ 1, row, column]
        x = np.tanh(x)
        target = own * targets[i] + (1 - own) * targets[i ^ 1]
        class_loss += naive_cross_entropy(x.mean((0, 1)), params["classifier"], target)
        for place in np.ndindex(GRID, GRID):
            token_loss += naive_cross_entropy(x[place], params["token_classifier"], y[place])
    count = len(pixels)
    return class_loss / count + config.token_labels.weight * token_loss / (count * GRID**2)


def naive_cross_entropy(x, layer, target):
    logits = x @ layer["kernel"] + layer["bias"]
    return -(target * (logits - np.log(np.exp(logits).sum()))).sum()


@functools.cache
def initial_state():
    config, model = token_config(), TokenModel(NUM_CLASSES)
    return jax.jit(functools.partial(init_state, model, make_optimizer(config), config))()


@pytest.mark.parametrize(
    ("mixtoken", "weight", "dense", "accumulate_steps"),
    [(1.0, 0.5, False, 1), (1.0, 0.7, True, 4), (1.0, 0.0, True, 1), (0.0, 0.5, False, 2)],
)
def test_loss_equals_loops(mixtoken, weight, dense, accumulate_steps):
    config = token_config()
    config.mix.mixtoken, config.token_labels.weight = mixtoken, weight
    config.accumulate_steps, config.label_smoothing = accumulate_steps, 0.1
    state = initial_state()
    # A seed whose box is neither empty nor the whole map; no other would reveal wrong mixing.
    for seed in range(99):
        mix_rng, _ = jax.random.split(step_rng(seed, state.step))
        mixing = draw_token_mixing(mix_rng, config.mix, GRID, GRID) if mixtoken else None
        if not mixtoken or 0.3 < float(mixing.ratio) < 0.9:
            break
    config.seed = seed
    batch = random_batch()
    dense_batch = with_dense_labels(batch)
    task, model = make_task(config), TokenModel(NUM_CLASSES)
    step = jax.jit(make_train_step(task, model, make_optimizer(config)))
    after, metrics = step(state, dense_batch if dense else batch)
    parts = [
        {name: values[j::accumulate_steps] for name, values in dense_batch.items()}
        for j in range(accumulate_steps)
    ]
    expected = np.mean([naive_loss(state.params, part, config, mixing) for part in parts])
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-5)
    moved = np.abs(after.params["token_classifier"]["bias"]).max()
    assert (moved > 1e-6) == (weight > 0)


def test_box_of_mixtoken_is_the_part_that_is_not_its_own():
    height, width = 7, 5
    config = token_config().mix
    config.mixtoken, config.probability = 1.0, 0.75
    draw = jax.jit(jax.vmap(lambda key: draw_token_mixing(key, config, height, width)))
    drawn = jax.tree.map(np.asarray, draw(jax.random.split(jax.random.key(0), 2000)))
    top, bottom, left, right = drawn.box.T
    assert (top >= 0).all() and (bottom <= height).all() and (bottom == height).any()
    assert (left >= 0).all() and (right <= width).all() and (right == width).any()
    area = (bottom - top) * (right - left)
    np.testing.assert_allclose(drawn.ratio, 1 - area / (height * width), rtol=1e-6)
    # Boxes smaller than a cell are also empty: the ratio is above 1 - (1 / 5)^2.
    empty = 0.25 + 0.75 * (1 / width) ** 2
    assert (area == 0).mean() == pytest.approx(empty, abs=0.03)
    assert {1, 2, 3} < set(bottom - top) and {1, 2, 3} < set(right - left)


def run_steps(parallel, config, num_steps=2):
    """Returns losses and the last parameters of a few steps on labelled batches."""
    model = TokenModel(NUM_CLASSES)
    optimizer = make_optimizer(config, model)
    task = make_task(config, axis_name=parallel.axis_name)
    put_batch = teacher.taught_batches(task, parallel)
    init_fn = functools.partial(init_state, model, optimizer, config)
    step = make_train_step(task, model, optimizer)
    step = parallel.train_step(step, parallel.abstract(init_fn))
    state, losses = parallel.init(init_fn), []
    for seed in range(num_steps):
        batch = random_batch(seed)
        batch = {k: batch[k] for k in ("image", "label", "skipped")}
        state, metrics = step(state, put_batch(batch, seed))
        losses.append(float(metrics["loss"]))
    return losses, jax.device_get(state.params)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    # The teacher has another normalisation than the students.
    workdir = tmp_path_factory.mktemp("teacher")
    return workdir, write_run(workdir, seed=1, normalization="inception")


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"mix.mixtoken": 1.0, "token_labels.weight": 0.5, "token_labels.teacher": "TEACHER"},
        {"mix.mixup": 0.8, "mix.cutmix": 1.0, "distillation.weight": 0.5,
         "distillation.teacher": "TEACHER", "distillation.kind": "soft",
         "distillation.temperature": 3.0, "optimizer.freeze": "patches"},
    ],
    ids=["token labels", "distillation"],
)  # fmt: skip
def test_taught_run_is_the_same_on_a_mesh_and_under_pmap(monkeypatch, workdir, changes):
    use_token_model(monkeypatch)
    config = token_config()
    config.accumulate_steps = 2
    config.update_from_flattened_dict(
        {key: str(workdir[0]) if value == "TEACHER" else value for key, value in changes.items()}
    )
    mesh = run_steps(devices.MeshParallel(fsdp=2), config)
    pmap = run_steps(devices.PmapParallel(), config)
    others = [pmap]
    if config.distillation.weight:  # MixToken mixes the images of a micro-batch
        config.accumulate_steps = 1
        others.append(run_steps(devices.MeshParallel(), config))
    for other in others:
        np.testing.assert_allclose(other[0], mesh[0], rtol=2e-5)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), other[1], mesh[1]
        )


def test_teacher_labels_the_images_it_is_given(monkeypatch, workdir):
    use_token_model(monkeypatch)
    config = token_config()
    config.token_labels.weight, config.token_labels.teacher = 0.5, str(workdir[0])
    images = random_batch()["image"]
    parallel = devices.MeshParallel()
    put_batch = teacher.taught_batches(make_task(config), parallel)
    batch = {"image": images, "label": np.zeros(BATCH, np.int32)}
    found = put_batch(batch, 0)["token_labels"]
    dense = TokenModel(NUM_CLASSES).apply(
        {"params": workdir[1]}, normalize(images, "inception"), method="dense_logits"
    )
    np.testing.assert_allclose(found, jax.nn.softmax(dense), rtol=1e-4, atol=1e-6)
    assert not found.sharding.is_fully_replicated
    untaught = teacher.taught_batches(make_task(token_config()), parallel)
    assert untaught(batch, 0).keys() == batch.keys()


def test_teacher_sees_the_mixed_images_of_the_step(monkeypatch, workdir):
    use_token_model(monkeypatch)
    config = token_config()
    config.mix.mixup, config.mix.cutmix = 0.8, 1.0
    config.distillation.weight, config.distillation.teacher = 0.5, str(workdir[0])
    task, given = make_task(config), random_batch()
    prepare = jax.jit(task.prepare)
    given = {name: given[name] for name in ("image", "label")}
    put_batch = teacher.taught_batches(task, devices.MeshParallel())
    apply = jax.jit(functools.partial(TokenModel(NUM_CLASSES).apply, {"params": workdir[1]}))
    found = []
    for step in range(2):
        rng = jax.random.split(step_rng(config.seed, step))[0]
        seen = np.asarray(prepare(given, rng)["image"], np.float64)
        seen = seen * [0.229, 0.224, 0.225] + [0.485, 0.456, 0.406]  # the student's normalisation
        logits = put_batch(given, step)["teacher_logits"]
        np.testing.assert_allclose(logits, apply((seen - 0.5) / 0.5), rtol=1e-4, atol=1e-5)
        found.append(np.asarray(logits))
    assert np.abs(found[0] - found[1]).max() > 1e-3


@pytest.mark.parametrize(("kind", "temperature"), [("hard", 1.0), ("soft", 3.0)])
def test_distillation_loss_equals_loops(kind, temperature):
    draw = np.random.default_rng(0)
    logits, taught, teacher_logits = draw.normal(size=(3, 4, 5)) * 2
    targets = draw.dirichlet(np.ones(5), 4)

    def log_softmax(x):
        return x - np.log(np.exp(x).sum())

    labels = distance = 0.0
    for i in range(4):
        labels -= (targets[i] * log_softmax(logits[i])).sum() / 4
        if kind == "hard":
            distance -= log_softmax(taught[i])[teacher_logits[i].argmax()] / 4
            continue
        theirs, ours = (log_softmax(x[i] / temperature) for x in (teacher_logits, taught))
        distance += temperature**2 * (np.exp(theirs) * (theirs - ours)).sum() / 4
    settings = default_config("classification").distillation
    settings.kind, settings.weight, settings.temperature = kind, 0.3, temperature
    found = losses.distillation_loss(logits, taught, targets, teacher_logits, settings)
    assert float(found) == pytest.approx(0.7 * labels + 0.3 * distance, rel=1e-5)


def test_labels_are_resized_to_the_grid_of_the_student():
    ramp = np.broadcast_to(np.arange(6.0)[:, None, None], (2, 6, 4, 1))
    found = teaching.resize_labels(np.concatenate([ramp, 1 - ramp], -1), 96, 64)
    assert found.shape == (2, 3, 2, 2)
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(found[:, 1, :, 0], 2.5, rtol=1e-5)
    assert (np.diff(found[..., 0], axis=1) > 1.5).all()


@pytest.mark.parametrize(
    ("changes", "num_classes", "message"),
    [
        ({}, 1000, "has 10 classes (digits), the student has 1000 (digits)"),
        ({"in_channels": 1}, 10, "sees images with 3 channels, the student sees config.in_channel"),
        (
            {"token_labels.teacher": "/nowhere"},
            10,
            "config.token_labels.teacher=/nowhere holds no config.json: ",
        ),
        ({"token_labels.teacher_checkpoint": "7"}, 10, "no checkpoint '7'"),
    ],
)
def test_teachers_that_do_not_fit(monkeypatch, workdir, changes, num_classes, message):
    use_token_model(monkeypatch)
    config = token_config()
    config.update_from_flattened_dict(
        {"token_labels.weight": 0.5, "token_labels.teacher": str(workdir[0])} | changes
    )
    with pytest.raises(UserError, match=re.escape(message)):
        teacher.taught_batches(make_task(config, num_classes), devices.MeshParallel())


@pytest.mark.parametrize(
    ("task", "dataset", "model"),
    [("classification", "digits", "deit_ti"), ("segmentation", "scenes", "swin_t")],
)
def test_teacher_without_logits_of_cells_is_named(tmp_path, task, dataset, model):
    config = default_config(task)
    config.dataset, config.model = dataset, model
    write_config(tmp_path, config)
    message = f"is a run of {model} for {task}, which does not classify single cells"
    with pytest.raises(UserError, match=message):
        teacher.load_teacher(tmp_path, "last", lambda task, model: teaching.cell_misfit(model))


LABELLED = {"token_labels.weight": 0.5, "token_labels.files": "labels"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mix.mixtoken": -1.0}, "config.mix.mixtoken=-1.0 is not valid; valid: 0, or num"),
        ({"token_labels.weight": -1.0}, "config.token_labels.weight=-1.0 is not valid"),
        ({"token_labels.weight": 0.5}, "token_labels.files, and none is given"),
        (LABELLED | {"token_labels.teacher": "run"}, "token_labels.files, and both are given"),
        ({"mix.mixtoken": 1.0, "mix.cutmix": 0.8}, "config.mix.cutmix=0.8 does not go with config"),
        ({"mix.mixtoken": 1.0, "image_size": (64, 32)}, "mixes nothing on the 2 x 1 cells"),
        (
            LABELLED | {"mix.mixup": 0.8},
            "config.mix.mixup=0.8 does not go with config.token_labels",
        ),
        (
            {"distillation.weight": 0.5},
            "missing: config.distillation.teacher, the workdir",
        ),
        ({"distillation.teacher": "run"}, "changes nothing without config.distillation.weight abo"),
        (
            {"distillation.kind": "warm"},
            "config.distillation.kind='warm' is not valid; valid",
        ),
        (
            {"distillation.temperature": 0.0},
            "config.distillation.temperature=0.0 is not valid",
        ),
        (
            {"distillation.weight": 0.5, "distillation.teacher": "run", "mix.mixtoken": 1.0},
            "config.mix.mixtoken=1.0 does not go with config.distillation.weight=0.5",
        ),
        (LABELLED | {"augment.rotation": 9.0}, "config.augment.rotation=9.0 does not go with"),
        (LABELLED | {"augment.translation": 0.1}, "config.augment.translation=0.1 does not go"),
    ],
)
def test_settings_that_do_not_fit(changes, message):
    config = token_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=re.escape(message)):
        check_config(config)


def test_settings_that_fit():
    config = token_config()
    config.update_from_flattened_dict(LABELLED | {"mix.mixtoken": 1.0})
    check_config(config)
    # Labels of a teacher follow any transform of the images.
    config.token_labels.files, config.token_labels.teacher = "", "run"
    config.augment.rotation = 9.0
    check_config(config)


def test_micro_batches_must_be_even():
    config = token_config()
    config.mix.mixtoken, config.batch_size, config.accumulate_steps = 1.0, 48, 2
    with pytest.raises(UserError, match="gives each of 8 devices x 2 accumulate_steps an odd"):
        check_train_batch(make_task(config))
    config.batch_size = 64
    check_train_batch(make_task(config))


def test_model_without_a_token_head_is_named():
    config = token_config()
    config.mix.mixtoken = 1.0
    for name in ("pale_t", "deit_ti"):
        config.model = name
        with pytest.raises(UserError, match="need a model with a token head"):
            make_task(config).make_model()


def test_sparse_labels_of_one_class_add_up():
    batch = {
        "token_classes": np.array([2, 0, 2]).reshape(1, 1, 1, 3),
        "token_scores": np.array([0.25, 0.5, 0.125], np.float32).reshape(1, 1, 1, 3),
    }
    found = losses.token_labels(batch, 4)
    np.testing.assert_allclose(found, np.array([0.5, 0, 0.375, 0]).reshape(1, 1, 1, 4))
