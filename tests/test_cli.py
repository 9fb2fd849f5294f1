"""The program `tokenvit`, and what all commands have in common."""

import errno
import io
import logging
import os
import pty
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from absl import flags

from tokenvit_jax import __main__ as program
from tokenvit_jax import cli, failures, progress, streams
from tokenvit_jax.errors import UserError, blame
from tokenvit_jax.training.processes import StopRequest
from tokenvit_jax.valid import Number, whole


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
from tokenvit_jax.__main__ import COMMANDS, main
for arguments in ([], ["--help"], ["list", "configs"], *(
    [name, "--help"] for name in COMMANDS if name != "convert"
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


def test_warnings_look_the_same_if_a_library_has_set_up_logging(monkeypatch, run):
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(logging.BASIC_FORMAT))
    monkeypatch.setattr(logging.root, "handlers", [handler])
    status, _, err = run("--workdir=x", main=lambda _: logging.warning("a warning"))
    assert (status, err) == (0, "WARNING: a warning\n")


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
        assert exit_info.value.code == 2
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir", "--plot=a.png"], "--workdir has no value but a flag, --plot=a.png; "),
        (["--workdir=~nobody-here/run"], "~nobody-here is no home folder; valid: ./~nobody-here"),
        (["--workdir=a\0b"], r"--workdir='a\x00b' is not valid; valid: a text without null"),
        (["--flagfile=/dev/zero"], "unknown flag --flagfile=/dev/zero; --help lists all flags"),
        (["--undefok=wordir", "--wordir=a"], "unknown flag --undefok=wordir"),
        (["--workdir=run", "more"], "unexpected argument 'more'; flags have the form --name=value"),
        (["--workdir=run", "--plott=a.png"], "Unknown command line flag 'plott'. Did you mean"),
    ],
)
def test_what_no_flag_can_mean_is_refused(run, arguments, message):
    status, found, err = run(*arguments)
    assert (status, found, len(err.splitlines())) == (2, {}, 1)
    assert message in err


def test_numbers_have_bounds():
    rules = {"count": whole(1, 9), "part": Number(0, 1, above=True)}

    def parse(*arguments):
        flag_values = flags.FlagValues()
        for name, rule in rules.items():
            cli.define_number(flag_values, name, None, "a number", rule)
        flag_values(["command", *arguments])
        return flag_values.count, flag_values.part

    assert parse("--count=9", "--part=1e-3") == (9, 0.001)
    assert parse() == (None, None)
    for argument in (
        "--count=0", "--count=10", "--count=1.0", "--count=", "--count=one",
        f"--count={'9' * 5000}", "--part=0", "--part=1.5", "--part=nan", "--part=inf",
        "--part=1e999", "--part=1,5",
    ):  # fmt: skip
        with pytest.raises(flags.Error) as error:
            parse(argument)
        message = str(error.value.__context__)
        assert message.startswith(argument.split("=")[0]) and "is not valid; valid: " in message


def test_output_that_nobody_reads_does_not_end_the_work(run, monkeypatch):
    done = []

    def main(_):
        for _ in range(1000):
            print("a line of output")
        progress.note("the end")
        done.append(1)

    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", pipe)
        assert run("--workdir=run", main=main)[::2] == (0, "")
        assert sys.stdout is pipe
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        message = "error: standard output cannot be written: No space left on device\n"
        assert run("--workdir=run", main=main)[::2] == (1, message)
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", full)
        assert run("--plot=a.png", main=main)[0] == 2
        monkeypatch.setattr(progress, "EVERY_SECONDS", 0)
        bars = lambda _: done.extend(progress.progress([1, 1], "evaluating", "batch"))  # noqa: E731
        assert run("--workdir=run", main=bars)[0] == 0
    assert len(done) == 4


def test_characters_that_the_output_lacks_are_written_as_codes(run, monkeypatch):
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    assert run("--workdir=run", main=lambda _: print("a\u2192b\udcff"))[0] == 0
    assert ascii_only.buffer.getvalue() == b"a\\u2192b\\udcff\n"


def test_no_file_takes_the_place_of_a_closed_stream(tmp_path):
    code = """
import sys
from absl import flags
from tokenvit_jax import cli
def main(_):
    with open("file", "w") as file:
        assert file.fileno() > 2
        print("output")
        print("errors", file=sys.stderr)
        file.write("done")
cli.run(main, flags.FlagValues())
"""
    command = f"cd {tmp_path}; exec {sys.executable} -c '{code}' <&- >&- 2>&-"
    root = Path(program.__file__).parent.parent
    subprocess.run(command, shell=True, check=True, env={**os.environ, "PYTHONPATH": str(root)})
    assert (tmp_path / "file").read_text() == "done"


class JaxRuntimeError(Exception):
    """Has the name of jax's own."""


def failing(error):
    def main(_):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FileNotFoundError(2, "No such file or directory", "a.png"), "a.png: No such file"),
        (OSError(errno.ENOSPC, "No space left on device"), "left on device (--workdir=run)"),
        (OSError(errno.EMFILE, "Too many open files"), "raise the limit of open files"),
        (OSError("a library's text"), "error: a library's text"),
        (OSError(), "error: OSError"),
        (MemoryError("Unable to allocate 3 TiB"), "out of memory: Unable to allocate 3 TiB; use a"),
        (MemoryError(), "out of memory; use a smaller batch size or smaller images"),
        (JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore"), "out of memory: RESOURCE_"),
        (RecursionError("maximum recursion depth"), "the input is nested too deeply"),
        (UserWarning("soon gone"), "PYTHONWARNINGS turns a UserWarning of a library into an error"),
        (ModuleNotFoundError("No module named 'cv2.x'", name="cv2.x"), "missing: pip install cv2"),
        (ImportError("libGL.so.1", name="cv2"), "cv2 cannot be imported: libGL.so.1"),
        (UnicodeEncodeError("ascii", "a\u2192", 1, 2, "ordinal"), "set LC_ALL=C.UTF-8"),
        (RuntimeError("Could not determine home directory."), "there is no home folder; set HOME"),
        (UserError("a\nb\x1b[31m\udcff"), r"error: a b\x1b[31m\xff" + "\n"),
        (UserError("x" * 10**6), "x ... x"),
    ],
)
def test_failures_of_the_machine_are_one_line(run, error, message):
    status, _, err = run("--workdir=run", main=failing(error))
    assert status == 1
    assert message in err
    assert len(err.splitlines()) == 1 and len(err) < 3000


@pytest.mark.parametrize(
    "error", [ValueError("x"), ImportError("x", name="tokenvit_jax.ops"), JaxRuntimeError("x")]
)
def test_bugs_keep_their_traceback(run, error):
    with pytest.raises(type(error)):
        run("--workdir=run", main=failing(error))


def test_a_current_folder_that_was_deleted(run, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    _, _, err = run("--workdir=run", main=lambda _: Path("a").absolute())
    assert err.startswith("error: the current folder does not exist any more; change to another")


def test_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    try:
        exec(compile("assert False", "/jax/_src/xla_bridge.py", "exec"))
    except AssertionError as error:
        assert failures.describe(error).startswith("JAX_PLATFORMS=cuda: JAX finds no such device; ")


def test_an_error_of_a_flag_becomes_the_error_of_an_entry():
    flag, entry = "--workdir=a", "config.initial.workdir=~/a"
    found = blame(UserError("--workdir=a holds no checkpoints"), flag, entry)
    assert str(found) == "config.initial.workdir=~/a holds no checkpoints"
    found = blame(UserError("no checkpoint '7'"), flag, entry)
    assert str(found) == "config.initial.workdir=~/a: no checkpoint '7'"


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


@pytest.fixture
def interruptible():
    """Ctrl-C raises KeyboardInterrupt, also in a background job, whose shell ignores it."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.mark.usefixtures("interruptible")
def test_signals_have_their_former_effect_after_training():
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    with StopRequest() as stop:
        assert not stop.received()
        signal.raise_signal(signal.SIGINT)
        assert stop.received()
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
            found.append(stop.received())

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


def test_a_closed_terminal_is_a_reader_that_went_away():
    ours, theirs = pty.openpty()
    with open(theirs, "w") as stream:
        guarded = streams.Guarded(stream)
        os.close(ours)
        guarded.write("text")
        guarded.flush()
        assert (guarded.error.errno, guarded.unread) == (errno.EIO, True)
    with open("/dev/full", "w") as stream:
        guarded = streams.Guarded(stream)
        guarded.write("text")
        guarded.flush()
        assert (guarded.error.errno, guarded.unread) == (errno.ENOSPC, False)
