"""The command that clusters the tokens of a run within a budget."""

import copy
import sys

import jax
import numpy as np
import pytest
from make_task import make_task
from PIL import Image
from random_variables import random_variables
from timings import without_timings

from tokenvit_jax import cli, expedite
from tokenvit_jax.data import read_image
from tokenvit_jax.expediting import candidates, rivals
from tokenvit_jax.expediting.search import FACTORS
from tokenvit_jax.expediting.similarity import Comparison
from tokenvit_jax.models.expedite import Expedite
from tokenvit_jax.tasks import default_config
from tokenvit_jax.training import evaluation, expedite_run
from tokenvit_jax.training.evaluation import evaluate_run
from tokenvit_jax.training.new_run import write_run
from tokenvit_jax.training.workdir import read_config, write_config

SETTINGS = {"dim": 16, "depth": 3, "num_heads": 2, "patch_size": 4, "position_size": (32, 32)}


def tiny_config(task="classification", **entries):
    config = default_config(task)
    config.model, config.model_overrides = "deit_ti", dict(SETTINGS)
    config.image_size = 32
    config.data.eval_batch_size = 120
    config.update(entries)
    return config


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command; returns its exit status, output and errors."""

    def run_command(**flags):
        argv = ["expedite", *(f"--{name}={value}" for name, value in flags.items())]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as exit_info:
            cli.run(expedite.main, copy.deepcopy(expedite.FLAGS), required=("workdir", "budget"))
        output = capsys.readouterr()
        return exit_info.value.code, output.out, output.err

    return run_command


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


def test_a_run_is_written_that_is_evaluated_as_with_the_setting_by_hand(run, tmp_path, monkeypatch):
    monkeypatch.setattr(candidates, "FRACTIONS", (0.4, 0.7))
    monkeypatch.setattr(rivals, "REDUCERS", ())  # test_rivals.py has them
    config = tiny_config()
    config.data.normalization = "inception"
    config.ema_decay = 0.9
    variables = random_variables(
        make_task(config).make_model(), jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    )
    plain, faster, plot = tmp_path / "plain", tmp_path / "faster", tmp_path / "front.png"
    write_run(plain, config, variables)

    flags = {"workdir": plain, "out": faster, "plot": plot, "budget": 0.75, "num_images": 3}
    status, printed, err = run(**flags)
    assert status == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    lines = printed.splitlines()
    at = lines.index(" MACs  similarity  method")
    assert lines[-1] == f"{plain} -> {faster}"
    names = [line.split(": ")[0].split("  ")[-1] for line in lines[at + 1 : -2]]
    assert names[0] == "expedite" and "adaptive pooling" in names
    assert lines[-2].startswith("better than expedite (0.")
    header, *rows = lines[1:at]
    assert header.split() == ["MACs", "alpha", "beta", "clusters", "reconstructs", "similarity"]
    rows = [row.split() for row in rows]
    costs, similarities = ([float(row[i]) for row in rows] for i in (0, 5))
    assert costs == sorted(costs) and similarities == sorted(similarities)
    assert rows[[cost <= 0.75 for cost in costs].count(True) - 1][6:] == ["<-", "chosen"]
    (chosen,) = [row for row in rows if row[6:]]

    found = read_config(faster)
    assert found.dataset == "digits" and found.data.normalization == "inception"
    setting = found.model_overrides.expedite
    rows_and_columns = "x".join(map(str, setting.clusters))
    written = [str(setting.alpha), str(setting.beta), rows_and_columns, setting.where]
    assert chosen[1:5] == written
    distance = Comparison(
        make_task(config).make_model(),
        variables,
        expedite_run.load_images(make_task(config), None, 3),
    ).distance(setting.alpha)
    factors = [setting.temperature / distance / factor for factor in FACTORS]
    assert min(abs(np.log(factors))) < 0.005
    below = f"warning: similarity {float(chosen[5]):.4f} is below 0.9"
    assert err.startswith(below) if float(chosen[5]) < 0.9 else err == ""

    by_hand = config.copy_and_resolve_references()
    by_hand.model_overrides = {**SETTINGS, "expedite": setting.to_dict()}
    by_hand_metrics = without_timings(evaluate_run(plain, config=by_hand))
    assert without_timings(evaluate_run(faster, config=found)) == by_hand_metrics


def test_evaluate_measures_the_temperature(tmp_path, monkeypatch):
    config = tiny_config()
    task = make_task(config)
    variables = random_variables(
        task.make_model(), jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    )
    write_run(tmp_path, config, variables)
    evaluated = []
    monkeypatch.setattr(
        evaluation, "evaluate_run", lambda *args: evaluated.append(args[2::2]) or {}
    )
    setting = {"alpha": 1, "beta": 2, "clusters": (3, 3)}
    inserted = {"auto": {"expedite": setting}, "7": {"expedite": setting | {"temperature": 7.0}}}
    plain, auto, seven = evaluation.evaluate_insertions(tmp_path, "last", config, inserted)
    compare = Comparison(task.make_model(), variables, expedite_run.load_images(task, None, 8))
    assert auto["temperature"] == pytest.approx(0.05 * compare.distance(1), rel=0.005)
    assert seven["temperature"] == 7 and "temperature" not in plain
    configs, batches = zip(*evaluated, strict=True)
    for found, used in zip((auto, seven), configs[1:], strict=True):
        assert used.model_overrides.expedite.temperature == found["temperature"]
    assert len(set(map(id, batches))) == 1  # the workers are started once


@pytest.mark.parametrize(
    ("entries", "flags", "message"),
    [
        ({}, {"images": "none.jpg"}, "--images: none.jpg: No such file or directory"),
        (
            {"model": "dgt_t", "model_overrides": {}},
            {},
            "DGT has no blocks on centres; valid: deit",
        ),
        (
            {"model_overrides": {**SETTINGS, "token_reducer": {"keep": (9, 8, 7)}}},
            {},
            "config.model_overrides.token_reducer=",
        ),
        (
            {"model_overrides": {**SETTINGS, "expedite": Expedite(1, 2, (3, 3)).__dict__}},
            {},
            "config.model_overrides.expedite=",
        ),
        ({"model_overrides": {**SETTINGS, "depth": 1}}, {}, "at least 2 blocks"),
    ],
)
def test_mistakes_are_named(run, tmp_path, monkeypatch, entries, flags, message):
    monkeypatch.setattr(candidates, "FRACTIONS", (0.5,))
    config = tiny_config()
    config.update({key: value for key, value in entries.items() if key == "model"})
    config.model_overrides = entries.get("model_overrides", SETTINGS)
    write_config(tmp_path, config)
    status, printed, err = run(**{"workdir": tmp_path, "budget": 0.5} | flags)
    assert (status, printed, len(err.splitlines())) == (1, "", 1)
    assert message in err


def test_wrong_flags(run):
    for flags, message in (
        ({"budget": 1.5}, "--budget=1.5 is not valid; valid: numbers above 0 to below 1"),
        ({"budget": "nan"}, "--budget=nan is not valid; valid: numbers above 0"),
        ({"budget": 0.5, "num_images": "1e3"}, "--num_images='1e3' is not valid; valid: whole"),
        ({"budget": 0.5, "num_images": 2, "images": "a.png"}, "--num_images has no effect"),
    ):
        status, printed, err = run(workdir="run", **flags)
        assert (status, printed, len(err.splitlines())) == (2, "", 1)
        assert message in err


def test_a_run_is_not_overwritten(run, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    status, _, err = run(workdir=tmp_path, budget=0.5, out=tmp_path)
    assert status == 1 and "exists already; valid: a path where nothing exists, or an" in err


# ------------------------------------------------------------------------------------------------
# Images
# ------------------------------------------------------------------------------------------------


def test_images_are_windows_of_the_middle(monkeypatch):
    pixels = np.random.default_rng(0).integers(256, size=(2, 3, 40, 60, 3), dtype=np.uint8)
    sizes = np.array([(36, 60), (40, 48), (40, 60)])
    batches = [{"image": x, "image_size": sizes, "mask": np.array([1, 1, 0])} for x in pixels]
    monkeypatch.setattr(expedite_run, "eval_batches", lambda *args: batches)
    config = tiny_config("segmentation", dataset="scenes")
    config.inference.window = (32, 24)
    config.data.normalization = "inception"
    found = expedite_run.load_images(make_task(config), None, 3)
    wanted = [pixels[0, 0, 2:34, 18:42], pixels[0, 1, 4:36, 12:36], pixels[1, 0, 2:34, 18:42]]
    np.testing.assert_allclose(found, np.stack(wanted) / 127.5 - 1, atol=1e-6)
    assert len(expedite_run.load_images(make_task(config), None, 9)) == 4


def test_images_come_from_files_too(tmp_path):
    pixels = np.random.default_rng(0).integers(256, size=(32, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    config = tiny_config("segmentation", dataset="scenes")
    config.data.normalization = "inception"
    (found,) = expedite_run.load_images(make_task(config), [read_image(tmp_path / "a.png")], 8)
    np.testing.assert_allclose(found, pixels[:, 8:40] / 127.5 - 1, atol=1e-6)
