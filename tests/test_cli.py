"""The program `tokenvit`, and what all commands have in common."""

import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from absl import flags

from tokenvit_jax import __main__ as program
from tokenvit_jax import cli, progress
from tokenvit_jax.training.processes import StopRequest


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command with three flags; returns its status, the values it got, and its errors."""

    def run_command(*arguments, main=None):
        monkeypatch.setattr(sys, "argv", ["command", *arguments])
        flag_values, found = flags.FlagValues(), {}
        for name in ("workdir", "plot"):
            flags.DEFINE_string(name, None, f"path of the {name}", flag_values=flag_values)
        flags.DEFINE_list("images", None, "image files", flag_values=flag_values)
        keep = lambda values: found.update({n: values[n].value for n in values})  # noqa: E731
        with pytest.raises(SystemExit) as exit_info:
            cli.run(main or keep, flag_values, required=("workdir",))
        return exit_info.value.code, found, capsys.readouterr().err

    return run_command


def test_help_and_lists_of_files_need_no_jax():
    code = """
import contextlib, io, sys
from tokenvit_jax.__main__ import main
for arguments in ([], ["--help"], ["list", "configs"], *(
    [name, "--help"] for name in ("train", "label", "expedite", "prepare", "list")
)):
    sys.argv = ["tokenvit", *arguments]
    with contextlib.suppress(SystemExit):
        main()
assert "jax" not in sys.modules
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "train       Trains a model\n" in out.stdout
    assert "dgt_t         DGT-T on ImageNet-1K" in out.stdout
    assert "--workdir " in out.stdout
    assert "\n  batch_size=128 " in out.stdout


def test_every_command_is_listed_and_has_a_title():
    folder = Path(program.__file__).parent
    modules = {path.stem for path in folder.glob("*.py") if "cli.run(main" in path.read_text()}
    assert modules == set(program.COMMANDS)
    lines = program.usage().splitlines()[2 : 2 + len(modules)]
    assert all(len(line.split(maxsplit=1)[1]) > 10 for line in lines)


def test_program_passes_its_arguments_on(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tokenvit", "list", "datasets"])
    with pytest.raises(SystemExit) as exit_info:
        program.main()
    assert exit_info.value.code == 0
    assert {"digits", "folder", "tfds:NAME"} <= set(capsys.readouterr().out.splitlines())
    for arguments, message in (
        (["lst"], "error: no command 'lst' (did you mean 'list'?); valid: train, "),
        (["list", "model"], "error: 'model' cannot be listed (did you mean 'models'?); valid: "),
        (["list"], "error: argument models|configs|datasets is missing"),
    ):
        monkeypatch.setattr(sys, "argv", ["tokenvit", *arguments])
        with pytest.raises(SystemExit) as exit_info:
            program.main()
        assert exit_info.value.code in (1, 2)
        assert capsys.readouterr().err.startswith(message)


def test_tilde_is_the_home_folder_in_every_flag(run, monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/user")
    _, found, _ = run("--workdir=~/run", "--images=~/a.png,b~.png")
    assert found["workdir"] == "/home/of/user/run"
    assert found["images"] == ["/home/of/user/a.png", "b~.png"]
    assert found["plot"] is None


@pytest.mark.parametrize("flag", ["workdir", "plot", "images"])
def test_empty_value_is_refused(run, flag):
    status, found, err = run("--workdir=run", f"--{flag}=")
    assert status == 2
    assert not found
    assert err.startswith(f"error: --{flag}= is empty; ")


def test_interrupt_is_one_line(run):
    def main(_):
        raise KeyboardInterrupt

    assert run("--workdir=run", main=main)[::2] == (130, "error: interrupted\n")


def test_picture_path_is_checked_before_the_work(run, tmp_path):
    def main(flag_values):
        print(cli.picture_path(flag_values, "plot"), file=sys.stderr)

    path = tmp_path / "new" / "front.PNG"
    assert run("--workdir=x", f"--plot={path}", main=main) == (0, {}, f"{path}\n")
    assert not path.parent.exists()  # it is made with the picture
    assert run("--workdir=x", main=main)[2] == "None\n"
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    for name, message in (
        ("front.xyz", "front.xyz is not valid; valid suffixes: "),
        ("front", "front is not valid; valid suffixes: "),
        ("folder.png", "folder.png is a folder; valid: a file"),
        ("file/front.png", "file/front.png cannot be written: "),
    ):
        status, _, err = run("--workdir=x", f"--plot={tmp_path / name}", main=main)
        assert status == 1
        assert message in err


def test_signals_have_their_former_effect_after_training():
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    with StopRequest() as stop:
        assert not stop.received(1)
        signal.raise_signal(signal.SIGINT)
        assert stop.received(1)
    assert [signal.getsignal(number) for number in numbers] == before
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), StopRequest():
        1 / 0  # noqa: B018
    assert [signal.getsignal(number) for number in numbers] == before


def test_training_in_another_thread_leaves_the_signals_alone():
    found = []

    def work():
        with StopRequest() as stop:
            found.append(stop.received(1))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]
    assert signal.getsignal(signal.SIGTERM) is before


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch, capsys):
    assert list(progress.progress([1, 2, 3], "evaluating", "batch")) == [1, 2, 3]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0)
    list(progress.progress([1, 2], "evaluating", "batch"))
    list(progress.progress((item for item in [1]), "labelling", "batch"))
    lines = ["evaluating: batch 1 of 2", "evaluating: batch 2 of 2", "labelling: batch 1"]
    assert capsys.readouterr().err.splitlines() == lines


def test_warnings_do_not_tear_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    handler = logging.StreamHandler(sys.stderr)
    monkeypatch.setattr(logging.root, "handlers", [handler])
    for _ in progress.progress([1, 2], "evaluating", "batch"):
        logging.warning("a warning")
        progress.note("a line")
    shown = capsys.readouterr()
    assert "evaluating" in shown.err
    # The bar is cleared before a message and drawn again after it.
    assert all(part.startswith(("\r", "a warning")) for part in shown.err.split("\n") if part)
    assert shown.out == "a line\na line\n"
    assert logging.root.handlers == [handler]


def test_wheel_holds_the_configs_and_the_marker_of_types():
    pytest.importorskip("setuptools")  # environments of Python 3.12 and later lack it
    # setup.py runs without building: `.ci/run` installs a wheel and trains with it.
    root = Path(program.__file__).parent.parent
    code = "import setuptools; setuptools.setup = lambda **k: print(k); import runpy; "
    code += "runpy.run_path('setup.py')"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": ""},
    ).stdout  # fmt: skip
    assert "'tokenvit_jax.configs': 'configs'" in out
    packages = {p.parent.relative_to(root) for p in (root / "tokenvit_jax").rglob("__init__.py")}
    for package in packages:
        assert f"'{'.'.join(package.parts)}'" in out
    assert (root / "tokenvit_jax" / "py.typed").exists()
