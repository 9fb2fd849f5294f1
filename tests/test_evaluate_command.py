"""Evaluation without a configuration file: published weights from a file to numbers."""

import json
import shutil

import jax
import numpy as np
import pytest
from make_task import make_task, open_dataset
from PIL import Image
from safetensors.numpy import save_file

import tokenvit_jax as tv
from tokenvit_jax import evaluate, predict
from tokenvit_jax.data import eval_batches
from tokenvit_jax.data.images import MEAN, STD
from tokenvit_jax.training import evaluation
from tokenvit_jax.training.checkpoint import load_checkpoint
from tokenvit_jax.training.conversion import Choices, import_file
from tokenvit_jax.training.workdir import read_config
from tokenvit_jax.weights import LAYOUTS, export_weights, parameter_shapes

MODEL, SETTINGS = "deit_ti", {"patch_size": 16, "position_size": (32, 32), "distilled": True}


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """The workdir of an imported model that needs inception's pixels; images, labels, logits.

    The logits are the model's own, on digits that numpy normalised.
    """
    folder = tmp_path_factory.mktemp("imported")
    model = tv.create_model(MODEL, num_classes=10, **SETTINGS)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(scale=0.5, size=leaf.shape).astype(np.float32),
        parameter_shapes(model),
    )
    source, workdir = folder / "deit.safetensors", folder / "run"
    save_file(export_weights(params, model, LAYOUTS["timm"]["deit"]), source)
    choices = Choices(dataset="digits", normalization="inception", eval_crop=0.875)
    import_file(source, workdir, MODEL, "timm", choices)

    config = read_config(workdir)
    source = open_dataset("digits", "test")
    batches = list(eval_batches(source, make_task(config).examples(train=False), config))
    real = np.concatenate([batch["mask"] for batch in batches]) > 0
    images, labels = (
        np.concatenate([batch[name] for batch in batches])[real] for name in ("image", "label")
    )
    apply = jax.jit(lambda x: model.apply({"params": params}, x.astype(np.float32), train=False))
    logits = np.asarray(apply((images / 255.0 - 0.5) / 0.5), np.float64)
    # Otherwise the tests would not notice wrong or missing pixels.
    assert np.abs(logits - apply((images / 255.0 - MEAN) / STD)).mean() > 0.1
    assert logits.std(0).mean() > 0.1
    return workdir, images, labels, logits


def test_imported_weights_are_evaluated_as_the_model_sees_them(run, imported):
    workdir, _, labels, logits = imported
    status, printed, err = run(evaluate, ("workdir",), workdir=workdir)
    assert (status, err) == (0, "")
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(labels)), labels]
    accuracy = (logits.argmax(-1) == labels).mean()
    top5 = (logits.argsort(-1)[:, -5:] == labels[:, None]).any(-1).mean()
    found = json.loads(printed)
    assert found.pop("eval/images_per_second") > 0
    assert found == {
        "step": 0,
        "eval/accuracy": pytest.approx(accuracy, abs=1.01 / len(labels)),  # a near tie
        "eval/accuracy_top5": pytest.approx(top5, abs=1.01 / len(labels)),
        "eval/loss": pytest.approx(losses.mean(), rel=1e-4),
    }


def test_a_folder_with_the_same_classes(run, imported, tmp_path):
    """The command prints the accuracy of every class; `--dataset` names other images."""
    workdir, _, labels, logits = imported
    shutil.copytree(workdir, tmp_path / "run")
    entries = json.loads((workdir / "config.json").read_text())
    entries["data"]["eval_crop"] = 1.0  # the digits are not cropped
    del entries["digest"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(entries))
    source = open_dataset("digits", "test")
    number = 60
    for index in range(number):
        record = source.read(index)
        folder = tmp_path / "data" / "val" / str(record["label"])
        folder.mkdir(parents=True, exist_ok=True)
        record["image"].save(folder / f"{index}.png")
    flags = {"dataset": "folder", "data_dir": tmp_path / "data", "per_class": True}
    status, printed, err = run(evaluate, ("workdir",), workdir=tmp_path / "run", **flags)
    assert (status, err) == (0, "")
    found = json.loads(printed)
    correct = (logits.argmax(-1) == labels)[:number]
    expected = {str(k): correct[labels[:number] == k].mean() for k in range(10)}
    assert found["eval/accuracy"] == pytest.approx(correct.mean(), abs=1.01 / number)
    assert found["per_class/accuracy"] == pytest.approx(expected, abs=0.34)  # a near tie
    status, _, err = run(evaluate, ("workdir",), workdir=workdir, dataset="scenes")
    assert status == 1 and "dataset 'scenes' has 5 classes, the run has 10 (digits)" in err


def test_an_insertion_that_does_not_fit_costs_no_evaluation(run, imported):
    for flags, message in (
        ({"keep": "3,2"}, "--keep=3,2 does not fit the model: "),
        ({"expedite": "1,1,9x9"}, "--expedite=1,1,9x9 does not fit the model: "),  # of 2 x 2
    ):
        status, printed, err = run(evaluate, ("workdir",), workdir=imported[0], **flags)
        assert (status, printed) == (1, "") and message in err


@pytest.mark.slow
def test_a_reducer_is_inserted_without_training(run, imported):
    """The command prints a line without and a line with the reducer, for the same weights."""
    workdir, images, labels, logits = imported
    keep = (3,) + (2,) * 6 + (1,) * 4 + (0,)
    flags = {"keep": ",".join(map(str, keep)), "method": "tome", "carry": True}
    status, printed, err = run(evaluate, ("workdir",), workdir=workdir, **flags)
    assert (status, err) == (0, "")
    plain, reduced = map(json.loads, printed.splitlines())
    assert plain["inserted"] == "none"
    assert plain["eval/accuracy"] == pytest.approx((logits.argmax(-1) == labels).mean(), abs=0.01)
    assert reduced["inserted"] == f"tome carry {flags['keep']}"
    assert 0.5 < reduced["gmacs"] / plain["gmacs"] < 0.8
    assert reduced["eval/loss"] != pytest.approx(plain["eval/loss"], rel=1e-3)

    settings = SETTINGS | {"token_reducer": {"keep": keep, "method": "tome", "carry": True}}
    model = tv.create_model(MODEL, num_classes=10, **settings)
    variables = load_checkpoint(workdir).variables
    apply = jax.jit(lambda x: model.apply(variables, x, train=False))
    other = np.asarray(apply((images.astype(np.float32) / 255.0 - 0.5) / 0.5), np.float64)
    losses = np.log(np.exp(other).sum(-1)) - other[np.arange(len(labels)), labels]
    assert reduced["eval/loss"] == pytest.approx(losses.mean(), rel=1e-4)


def test_imported_weights_predict_what_the_model_gives(run, imported, tmp_path):
    workdir, images, _, logits = imported
    Image.fromarray(images[7]).save(tmp_path / "seven.png")
    flags = {"images": tmp_path / "seven.png", "out": tmp_path / "pictures"}
    status, printed, err = run(predict, ("workdir", "images", "out"), workdir=workdir, **flags)
    assert (status, err) == (0, "")
    probabilities = np.exp(logits[7]) / np.exp(logits[7]).sum()
    best = np.argsort(-probabilities)[:5]
    classes = ", ".join(f"{label} {probabilities[label]:.1%}" for label in best)
    assert printed.startswith(f"{tmp_path / 'seven.png'}: {classes} -> ")


def test_a_run_that_does_not_name_its_normalization_has_imagenets(imported, tmp_path):
    entries = json.loads((imported[0] / "config.json").read_text())
    assert entries["data"].pop("normalization") == "inception"
    del entries["digest"]
    (tmp_path / "config.json").write_text(json.dumps(entries))
    assert read_config(tmp_path).data.normalization == "imagenet"


@pytest.mark.parametrize("with_config", [False, True])
def test_which_configuration_and_which_data(run, imported, monkeypatch, tmp_path, with_config):
    seen = []
    monkeypatch.setattr(evaluation, "evaluate_run", lambda *args: seen.append(args[2]) or {})
    monkeypatch.setattr(evaluation, "open_split", lambda *args: range(1))  # it is not prepared
    file = tmp_path / "config.py"
    file.write_text(
        "from tokenvit_jax.tasks import default_config\n"
        "def get_config():\n"
        "    config = default_config('classification')\n"
        "    config.dataset = 'imagenet2012'\n"
        "    return config\n"
    )
    flags = {"config": file} if with_config else {}
    assert run(evaluate, ("workdir",), **flags, workdir=imported[0])[0] == 0
    status, _, err = run(evaluate, ("workdir",), **flags, workdir=imported[0], data_dir="DATA")
    found = [(config.model, config.data.data_dir) for config in seen]
    if with_config:
        assert found == [("dgt_t", "~/tensorflow_datasets"), ("dgt_t", "DATA")]
    else:  # of the digits, which are not read from a folder
        assert found == [("deit_ti", "~/tensorflow_datasets")]
        assert status == 1 and "--data_dir=DATA has no effect: dataset 'digits' comes" in err


def test_mistakes_are_named(run, imported, tmp_path):
    entries = json.loads((imported[0] / "config.json").read_text())
    entries["data"]["normalization"] = "half"
    del entries["digest"]
    (tmp_path / "config.json").write_text(json.dumps(entries))
    for workdir, message in (
        (tmp_path, "config.data.normalization='half' is not valid; valid: imagenet, inception"),
        (tmp_path / "none", f"--workdir={tmp_path}/none holds no config.json"),
    ):
        status, printed, err = run(evaluate, ("workdir",), workdir=workdir)
        assert (status, printed, len(err.splitlines())) == (1, "", 1)
        assert message in err
