"""Predictions and maps of a run that `load_run` loads."""

import re

import jax
import numpy as np
import pytest
from make_task import make_task
from PIL import Image
from random_variables import random_variables

import tokenvit_jax as tv
from tokenvit_jax.data import eval_image
from tokenvit_jax.errors import UserError
from tokenvit_jax.tasks import default_config
from tokenvit_jax.training.new_run import write_run

HOST = {"dim": 8, "depth": 1, "num_heads": 1, "patch_size": 8, "position_size": (32, 32)}
DATASETS = {"classification": "digits", "segmentation": "scenes"}
PIXELS = np.random.default_rng(0).integers(256, size=(40, 50, 3), dtype=np.uint8)


def write(workdir, task):
    """Writes a run of a task with random variables."""
    config = default_config(task)
    config.model, config.model_overrides, config.dataset = "vit_ti", HOST, DATASETS[task]
    config.image_size = (32, 40)
    if task == "segmentation":
        config.head, config.data.eval_size = "linear", (32, 48)
    model = make_task(config).make_model()
    variables = random_variables(model, jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32))
    write_run(workdir, config, variables)
    return model, variables


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Workdirs, models and variables by task."""
    folder = tmp_path_factory.mktemp("runs")
    return {task: (folder / task, *write(folder / task, task)) for task in DATASETS}


def test_a_classifier_gives_probabilities(runs, tmp_path):
    workdir, model, variables = runs["classification"]
    run = tv.load_run(workdir)
    assert (run.config.task, run.step) == ("classification", 0)
    image = eval_image(Image.fromarray(PIXELS), (32, 40), 1.0)
    logits = model.apply(variables, run.task.normalize(image[None]), train=False)
    expected = jax.nn.softmax(logits)[0]
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    # One image or several, in any form.
    (alone,), several = (
        run.predict(str(tmp_path / "a.png")),
        run.predict([tmp_path / "a.png", PIXELS, Image.fromarray(PIXELS)]),
    )
    for found in (alone, *several, *run.predict(PIXELS), *run.predict(PIXELS[None])):
        assert found.keys() == {"probabilities"}
        np.testing.assert_allclose(found["probabilities"], expected, atol=1e-6)


def test_a_segmentation_model_gives_labels_of_the_size_of_the_image(runs):
    run = tv.load_run(str(runs["segmentation"][0]), checkpoint=0)
    (found,) = run.predict(PIXELS)
    assert found["labels"].shape == (40, 50) and found["labels"].dtype == np.uint8
    assert found["labels"].max() < 5 and len(np.unique(found["labels"])) > 1


@pytest.mark.parametrize("task", DATASETS)
def test_features_are_the_maps_of_the_backbone(runs, task):
    workdir, model, variables = runs[task]
    run = tv.load_run(workdir)
    images = PIXELS[None, :33]
    backbone = getattr(model, "backbone", model)
    if backbone is not model:
        variables = {"params": variables["params"]["backbone"]}
    normed = run.task.normalize(images)
    expected = backbone.apply(variables, normed, train=False, method="features")
    found = run.features(images)
    assert [x.shape for x in found] == [(1, 5, 7, 8)]
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda run: run.predict(PIXELS[..., :2]), "image is uint8(40, 50, 2); valid: uint8 (heig"),
        (lambda run: run.predict([PIXELS / 255]), "image is float64(40, 50, 3); valid: uint8"),
        (lambda run: run.predict("none.png"), "none.png: No such file or directory"),
        (lambda run: run.features(PIXELS), "images are uint8(40, 50, 3); valid: uint8 (batch, "),
    ],
)
def test_mistakes_are_named(runs, call, message):
    run = tv.load_run(runs["classification"][0])
    with pytest.raises(UserError, match=re.escape(message)):
        call(run)


def test_missing_runs_are_named(tmp_path):
    with pytest.raises(UserError, match=r"holds no config\.json"):
        tv.load_run(tmp_path)
