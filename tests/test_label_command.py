"""Labels of all training images by a checkpoint: files and messages."""

import copy
import sys

import jax
import numpy as np
import pytest
from make_task import make_task
from PIL import Image
from token_model import TokenModel, token_config, use_token_model, write_run

from tokenvit_jax import cli, label
from tokenvit_jax.data.token_labels import TokenLabelFiles
from tokenvit_jax.training import token_label_writer

RECORDS = 11  # in batches of 8: one is filled up


class NoiseSource:
    def __init__(self, corrupt=False):
        self.corrupt = corrupt

    def __len__(self):
        return RECORDS

    def read(self, index):
        if self.corrupt and index == RECORDS - 1:
            raise cli.UserError("unreadable")
        pixels = np.random.default_rng(index).integers(256, size=(70, 110, 3), dtype=np.uint8)
        return {"id": index, "image": Image.fromarray(pixels), "label": 0}

    def name(self, index):
        return f"record {index}"


@pytest.fixture(scope="module")
def run_of_teacher(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    return workdir, write_run(workdir)


@pytest.fixture
def run(monkeypatch, capsys, run_of_teacher):
    """Runs the command; returns its exit status, output and errors."""
    use_token_model(monkeypatch)

    def run_command(source=None, **args):
        monkeypatch.setattr(token_label_writer, "open_split", lambda *_: source or NoiseSource())
        args = {"workdir": run_of_teacher[0]} | args
        argv = ["label", *(f"--{name}={value}" for name, value in args.items())]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as exit_info:
            cli.run(label.main, copy.deepcopy(label.FLAGS), required=("workdir", "out"))
        output = capsys.readouterr()
        return exit_info.value.code, output.out, output.err

    return run_command


def test_files_hold_the_most_probable_classes(run, run_of_teacher, tmp_path):
    out = tmp_path / "labels"
    out.mkdir()  # an empty folder is no mistake
    status, printed, _ = run(out=out, top_k=3)
    assert printed == f"11 records of 3 x 3 cells, 3 classes each -> {out}\n"
    assert status == 0
    assert [path.name for path in tmp_path.iterdir()] == ["labels"]
    classes, scores = np.load(out / "classes.npy"), np.load(out / "scores.npy")
    assert classes.shape == scores.shape == (RECORDS, 3, 3, 3)
    assert (classes.dtype, scores.dtype) == (np.uint8, np.float16)

    images = [NoiseSource().read(index)["image"].resize((96, 96), 3) for index in range(RECORDS)]
    logits = TokenModel(num_classes=10).apply(
        {"params": run_of_teacher[1]},
        make_task(token_config()).normalize(np.stack(images)),
        method="dense_logits",
    )
    probabilities = np.asarray(jax.nn.softmax(logits))
    order = np.argsort(-probabilities, axis=-1)[..., :3]
    expected = np.take_along_axis(probabilities, order, -1)
    assert np.mean(classes == order) > 0.99  # near ties may fall the other way
    np.testing.assert_allclose(scores, expected / expected.sum(-1, keepdims=True), atol=2e-3)
    TokenLabelFiles(str(out), RECORDS, 10)


def test_interrupted_run_leaves_no_labels(run, tmp_path):
    out = tmp_path / "labels"
    status, _, error = run(NoiseSource(corrupt=True), out=out)
    assert status == 1
    assert "unreadable" in error
    assert not out.exists()
    assert run(out=out)[0] == 0  # over the files that the first call left
    assert np.load(out / "scores.npy").all()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"top_k": 11}, "--top_k=11; valid: 1 to 10"),
        ({"top_k": 0}, "--top_k=0; valid: 1 to 10"),
        ({"workdir": "/nowhere"}, "--workdir=/nowhere holds no config.json"),
        ({"checkpoint": 7}, "no checkpoint '7'"),
    ],
)
def test_wrong_flags(run, tmp_path, args, message):
    status, _, error = run(**({"out": tmp_path / "labels"} | args))
    assert message in error
    assert status == 1


def test_labels_that_are_there_stay(run, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path, tmp_path / "file"):
        status, _, error = run(out=out)
        message = "exists already; valid: a path where nothing exists, or an empty folder"
        assert error == f"error: --out={out} {message}\n"
        assert status == 1
