"""Exported runs: any number of images, without this package; weights with our own names."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from full_disk import largest_file
from make_task import make_task
from random_variables import random_variables
from safetensors.numpy import save_file
from sampled import sampled

import tokenvit_jax as tv
from tokenvit_jax import convert, export
from tokenvit_jax.errors import UserError
from tokenvit_jax.tasks import default_config
from tokenvit_jax.training.exporting import lower
from tokenvit_jax.training.new_run import write_run
from tokenvit_jax.weights.own import named_arrays, write_own

PAGE = Path(__file__).parent.parent / "docs" / "export.md"
SIZE = 32
HOST = {"dim": 8, "depth": 2, "num_heads": 1, "patch_size": 8, "position_size": (SIZE, SIZE)}
HOST |= {"qk_norm": "learned"}  # with a scalar among the parameters
STAGES = {"dims": (8, 8, 16, 16), "num_heads": (2, 2, 2, 2), "depths": (1, 0, 0, 0)}
POOLED = {"token_reducer": {"method": "weighted_kmedoids", "keep": (9, 9), "carry": True}}
EXPEDITED = {"expedite": {"alpha": 1, "beta": 1, "clusters": (2, 3), "neighbors": 2}}
# One of every family; the vit is in the runs below.
FAMILIES = {
    "deit_ti": HOST | POOLED,
    "swin_t": STAGES | {"window_size": 4},
    "swinv2_t": STAGES | {"window_size": 4},
    "dgt_t": STAGES | {"stem_dim": 8, "num_groups": 4, "top_k": 8, "head_dim": 4},
    "clustr_t": STAGES,
    "pale_t": STAGES,
}
TASKS = {"classification": "digits", "segmentation": "scenes"}
PIXELS = np.random.default_rng(0).integers(256, size=(3, SIZE, SIZE, 3), dtype=np.uint8)


def tiny_task(model, settings, task="classification"):
    config = default_config(task)
    config.model, config.model_overrides, config.dataset = model, settings, TASKS[task]
    config.image_size = SIZE
    if task == "segmentation":
        config.head_overrides = {"depth": 1, "head_dim": 8}
    task = make_task(config)
    model = task.make_model()
    variables = random_variables(model, jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), np.float32))
    # Variances are positive.
    return (
        task,
        model,
        {
            name: tree if name == "params" else jax.tree.map(abs, tree)
            for name, tree in variables.items()
        },
    )


def direct_outputs(task, model, variables):
    """Returns the outputs for `PIXELS` without an export."""
    run = jax.jit(lambda variables, x: task.outputs(model, variables, task.normalize(x)))
    return run(variables, PIXELS)


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name].dtype == x.dtype
        np.testing.assert_allclose(found[name], x, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Workdirs by task, and the outputs of their models."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    for name in TASKS:
        settings = HOST | (EXPEDITED if name == "segmentation" else {})
        task, model, variables = tiny_task("vit_ti", settings, name)
        write_run(folder / name, task.config, variables)
        found[name] = folder / name, direct_outputs(task, model, variables)
    return found


def run_export(run, **flags):
    return run(export, ("workdir", "out"), **flags)


def run_own(run, **flags):
    return run(convert, ("source", "out"), layout="own", **flags)


def test_every_family_has_a_case():
    family = lambda name: name.split("_")[0]  # noqa: E731
    assert set(map(family, FAMILIES)) | {"vit"} == set(map(family, tv.list_models()))


@pytest.mark.parametrize("name", sampled(FAMILIES))
def test_every_family_exports_for_any_number_of_images(name):
    task, model, variables = tiny_task(name, FAMILIES[name])
    exported = lower(task, model, variables)
    call = jax.jit(exported.call)
    expected = direct_outputs(task, model, variables)
    assert not np.isnan(expected["logits"]).any()
    assert_close(call(named_arrays(variables), PIXELS), expected)
    alone = call(named_arrays(variables), PIXELS[:1])
    assert_close(alone, {name: x[:1] for name, x in expected.items()})


def test_a_model_without_classes_gives_features():
    task, model, variables = tiny_task("vit_ti", HOST)
    task = dataclasses.replace(task, info=dataclasses.replace(task.info, num_classes=0))
    found = jax.eval_shape(lambda x: task.outputs(model, variables, x), PIXELS.astype(np.float32))
    assert found.keys() == {"features"}


# ------------------------------------------------------------------------------------------------
# The folder
# ------------------------------------------------------------------------------------------------


def test_three_lines_load_it_without_this_package(run, tmp_path, runs):
    lines = re.search(r"Three lines.*?```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    assert len(list(filter(None, lines.split("\n")))) == 3
    script = ["import sys, numpy", "sys.modules.update(tokenvit_jax=None, flax=None)"]
    np.save(tmp_path / "images.npy", PIXELS)
    for name, (workdir, _) in runs.items():
        out = tmp_path / name
        found = run_export(run, workdir=workdir, out=out)
        assert found == (0, f"{workdir} -> {out}\n", "")
        script += [
            f"images = numpy.load({str(tmp_path / 'images.npy')!r})",
            lines.replace("exported/", f"{out}/"),
            f"numpy.savez({str(tmp_path / f'{name}.npz')!r}, **outputs)",
            f"weights = safetensors.numpy.load_file({str(out / 'weights.safetensors')!r})",
            "alone, first = (x['logits'] for x in (model(weights, images[:1]), outputs))",
            "numpy.testing.assert_allclose(alone[0], first[0], rtol=1e-5, atol=1e-5)",
        ]
    subprocess.run([sys.executable, "-c", "\n".join(script)], check=True, cwd=tmp_path)
    for name, (_, expected) in runs.items():
        assert_close(dict(np.load(tmp_path / f"{name}.npz")), expected)

    about = json.loads((tmp_path / "segmentation" / "export.json").read_text())
    assert about["images"] == {"shape": ["batch", SIZE, SIZE, 3], "dtype": "uint8"}
    assert about["outputs"]["labels"] == {"shape": ["batch", SIZE, SIZE], "dtype": "uint8"}
    assert about["outputs"]["logits"]["shape"] == ["batch", SIZE, SIZE, len(about["class_names"])]
    assert about["platforms"] == ["cpu", "cuda", "tpu"]
    assert (about["model"], about["step"]) == ("vit_ti", 0)
    for file in (tmp_path / "segmentation").iterdir():
        assert str(Path(tv.__file__).parent).encode() not in file.read_bytes(), file


def test_mistakes_are_named_and_leave_nothing(run, tmp_path, runs):
    workdir, _ = runs["classification"]
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.iterdir())

    def error(workdir=workdir, **flags):
        status, out, err = run_export(run, workdir=workdir, **flags)
        assert (status, out, err.count("\n")) == (1, "", 1)
        return err

    for taken in (tmp_path, tmp_path / "file", tmp_path / "link"):
        assert error(out=taken) == (
            f"error: --out={taken} exists already; valid: a path where nothing exists, or an empty "
            "folder\n"
        )
    inside = tmp_path / "file" / "model"
    assert (
        error(out=inside)
        == f"error: --out={inside} cannot be written: {inside.parent} is not a folder\n"
    )
    assert "--out=/proc/model cannot be written: no file can be made in /proc (" in error(
        out="/proc/model"
    )
    assert "no checkpoint '7'" in error(out=tmp_path / "new", checkpoint=7)
    assert "holds no config.json" in error(workdir=tmp_path / "no", out=tmp_path / "new")
    assert sorted(tmp_path.iterdir()) == before


def test_a_full_disk_is_one_line_and_leaves_nothing(run, tmp_path, runs):
    workdir, _ = runs["classification"]
    commands = {
        "export/model.jax": (export, ("workdir", "out"), {"workdir": workdir}),
        "own.safetensors": (convert, ("source", "out"), {"source": workdir, "layout": "own"}),
    }
    for name, (command, required, flags) in commands.items():
        out = tmp_path / name.split("/")[0]
        with largest_file(1000):
            status, _, err = run(command, required, out=out, **flags)
        assert (status, err.count("\n")) == (1, 1)
        assert f"{tmp_path / name} cannot be written: " in err and "too large" in err
    loaded = tv.load_run(workdir)
    with largest_file(1000), pytest.raises(UserError, match=f"{tmp_path}/run/.* cannot be written"):
        write_run(tmp_path / "run", loaded.config, loaded.variables)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------
# Weights with our own names
# ------------------------------------------------------------------------------------------------


def test_a_run_becomes_a_file_and_a_run_again(run, tmp_path, runs):
    workdir, _ = runs["segmentation"]
    file, again = tmp_path / "own.safetensors", tmp_path / "again"
    assert run_own(run, source=workdir, out=file)[0] == 0
    flags = {"layout": "auto", "source": file, "out": again}
    assert run(convert, ("source", "out"), **flags)[0] == 0
    first, second = tv.load_run(workdir), tv.load_run(again)
    assert second.config.to_dict() == first.config.to_dict()
    jax.tree.map(np.testing.assert_array_equal, second.variables, first.variables)


def test_files_that_are_no_run_are_named(run, tmp_path, runs):
    workdir, _ = runs["classification"]

    def error(**flags):
        status, out, err = run_own(run, **flags)
        assert (status, out, err.count("\n")) == (1, "", 1)
        return err

    (tmp_path / "text").write_text("text")
    assert "is not a readable safetensors file" in error(
        source=tmp_path / "text", out=tmp_path / "a"
    )
    assert "no such file or folder" in error(source=tmp_path / "no", out=tmp_path / "a")
    array = {"params/x": np.zeros(2, np.float32)}
    save_file(array, tmp_path / "foreign")
    assert "does not name its model" in error(source=tmp_path / "foreign", out=tmp_path / "a")
    save_file(array, tmp_path / "bare", metadata={"tokenvit_jax": "{}"})
    assert "holds no configuration" in error(source=tmp_path / "bare", out=tmp_path / "a")
    config = json.loads((workdir / "config.json").read_text())
    write_own(tmp_path / "other", {"params": {"x": np.zeros(2)}}, {"config": config})
    assert "belongs to another model" in error(source=tmp_path / "other", out=tmp_path / "a")
    about = json.dumps({"config": {"task": "classification", "seed": "x"}})
    save_file(array, tmp_path / "damaged", metadata={"tokenvit_jax": about})
    assert "damaged: entry 'seed' is 'x'; valid: such as 0" in error(
        source=tmp_path / "damaged", out=tmp_path / "a"
    )
    variables = tv.load_run(workdir).variables
    variables["params"]["position"][0] = np.nan
    write_own(tmp_path / "nan", variables, {"config": config})
    assert "params/position has values" in error(source=tmp_path / "nan", out=tmp_path / "a")
    assert "exists already" in error(source=workdir, out=tmp_path / "text")
    assert "--out=/proc/x cannot be written" in error(source=workdir, out="/proc/x")
    assert not (tmp_path / "a").exists()
