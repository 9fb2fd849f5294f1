import errno
import fcntl
import json
import os
import signal
import subprocess
import sys

import pytest
import tiny_config

from tokenvit_jax.errors import UserError
from tokenvit_jax.training.lock import LOCK_FILE, workdir_lock
from tokenvit_jax.training.loop import train

# Holds a lock as a training does, and says so; the standard library starts at once.
HOLD = """
import fcntl, os, sys, time
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(file, fcntl.LOCK_EX)
os.write(file, sys.argv[2].encode())
print("locked", flush=True)
time.sleep(600)
"""


@pytest.fixture
def hold(tmp_path):
    """Starts a process that holds the lock of `tmp_path`, with a text in the file."""
    processes = []

    def start(text):
        command = [sys.executable, "-c", HOLD, tmp_path / LOCK_FILE, text]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert processes[-1].stdout.readline() == "locked\n"
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_second_training_is_refused_until_the_first_ends(tmp_path):
    workdir = tmp_path / "new" / "run"
    with workdir_lock(workdir):
        holder = json.loads((workdir / LOCK_FILE).read_text())
        assert holder["pid"] == os.getpid()
        message = f"process {os.getpid()} on {holder['host']}.* runs in --workdir={workdir};"
        with pytest.raises(UserError, match=message), workdir_lock(workdir):
            pass
    with pytest.raises(ZeroDivisionError), workdir_lock(workdir):
        1 / 0  # noqa: B018
    with workdir_lock(workdir):
        pass


def test_refused_training_touches_nothing(tmp_path):
    unfinished = tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp"
    unfinished.mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text('{"step": 7')
    with workdir_lock(tmp_path):
        before = {path: path.stat() for path in tmp_path.rglob("*")}
        with pytest.raises(UserError, match="another training"):
            train(tiny_config.get_config(), tmp_path)
        assert {path: path.stat() for path in tmp_path.rglob("*")} == before


def test_nothing_remains_locked_after_a_kill(tmp_path, hold):
    other = hold('{"host": "elsewhere", "pid": 17}')
    refused = pytest.raises(
        UserError, match=r"another training \(process 17 on elsewhere\) runs in"
    )
    with refused, workdir_lock(tmp_path):
        pass
    other.send_signal(signal.SIGKILL)
    other.wait()
    with workdir_lock(tmp_path):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x", "host": 1}', "[" * 5000])
def test_damaged_file_is_refused_without_a_name(tmp_path, hold, text):
    hold(text)
    with pytest.raises(UserError, match="another training runs in"), workdir_lock(tmp_path):
        pass


def test_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with workdir_lock(tmp_path):
        assert f"{tmp_path / LOCK_FILE} cannot be locked (No locks available)" in caplog.text


def test_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    refused = pytest.raises(UserError, match=r"file/run cannot be written: .*Not a directory$")
    with refused, workdir_lock(tmp_path / "file" / "run"):
        pass
    (tmp_path / LOCK_FILE).mkdir()
    with pytest.raises(UserError, match="lock: Is a directory"), workdir_lock(tmp_path):
        pass


def test_file_that_is_deleted_while_it_is_opened_is_opened_again(tmp_path, monkeypatch):
    path, flock, deletions = tmp_path / LOCK_FILE, fcntl.flock, iter([True, False])

    def delete_first(*arguments):
        if next(deletions):
            path.unlink()
        flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", delete_first)
    with workdir_lock(tmp_path):
        assert next(deletions, None) is None
        assert json.loads(path.read_text())["pid"] == os.getpid()
