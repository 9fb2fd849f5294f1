"""Predictions and maps of a run that `load_run` loads."""

import dataclasses
import functools
import json
import re
from pathlib import Path

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
from tokenvit_jax.training.prediction import Table, predict_files

SMALL = {"dim": 8, "depth": 1, "num_heads": 1, "patch_size": 8, "position_size": (32, 32)}
HOST = {"classification": SMALL | {"depth": 2, "num_heads": 2}, "segmentation": SMALL}
DATASETS = {"classification": "digits", "segmentation": "scenes"}
PIXELS = np.random.default_rng(0).integers(256, size=(40, 50, 3), dtype=np.uint8)


def write(workdir, task):
    """Writes a run of a task with random variables."""
    config = default_config(task)
    config.model, config.model_overrides, config.dataset = "vit_ti", HOST[task], DATASETS[task]
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
    logits = jax.jit(model.apply)(variables, run.task.normalize(image[None]))
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
    apply = jax.jit(functools.partial(backbone.apply, method="features"))
    expected = apply(variables, normed)
    found = run.features(images)
    assert [x.shape for x in found] == [(1, 5, 7, 8)]
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def classifier(runs):
    return tv.load_run(runs["classification"][0])


def test_images_in_all_forms_give_the_same_vectors(classifier, tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    batch = classifier.preprocess([tmp_path / "a.png", PIXELS])
    assert (batch.shape, batch.dtype) == ((2, 32, 40, 3), np.float32)
    view = eval_image(Image.fromarray(PIXELS), (32, 40), 1.0)
    np.testing.assert_allclose(batch[0], classifier.task.normalize(view), atol=1e-6)
    apply = jax.jit(functools.partial(classifier.model.apply, method="pooled"))
    expected = apply(classifier.variables, batch)
    for images in ([tmp_path / "a.png", Image.fromarray(PIXELS)], batch, np.stack([view, view])):
        np.testing.assert_allclose(classifier.pooled(images), expected, atol=1e-5)
    np.testing.assert_allclose(classifier.pooled(PIXELS), expected[:1], atol=1e-5)
    np.testing.assert_allclose(
        classifier.features(batch)[0], classifier.features([PIXELS, PIXELS])[0], atol=1e-5
    )
    assert classifier.class_names == tuple("0123456789")


def test_pooled_features_of_a_segmentation_model_are_the_mean_of_its_last_map(runs):
    run = tv.load_run(runs["segmentation"][0])
    found, maps = run.pooled(PIXELS), run.features(PIXELS)
    assert run.class_names == run.task.info.classes
    np.testing.assert_allclose(found, maps[-1].mean((1, 2)), atol=1e-5)


def test_attention(classifier):
    found = classifier.attention([PIXELS, PIXELS])
    assert found.shape == (2, 2, 2, 21, 21)  # images, blocks, heads, 1 + 4 x 5 tokens
    attention = jax.jit(classifier.model.attention)
    expected = attention(classifier.variables, classifier.preprocess(PIXELS))
    np.testing.assert_allclose(found[0], np.stack(expected)[:, 0], atol=1e-5)
    reducer = {"keep": (5, 5), "method": "evit"}
    model = classifier.model.clone(token_reducer=reducer)
    reduced = dataclasses.replace(classifier, model=model).attention(PIXELS)
    assert [block.shape for block in reduced] == [(1, 2, 21, 21), (1, 2, 6, 6)]


def test_a_run_without_classes_predicts_features(classifier):
    info = dataclasses.replace(classifier.task.info, num_classes=0, classes=())
    run = dataclasses.replace(
        classifier,
        task=dataclasses.replace(classifier.task, info=info),
        model=classifier.model.clone(num_classes=0),
    )
    prediction = run.predictor(run.read(PIXELS))
    np.testing.assert_allclose(prediction.arrays["features"], classifier.pooled(PIXELS)[0], 1e-4)
    np.testing.assert_allclose(prediction.row["features"], prediction.arrays["features"], 1e-5)
    assert (prediction.text, prediction.draw("a")) == ("8 features", {})
    assert run.class_names == ()


def test_files_are_predicted_one_after_another(classifier, tmp_path):
    """Files that cannot be read do not keep the others from being predicted."""
    files = [tmp_path / name for name in ("$1_a$.png", "text.png", "b.png", "cut.png")]
    for file in files[::2]:
        Image.fromarray(PIXELS).save(file)
    files[1].write_bytes(b"no image")
    files[3].write_bytes(files[0].read_bytes()[:500])
    table, out = Table(tmp_path / "results" / "all.json"), tmp_path / "out"
    lines = predict_files(classifier, files, out, table, attention=True)
    first = next(lines)
    kinds = ("classes", "attention", "rollout")
    assert first.startswith(f"{files[0]}: ")
    assert first.endswith(" -> " + " ".join(f"{out}/$1_a$_{kind}.png" for kind in kinds))
    assert next(lines).startswith(f"{files[2]}: ")
    message = "--images: 2 of 4 cannot be read: .*text.png: cannot decode 8 bytes .*; .*cut.png: "
    with pytest.raises(UserError, match=message):
        next(lines)
    rows = json.loads(table.path.read_text())
    assert [row["image"] for row in rows] == [str(files[0]), str(files[2])]
    (expected,) = classifier.predict(PIXELS)
    for row, name in zip(rows, ("$1_a$", "b"), strict=True):
        assert list(row["probabilities"]) == list("0123456789")
        values = list(row["probabilities"].values())
        np.testing.assert_allclose(values, expected["probabilities"], 1e-4)
        assert row["class"] == str(expected["probabilities"].argmax())
        assert row["probability"] == max(row["probabilities"].values())
        assert row["pictures"] == {kind: f"../out/{name}_{kind}.png" for kind in kinds}


def test_the_code_of_the_documentation_runs(runs, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "python.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page.split("## Models and operators")[0], re.DOTALL)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "digits").symlink_to(runs["classification"][0])
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png"):
        Image.fromarray(PIXELS).save(name)
    names = {}
    for block in blocks:
        exec(block, names)
    assert names["results"][0]["probabilities"].shape == (10,)
    assert names["vectors"].shape == (2, 8) and names["maps"][0].shape == (2, 4, 5, 8)
    assert names["seen"].shape == (2, 4, 5)


def test_attention_that_cannot_be_drawn(classifier, tmp_path):
    expedite = {"alpha": 1, "beta": 1, "clusters": (2, 2)}
    run = dataclasses.replace(classifier, model=classifier.model.clone(expedite=expedite))
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    lines = predict_files(
        run, [tmp_path / "a.png"], tmp_path / "out", Table(tmp_path / "a.csv"), attention=True
    )
    message = "--attention: blocks attend among 5 and 21 tokens instead of 21; valid: a model with"
    with pytest.raises(UserError, match=message):
        list(lines)
    assert not (tmp_path / "out").exists() and not (tmp_path / "a.csv").exists()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda run: run.predict(PIXELS[..., :2]), "image is uint8(40, 50, 2); valid: uint8 (heig"),
        (lambda run: run.predict([PIXELS / 255]), "image is float64(40, 50, 3); valid: uint8"),
        (lambda run: run.predict("none.png"), "none.png: No such file or directory"),
        (
            lambda run: run.features(PIXELS[None, ..., :2]),
            "images are uint8(1, 40, 50, 2); valid: uin",
        ),
        (lambda run: run.pooled(PIXELS / 255), "image is float64(40, 50, 3); valid: uint8"),
        (lambda run: run.predict(PIXELS[..., 0]), "image is uint8(40, 50); valid: uint8 (height"),
        (lambda run: run.pooled(jax.numpy.asarray(PIXELS[..., :2])), "image is uint8(40, 50, 2); "),
        (lambda run: run.predict(3), "images is 3; valid: a path, a PIL image, a uint8 array"),
        (lambda run: run.pooled(PIXELS[None][:0]), "images are uint8(0, 40, 50, 3); valid: uint8"),
        (lambda run: run.pooled([]), "images is empty; valid: at least one image"),
    ],
)
def test_mistakes_are_named(classifier, call, message):
    with pytest.raises(UserError, match=re.escape(message)):
        call(classifier)


def test_missing_runs_are_named(tmp_path):
    with pytest.raises(UserError, match=r"holds no config\.json"):
        tv.load_run(tmp_path)
