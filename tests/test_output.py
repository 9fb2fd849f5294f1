"""Files and folders that are written whole or not at all."""

import errno
import json
import os
from pathlib import Path

import pytest
from full_disk import largest_file
from matplotlib.figure import Figure
from PIL import Image

from tokenvit_jax import output
from tokenvit_jax.errors import UserError
from tokenvit_jax.tasks import default_config
from tokenvit_jax.tasks.task import Prediction
from tokenvit_jax.training.batches import WaitWarning
from tokenvit_jax.training.prediction import Table, predict_files
from tokenvit_jax.training.train_log import TrainLog, read_metrics
from tokenvit_jax.training.workdir import read_config, write_config


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "new" / f"{'x' * 250}.txt"
    output.write_file(path, "öld\n")
    assert path.read_text(encoding="utf-8") == "öld\n"
    with largest_file(100), pytest.raises(UserError, match=rf"^--out={path} cannot be written: F"):
        output.write_file(path, bytes(101), "--out")
    with pytest.raises(ZeroDivisionError), output.new_file(path) as temporary:
        temporary.write_text("half")
        1 / 0  # noqa: B018
    assert (names(path.parent), path.read_text(encoding="utf-8")) == ([path.name], "öld\n")
    with (
        pytest.raises(UserError, match="cannot be written: no space"),
        output.new_file(path, kinds=(RuntimeError,)) as temporary,
    ):
        raise RuntimeError("no space")  # as a library reports it
    with output.new_file(path) as temporary:
        assert temporary.suffix == ".txt"  # libraries choose the format by it
        temporary.write_text("new")
    assert (names(path.parent), path.read_text()) == ([path.name], "new")
    assert path.stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_links_stay_and_devices_are_refused(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    output.write_file(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    for special in ("/dev/full", tmp_path / "pipe"):
        path = tmp_path / "special"
        path.symlink_to(special)
        for write in (lambda path: output.write_file(path, ""), output.Log, output.check_file):
            with pytest.raises(UserError, match=f"{path} cannot be written: not a regular file"):
                write(path)
        path.unlink()
    with pytest.raises(UserError, match=f"{tmp_path} cannot be written: "):
        output.write_file(tmp_path, "")


def test_a_record_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "log"
    for end in (b"", b"]"):
        path.write_bytes(b"[one" + end)
        log = output.Log(path, end)
        log.append(b",two")
        with largest_file(15), pytest.raises(UserError, match=f"{path} cannot be written: File to"):
            log.append(b",three, which is long")
        assert path.read_bytes() == b"[one,two" + end
        path.unlink()
        log.append(b",four")
        assert path.read_bytes() == b"[one,two,four" + end
        (tmp_path / "edited").write_bytes(b"[edited" + end)
        (tmp_path / "edited").replace(path)  # as editors do
        log.append(b",five")
        log.close()
        assert path.read_bytes() == b"[edited,five" + end


def test_names_are_shown_without_control_characters():
    assert output.shown(Path("ä 漢.png")) == "ä 漢.png"
    assert output.shown(os.fsdecode(b"a\nb\x1b[31m\xff")) == r"a\nb\x1b[31m\udcff"


# ------------------------------------------------------------------------------------------------
# Folders
# ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
def test_a_name_in_any_script_is_drawn_without_a_warning():
    figure = Figure(figsize=(0.1, 0.1))
    figure.suptitle("\N{CJK UNIFIED IDEOGRAPH-672C}")
    assert output.figure_bytes(figure, "png", {"Software": "mark"}).count(b"Software\0mark") == 1


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_appears_when_it_is_complete(tmp_path, exists, monkeypatch):
    path = tmp_path / "new" / "out"
    if exists:
        path.mkdir(parents=True)
        monkeypatch.chdir(path)
        path = Path()  # the current folder
        (path / ".tmp-abc").mkdir()  # a killed process left it
    for error in (UserError, ZeroDivisionError):
        with pytest.raises(error) as caught, output.new_folder(path, "--out") as folder:
            (folder / "a").write_text("a")
            raise error(f"{folder / 'a'} cannot be written")
    assert f"{folder / 'a'}" not in str(caught.value) or error is not UserError
    left = [".tmp-abc"] if exists else []
    assert not path.exists() or names(path) == left
    with output.new_folder(path, "--out") as folder:
        (folder / "a").write_text("a")
        (folder / "b").mkdir()
    assert names(path) == [*left, "a", "b"]
    with pytest.raises(UserError, match=f"--out={path} exists already; valid: a path where"):
        output.check_new_folder(path, "--out")


def test_messages_name_the_final_path(tmp_path):
    path = tmp_path / "out"
    message = f"^{path}/a cannot be written: File too large$"
    with (
        pytest.raises(UserError, match=message),
        output.new_folder(path) as folder,
        largest_file(10),
    ):
        output.write_file(folder / "a", bytes(20))
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/proc/a", r"no file can be made in /proc \("),
        ("file/a", "/file is not a folder"),
        ("file/a/b", "/file is not a folder"),
        ("link/a", "/link is not a folder"),
        (f"new/{'x' * 256}/a", "File name too long"),
        ("/" + f"{'x' * 200}/" * 25, "File name too long"),
    ],
)
def test_paths_that_cannot_be_written(tmp_path, path, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = names(tmp_path)
    checks = (
        output.check_folder,
        output.check_file,
        output.check_new_file,
        output.check_new_folder,
    )
    for check in checks:
        with pytest.raises(UserError, match=rf"--out=.* cannot be written: .*{message}"):
            check(tmp_path / path, "--out")
    assert names(tmp_path) == before
    output.check_writable(tmp_path / "new" / "a" / "b")
    output.check_new_file(tmp_path / "new" / "a")
    with pytest.raises(UserError, match=f"cannot be written: there is no folder {tmp_path}/new$"):
        output.check_new_file(tmp_path / "new" / "a" / "b")
    with pytest.raises(UserError, match=f"--out={tmp_path}/file is a file; valid: a folder"):
        output.check_folder(tmp_path / "file", "--out")


def test_a_folder_without_permission(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(UserError, match=f"--out={tmp_path}/a cannot be written: no permission to"):
        output.check_folder(tmp_path / "a", "--out")


# ------------------------------------------------------------------------------------------------
# A disk that is full at any write
# ------------------------------------------------------------------------------------------------


class FakeRun:
    """Predicts nothing, and draws two pictures of each image."""

    def read(self, file):
        return Image.new("RGB", (2, 2))

    def predictor(self, image):
        return Prediction({}, {"class": "cat"}, "cat", lambda caption: {"one": image, "two": image})


def work(folder, config):
    """Writes the files of a run, resumed after step 2, and of predictions."""
    workdir = folder / "run"
    write_config(workdir, config)
    settings = {
        "steps_done": 2, "num_steps": 4, "batch_size": 1, "every_steps": 1,
        "waited": lambda: 0.0, "warning": WaitWarning(0, 1),
    }  # fmt: skip
    with TrainLog(workdir, **settings, enabled=True) as log:
        for step in (3, 4):
            log.write(step, {"loss": 1 / step}, visible=False)
    files = [folder / f"{name}.png" for name in ("a", "b")]
    for suffix in ("json", "csv"):
        table = Table(folder / f"results.{suffix}", files)
        list(predict_files(FakeRun(), files, folder / "out", table))
    output.write_figure(folder / "plot.png", Figure(figsize=(0.1, 0.1)), "--plot")


def check_state(folder):
    """Checks that all files are whole; returns the number of steps that are logged."""
    assert not list(folder.rglob(".*"))
    if (folder / "run" / "config.json").exists():
        read_config(folder / "run")
    for path in folder.glob("results.json"):
        assert json.loads(path.read_text())
    for path in folder.glob("out/*.png"):
        Image.open(path).load()
    return [line["step"] for line in read_metrics(folder / "run")]


def test_a_full_disk_at_any_write_is_one_line_and_loses_nothing(tmp_path, monkeypatch):
    write_all, left = output._write_all, 0
    config = default_config("classification")

    def write(descriptor, content):
        nonlocal left
        left -= 1
        if left == 0:
            write_all(descriptor, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_all(descriptor, content)

    monkeypatch.setattr(output, "_write_all", write)
    for count in range(1, 100):
        folder = tmp_path / str(count)
        (folder / "run").mkdir(parents=True)
        logged = '{"step": 1, "loss": 1.0}\n[]\n{"step": 2, "loss": 0.5}\n{"step": 3, "loss": 9}\n'
        (folder / "run" / "metrics.jsonl").write_text(logged)
        left = count
        try:
            work(folder, config)
            break
        except UserError as error:
            assert "cannot be written: No space left on device" in str(error)
            assert str(folder) in str(error) and "\n" not in str(error)
        assert check_state(folder)[:2] == [1, 2]
        work(folder, config)
        assert check_state(folder) == [1, 2, 3, 4]
        assert len(names(folder / "out")) == 4
    # The configuration, three files of metrics, six events, two tables with four pictures each
    # and two rows, and the plot.
    assert count > 20
