"""The commands on a run of a depth model: predict, export and expedite."""

import json

import jax
import numpy as np
import pytest
from make_task import make_task
from ml_collections import ConfigDict
from PIL import Image
from random_variables import random_variables

import tokenvit_jax as tv
from tokenvit_jax import expedite, predict
from tokenvit_jax.expediting import candidates, rivals, search
from tokenvit_jax.tasks import default_config
from tokenvit_jax.training.exporting import lower
from tokenvit_jax.training.new_run import write_run
from tokenvit_jax.training.workdir import read_config
from tokenvit_jax.weights.own import named_arrays

SIZE = 64


def tiny_config() -> ConfigDict:
    config = default_config("depth")
    config.model, config.dataset, config.image_size = "vit_ti", "depth_scenes", SIZE
    config.model_overrides = {
        "dim": 8, "depth": 2, "num_heads": 1, "patch_size": 8, "position_size": (SIZE, SIZE),
        "init_std": 0.3,
    }  # fmt: skip
    config.head_overrides = {"channels": 4, "last_channels": 4}
    config.depth.shift = 0.05
    config.data.depth_size = (128, 128)
    config.data.eval_batch_size = 100
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Returns the folder of a run with random variables, its task, model and variables."""
    workdir, task = tmp_path_factory.mktemp("depth") / "run", make_task(tiny_config())
    model = task.make_model()
    variables = random_variables(model, jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), np.float32))
    write_run(workdir, task.config, variables)
    return workdir, task, model, variables


def test_predict_writes_depth_of_any_size(run, trained, tmp_path):
    workdir, task, model, variables = trained
    pixels = np.random.default_rng(0).integers(256, size=(70, 130, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.new("L", (1, 1)).save(tmp_path / "b.png")
    flags = {"workdir": workdir, "images": tmp_path, "out": tmp_path / "out"}
    status, printed, err = run(predict, ("workdir", "images", "out"), **flags)
    assert (status, err) == (0, "")
    line, other = printed.splitlines()
    assert " m, median " in line and line.endswith(f"out/a_depth.png {tmp_path}/out/a_metres.png")
    assert other.startswith(f"{tmp_path}/b.png: ")
    # 64 x 128 pixels: 64 / 70 is nearer to 1 than 64 / 130.
    (depth,) = tv.load_run(workdir).predict(pixels)
    view = np.asarray(Image.fromarray(pixels).resize((112, 64), Image.Resampling.BICUBIC))
    coarse = jax.jit(model.apply)(variables, task.normalize(view[None]))[0]
    assert depth["depth"].shape == (70, 130) and depth["depth"].dtype == np.float32
    assert abs(np.median(depth["depth"]) / np.median(coarse) - 1) < 0.05
    with Image.open(tmp_path / "out" / "a_metres.png") as stored:
        values = np.asarray(stored)
    assert values.dtype == np.uint16
    np.testing.assert_allclose(values / 256, depth["depth"], atol=0.5 / 256 + 1e-4)
    row = json.loads((tmp_path / "out.json").read_text())[0]
    assert row["nearest"] <= row["median"] <= row["farthest"]
    np.testing.assert_allclose(row["median"], np.median(depth["depth"]), rtol=1e-4)


@pytest.mark.slow
def test_an_exported_model_gives_the_same_depth(trained):
    _, task, model, variables = trained
    pixels = np.random.default_rng(1).integers(256, size=(3, SIZE, SIZE, 3), dtype=np.uint8)
    direct = jax.jit(lambda variables, x: task.outputs(model, variables, task.normalize(x)))
    exported = jax.jit(lower(task, model, variables).call)
    found, expected = exported(named_arrays(variables), pixels), direct(variables, pixels)
    assert found.keys() == {"depth"} and found["depth"].shape == (3, SIZE, SIZE)
    np.testing.assert_allclose(found["depth"], expected["depth"], rtol=1e-4)


def test_features_are_the_taps(trained):
    workdir, _, model, _ = trained
    images = np.random.default_rng(2).integers(256, size=(1, SIZE, SIZE, 3), dtype=np.uint8)
    run = tv.load_run(workdir)
    found = run.features(images)
    assert [x.shape for x in found] == [(1, 8, 8, 8)] * 4
    assert len({x.tobytes() for x in map(np.asarray, found)}) == len(set(model.blocks))
    np.testing.assert_allclose(run.pooled(images), found[-1].mean((1, 2)), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_clustered_run_is_chosen(run, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(candidates, "FRACTIONS", (0.5,))
    monkeypatch.setattr(rivals, "REDUCERS", ())  # test_rivals.py has them
    monkeypatch.setattr(search, "FACTORS", (0.05,))
    workdir, faster = trained[0], tmp_path / "faster"
    flags = {"workdir": workdir, "out": faster, "budget": 0.995, "num_images": 2}
    status, printed, err = run(expedite, ("workdir", "budget"), **flags)
    assert status == 0, err
    setting = read_config(faster).model_overrides.expedite
    assert (setting.alpha, setting.beta, setting.where) == (1, 1, "blocks")
    assert "adaptive pooling" in printed and "<- chosen" in printed
