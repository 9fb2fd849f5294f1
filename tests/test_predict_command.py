"""Predictions of a checkpoint: numbers, pictures, messages."""

import copy
import functools
import json
import shutil
import sys

import jax
import numpy as np
import optax
import pytest
from make_task import make_task
from ml_collections import ConfigDict
from PIL import Image

from tokenvit_jax import cli, predict
from tokenvit_jax.data import builtin_info, eval_image, read_image
from tokenvit_jax.data.dense_transforms import fit_image, pad
from tokenvit_jax.pictures.label_maps import class_shares
from tokenvit_jax.pictures.tokens import finest_routing
from tokenvit_jax.tasks import default_config
from tokenvit_jax.tasks.segmentation.inference import predict_logits
from tokenvit_jax.training import prediction
from tokenvit_jax.training.checkpoint import Checkpoints
from tokenvit_jax.training.run import load_run
from tokenvit_jax.training.state import init_state
from tokenvit_jax.training.workdir import write_config

OVERRIDES = {
    "stem_dim": 4, "dims": (8, 8, 8, 8), "num_heads": (1, 1, 1, 1), "depths": (1, 1, 1, 1),
    "mlp_ratio": 1, "head_dim": 8, "num_groups": 3, "top_k": 5,
}  # fmt: skip
# 4 clusters of 64 tokens in one block, all tokens in another.
CLUSTR_OVERRIDES = {
    "dims": (8, 8, 16, 16), "num_heads": (2, 2, 2, 2), "depths": (1, 0, 0, 1),
    "mlp_ratios": (2, 2, 2, 2), "ratios": ((16,), (1,), (1,), (1,)),
}  # fmt: skip
# 2 x 2 superpixels of 4 x 4 patches.
SEGMENTER_OVERRIDES = {
    "dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 1, "patch_size": 8,
    "position_size": (32, 32), "init_std": 0.5,
    "expedite": {"alpha": 1, "beta": 1, "clusters": (2, 2)},
}  # fmt: skip


def tiny_config(model="dgt_t", overrides=OVERRIDES, task="classification"):
    config = default_config(task)
    config.image_size = 32
    config.model = model
    config.model_overrides = ConfigDict(overrides)
    return config


def scenes_config():
    """A Segmenter whose windows see a part of the image."""
    config = tiny_config("vit_ti", SEGMENTER_OVERRIDES, "segmentation")
    config.dataset = "scenes"
    config.head_overrides = {"depth": 1, "head_dim": 8}
    config.data.eval_size = (32, 48)
    config.inference.stride = 8
    return config


def initial_state(config):
    model = make_task(config).make_model()
    return jax.jit(lambda: init_state(model, optax.sgd(0.1), config))()


def write_run(workdir, config, state):
    """Writes a run with a checkpoint of this state."""
    write_config(workdir, config)
    score = make_task(config).score
    with Checkpoints(workdir, keep_last=1, keep_best=0, score=score) as checkpoints:
        checkpoints.save(1, state, {})


@pytest.fixture(scope="module")
def state():
    return initial_state(tiny_config())


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, state):
    workdir = tmp_path_factory.mktemp("run")
    write_run(workdir, tiny_config(), state)
    return workdir


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two image files with the same name in two folders."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        (folder / name).mkdir()
        pixels = rng.integers(256, size=(40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name / "a.png")
    return [folder / name / "a.png" for name in ("one", "two")]


def run(monkeypatch, capsys, **args):
    argv = ["predict", *(f"--{name}={value}" for name, value in args.items())]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as exit_info:
        cli.run(predict.main, copy.deepcopy(predict.FLAGS), required=("workdir", "images", "out"))
    output = capsys.readouterr()
    return exit_info.value.code, output.out, output.err


def test_command(monkeypatch, capsys, tmp_path, workdir, images):
    out = tmp_path / "new" / "pictures"
    folder = images[0].parent.parent
    status, printed, _ = run(monkeypatch, capsys, workdir=workdir, images=folder, out=out)
    assert status == 0
    # The files have the same name: their pictures must not.
    written = [f"a_{place}_{kind}.png" for place in (1, 2) for kind in ("classes", "groups")]
    assert sorted(path.name for path in out.iterdir()) == written
    for path in out.iterdir():
        assert np.asarray(Image.open(path).convert("RGB")).std() > 10
    lines = printed.splitlines()
    assert len(lines) == 2
    for place, (line, file) in enumerate(zip(lines, images, strict=True), start=1):
        assert line.startswith(f"{file}: ")
        assert line.endswith(f"{out}/a_{place}_classes.png {out}/a_{place}_groups.png")
        assert line.count("%") == 5
    rows = json.loads((tmp_path / "new" / "pictures.json").read_text())
    assert [row["image"] for row in rows] == [str(file) for file in images]
    for row, line in zip(rows, lines, strict=True):
        assert f": {row['class']} {row['probability']:.1%}, " in line
        assert (tmp_path / "new" / row["pictures"]["groups"]).exists()


def test_numbers_are_those_of_the_model(workdir, state, images):
    task = make_task(tiny_config())
    image = eval_image(read_image(images[0]), 32, 1.0)
    prediction = load_run(workdir).predictor(read_image(images[0]))
    probabilities = prediction.arrays["probabilities"]
    _, classes, noted = prediction.draw.args
    routing = finest_routing(jax.device_get(noted), image.shape[:2])

    model = task.make_model()
    apply = functools.partial(model.apply, train=False, mutable=["intermediates"])
    variables = {"params": state.params, **state.model_state}
    logits, sown = jax.jit(apply)(variables, task.normalize(image[None]))
    np.testing.assert_allclose(probabilities, jax.nn.softmax(logits)[0], atol=1e-5)
    groups = sown["intermediates"]["stages_0_0"]["attention"]["groups"][0]
    assert routing.grid == (8, 8)
    assert np.mean(routing.groups == groups) > 0.9  # near ties may fall the other way

    assert classes[0] == (str(np.argmax(probabilities)), float(probabilities.max()))
    assert [p for _, p in classes] == sorted(probabilities.tolist(), reverse=True)
    assert prediction.text.split(", ")[4] == f"{classes[4][0]} {classes[4][1]:.1%}"


def test_dense_attention_has_no_picture_of_groups(monkeypatch, capsys, tmp_path, workdir, images):
    run_of_dense = tmp_path / "run"
    shutil.copytree(workdir, run_of_dense)
    config = json.loads((run_of_dense / "config.json").read_text())
    config["model_overrides"]["top_k"] = 64
    del config["digest"]
    (run_of_dense / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    status, _, _ = run(monkeypatch, capsys, workdir=run_of_dense, images=images[0], out=out)
    assert status == 0
    assert [path.name for path in out.iterdir()] == ["a_classes.png"]


@pytest.mark.slow
def test_clusters_have_a_picture(monkeypatch, capsys, tmp_path, images):
    config = tiny_config("clustr_t", CLUSTR_OVERRIDES)
    write_run(tmp_path, config, initial_state(config))
    out = tmp_path / "out"
    status, printed, _ = run(monkeypatch, capsys, workdir=tmp_path, images=images[0], out=out)
    assert status == 0
    assert printed.endswith(f" -> {out}/a_classes.png {out}/a_clusters.png\n")
    assert np.asarray(Image.open(out / "a_clusters.png").convert("RGB")).std() > 10


def test_label_maps_and_superpixels(monkeypatch, capsys, tmp_path, images):
    config = scenes_config()
    state = initial_state(config)
    write_run(tmp_path, config, state)
    out = tmp_path / "out"
    status, printed, _ = run(monkeypatch, capsys, workdir=tmp_path, images=images[0], out=out)
    assert status == 0
    kinds = ("segmentation", "labels", "superpixels")
    assert printed.endswith(" -> " + " ".join(f"{out}/a_{kind}.png" for kind in kinds) + "\n")
    for kind in ("segmentation", "superpixels"):
        assert np.asarray(Image.open(out / f"a_{kind}.png").convert("RGB")).std() > 10

    # The image has 40 x 50 pixels, 32 x 40 of them are seen.
    task = make_task(config)
    model = task.make_model()
    pixels = fit_image(Image.open(images[0]), 32, 32, 48)
    buffer = task.normalize(pad(pixels, (32, 48, 3), (124, 116, 104))[None])
    variables, size = {"params": state.params}, np.array([pixels.shape[:2]])
    apply = functools.partial(predict_logits, model, config)
    logits = jax.jit(apply)(variables, buffer, size)[0, :32, :40]
    logits = jax.image.resize(logits, (40, 50, 5), "bilinear", antialias=False)
    with Image.open(out / "a_labels.png") as labels:
        assert labels.mode == "P"
        labels = np.asarray(labels)
    assert len(np.unique(labels)) > 1
    assert np.mean(labels == logits.argmax(-1)) > 0.99  # near ties may fall the other way
    label, part = class_shares(labels)[0]
    name = builtin_info("scenes").classes[label]
    assert printed.startswith(f"{images[0]}: {name} {part:.1%}, ")
    (row,) = json.loads((tmp_path / "out.json").read_text())
    assert list(row["shares"]) == list(builtin_info("scenes").classes)
    np.testing.assert_allclose(row["shares"][name], part, rtol=1e-5)
    assert row["pictures"]["labels"] == "out/a_labels.png"

    # At half its size, the image is smaller than a window.
    scales = {"config.inference.scales": "(0.5, 1.0)"}
    args = {"workdir": tmp_path, "images": images[0], "out": tmp_path / "other"}
    status, printed, err = run(monkeypatch, capsys, **args, **scales)
    assert (status, printed, len(err.splitlines())) == (1, "", 1)
    assert err.startswith("error: config.inference.scales=(0.5, 1.0) is not valid: at 0.5, images")
    assert not (tmp_path / "other").exists()


def test_entries_of_the_run_can_be_changed(monkeypatch, capsys, tmp_path, workdir, images):
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(prediction, "predict_files", lambda run, *_, **__: seen.append(run) or ())
        args = {"workdir": workdir, "images": images[0], "out": tmp_path / "out"}
        changes = {"config.data.eval_crop": 0.5, "config.data.eval_interpolation": "bilinear"}
        for changed in ({}, changes):
            assert run(monkeypatch, capsys, **args, **changed)[::2] == (0, "")
    before, after = (run.config.data.to_dict() for run in seen)
    assert after == before | {"eval_crop": 0.5, "eval_interpolation": "bilinear"}
    for key, value, status, message in (
        ("data.eval_crop", 2, 1, "config.data.eval_crop=2.0 is not valid; valid: numbers from"),
        ("data.eval_crop", "a", 2, "--config.data.eval_crop=a is not valid; valid: numbers from"),
        ("data.eval_crops", 1, 2, "--config.data.eval_crops is not a key of the configuration"),
    ):
        found, printed, err = run(monkeypatch, capsys, **args, **{f"config.{key}": value})
        assert (found, printed, len(err.splitlines())) == (status, "", 1)
        assert message in err


def test_classes_without_names():
    names = make_task(tiny_config(), num_classes=1000).class_names()
    assert list(names) == [f"class {label}" for label in range(1000)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.png", None, "missing.png: No such file or directory"),
        ("text.jpg", b"no image", "text.jpg: cannot decode 8 bytes as an image"),
    ],
)
def test_unreadable_image(monkeypatch, capsys, tmp_path, workdir, name, content, message):
    if content:
        (tmp_path / name).write_bytes(content)
    status, printed, err = run(
        monkeypatch, capsys, workdir=workdir, images=tmp_path / name, out=tmp_path / "out"
    )
    assert (status, printed, len(err.splitlines())) == (1, "", 1)
    assert message in err
    assert not (tmp_path / "out").exists()


def test_truncated_image(monkeypatch, capsys, tmp_path, workdir, images):
    file = tmp_path / "cut.png"
    file.write_bytes(images[0].read_bytes()[:1000])
    status, _, err = run(monkeypatch, capsys, workdir=workdir, images=file, out=tmp_path / "out")
    assert (status, len(err.splitlines())) == (1, 1)
    assert "cut.png: cannot decode 1000 bytes as an image" in err


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        ({"workdir": "nowhere"}, 1, "--workdir=nowhere holds no config.json"),
        ({"checkpoint": "77"}, 1, "no checkpoint '77' in "),
        ({"images": "*.none"}, 1, "--images: *.none: the pattern holds no image"),
        ({"results": "a.txt"}, 1, "--results=a.txt is not valid; valid: a file NAME.json or NAME"),
        ({"out": __file__}, 1, f"--out={__file__} is a file; valid: a folder"),
        ({"images": ""}, 2, "--images= is empty; images to predict"),
        ({"images": None}, 2, "--images is missing"),
    ],
)
def test_mistakes(monkeypatch, capsys, tmp_path, workdir, images, args, status, message):
    args = {"workdir": workdir, "images": images[0], "out": tmp_path / "out"} | args
    given = {name: value for name, value in args.items() if value is not None}
    found, printed, err = run(monkeypatch, capsys, **given)
    assert (found, printed, len(err.splitlines())) == (status, "", 1)
    assert message in err


def test_workdir_without_checkpoints(monkeypatch, capsys, tmp_path, images):
    write_config(tmp_path, tiny_config())
    status, _, err = run(
        monkeypatch, capsys, workdir=tmp_path, images=images[0], out=tmp_path / "out"
    )
    assert (status, err) == (1, f"error: --workdir={tmp_path} holds no checkpoints\n")
