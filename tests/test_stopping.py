"""A program that watches its signals, mostly without jax: the first signal and the second one."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# The main thread computes in C for a minute and more, as it does while it compiles.
BUSY = """
import hashlib
from tokenvit_jax import stopping
stopping.watch()
stopping.hold({unsaved})
print("ready", flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""
POLLING = """
import time
from tokenvit_jax import stopping
stopping.watch()
stopping.hold(True)
print("ready", flush=True)
while not stopping.requested():
    time.sleep(0.01)
print("saved", flush=True)
stopping.hold(False)
"""
# A library for devices replaces the handler in C, where Python does not notice it.
REPLACED = """
import ctypes, signal, time
from tokenvit_jax import stopping
stopping.watch()
from tokenvit_jax.training import processes
stop = processes.StopRequest()
ctypes.CDLL(None).signal(signal.SIGTERM, None)
with stop:
    stopping.hold(True)
    print("ready", flush=True)
    while not stop.received():
        time.sleep(0.01)
    print("saved", flush=True)
"""
IN_A_THREAD = """
import threading, time
from tokenvit_jax import stopping
stopping.watch()
from tokenvit_jax.training import processes

def train():
    with processes.StopRequest() as stop:
        stopping.hold(True)
        print("ready", flush=True)
        while not stop.received():
            time.sleep(0.01)
        print("saved", flush=True)

thread = threading.Thread(target=train)
thread.start()
thread.join()
"""
NOT_SAVING = """
import hashlib, sys
from tokenvit_jax import stopping
stopping.watch(saves=False)
with stopping.temporary_folder() as folder:
    print(folder, file=sys.stderr, flush=True)
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""
SIGNALS = [signal.SIGTERM, signal.SIGINT]


@pytest.fixture
def start():
    """Starts a program and waits until it watches."""
    started = []

    def start_program(code):
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start_program
    for process in started:
        process.kill()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_program_that_saves_nothing_ends_without_its_files(start, number):
    program = start(NOT_SAVING)
    program.send_signal(number)
    folder, message = program.communicate(timeout=20)[1].splitlines()
    assert (program.returncode, message) == (128 + number, f"error: {number.name}: interrupted")
    assert folder and not Path(folder).exists()


@pytest.mark.parametrize("number", SIGNALS)
def test_nothing_to_save(start, number):
    program = start(BUSY.format(unsaved=False))
    program.send_signal(number)
    _, err = program.communicate(timeout=20)
    assert (program.returncode, err) == (0, f"{number.name}: stopped; there was nothing to save\n")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_ends_at_once(start, number):
    program = start(BUSY.format(unsaved=True))
    program.send_signal(number)
    program.send_signal(number)  # `timeout` does this
    time.sleep(0.3)
    assert program.poll() is None
    program.send_signal(number)
    _, err = program.communicate(timeout=20)
    assert program.returncode == 128 + number
    assert err.splitlines() == [
        f"{number.name}: stopping after this step is saved; once more: at once",
        f"{number.name}: ended at once; the last checkpoint may be incomplete",
    ]


def test_a_closed_terminal_asks_once(start):
    terminal = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # even under `nohup`
    program = start(terminal + BUSY.format(unsaved=True))
    for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM):  # the shell repeats it
        program.send_signal(number)
        time.sleep(0.3)
    _, err = program.communicate(timeout=20)
    assert program.returncode == 128 + signal.SIGTERM
    assert [line.partition(":")[0] for line in err.splitlines()] == ["SIGHUP", "SIGTERM"]


def test_nohup_goes_on(start):
    program = start("import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + POLLING)
    program.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert program.poll() is None
    program.send_signal(signal.SIGTERM)
    out, _ = program.communicate(timeout=20)
    assert (program.returncode, out) == (0, "saved\n")


@pytest.mark.parametrize(
    "code",
    [POLLING, REPLACED, IN_A_THREAD],
    ids=["alone", "beside a library", "in a thread"],
)
def test_a_program_saves_and_ends(start, code):
    program = start(code)
    program.send_signal(signal.SIGTERM)
    out, err = program.communicate(timeout=20)
    assert (program.returncode, out) == (0, "saved\n")
    assert err == "SIGTERM: stopping after this step is saved; once more: at once\n"
