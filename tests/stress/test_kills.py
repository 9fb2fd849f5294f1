"""Kills and signals at random moments of a training, and its memory over many checkpoints.

    STRESS_JOBS=16 pytest tests/stress/test_kills.py -m stress -s

Environment: STRESS_TRIALS lowers the number of kills, of signals and of checkpoints; STRESS_JOBS is
the number of trainings at a time (default: the number of cores).
"""

import collections
import contextlib
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from concurrent import futures
from pathlib import Path

import jax
import numpy as np
import pytest
from timings import without_timings

from tokenvit_jax.training.checkpoint import load_checkpoint, saved_steps

pytestmark = pytest.mark.stress

SEED = 0
NUM_KILLS = NUM_SIGNALS = int(os.environ.get("STRESS_TRIALS", 100))
NUM_CHECKPOINTS = min(600, 6 * NUM_KILLS)
JOBS = int(os.environ.get("STRESS_JOBS", os.cpu_count()))

MAX_PER_RUN = 6  # disturbances of a run, before it may end
MAX_SECONDS = 600  # of one process
MAX_MEGABYTES = 50  # growth between the 20th and the last checkpoint

REPOSITORY = Path(__file__).parents[2]
CONFIG = Path(__file__).with_name("tiny_vit.py")

EVALUATED = range(10, 61, 10)  # steps of `tiny_vit.py`
# When a process is disturbed: a text of its output, and the longest time after it [s].
PHASES = {
    "imports": ("", 6.0),
    "initialisation": ("parameters", 2.0),
    "start of workers, compilation": ("compiling the training step ...", 3.0),
    "steps": ("compiling the training step: ", 2.0),
    "evaluation": ("eval/loss", 2.0),
    "evaluation or saving": ("step {evaluated}  data", 0.5),
    "end": ("step 60  data", 1.5),
}


# ------------------------------------------------------------------------------------------------
# A training process
# ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    flags = os.environ.get("XLA_FLAGS", "").split()
    flags = [flag for flag in flags if "device_count" not in flag]
    return {
        **os.environ,
        "XLA_FLAGS": " ".join(flags),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


class Training:
    """A process that trains in a workdir, in a session of its own."""

    def __init__(self, workdir, environment, *flags):
        flags = (f"--config={CONFIG}", f"--workdir={workdir}", *flags)
        self.workdir = workdir
        self.output = workdir.with_suffix(".out")
        self.errors = workdir.with_suffix(".err")
        with self.output.open("w") as out, self.errors.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tokenvit_jax.train", *flags],
                cwd=REPOSITORY,
                env=environment,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def wait_for(self, condition):
        """Returns whether a condition came true before the process ended."""
        deadline = time.monotonic() + MAX_SECONDS
        while not condition():
            assert time.monotonic() < deadline, self.output.read_text()
            if self.process.poll() is not None:
                return False
            time.sleep(0.003)
        return True

    def watches(self):
        """Returns whether the process has a handler of SIGTERM: the interpreter has started."""
        with contextlib.suppress(OSError, StopIteration):
            status = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
            caught = next(line for line in status if line.startswith("SigCgt"))
            return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
        return False

    def wait(self):
        return self.process.wait(MAX_SECONDS)

    def orphans(self):
        """Returns the processes of the session that are left some seconds after its first one."""
        deadline = time.monotonic() + 20
        while (left := self._session()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return left

    def _session(self):
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = stat.read_text().rsplit(")", 1)[1].split()
                if int(fields[3]) == self.process.pid and fields[0] != "Z":
                    found.append(int(stat.parent.name))
        return found


def logged(workdir):
    """Returns everything that was logged except the timings, in order."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [without_timings(json.loads(line)) for line in lines if line.endswith("\n")]


# ------------------------------------------------------------------------------------------------
# Disturbances
# ------------------------------------------------------------------------------------------------


def disturb(training, kind, rng):
    """Disturbs a process once at a random moment; returns what was done, None if it ended before.

    Args:
      training: the process.
      kind: "kill" or "signal".
      rng: source of the moment and the kind of signal.
    """
    phase = rng.choice(list(PHASES))
    text, seconds = PHASES[phase]
    done = max(saved_steps(training.workdir), default=0)
    text = text.format(evaluated=rng.choice([step for step in EVALUATED if step > done] or [60]))
    delay = rng.random() ** 2 * seconds  # rather early
    if not training.wait_for(lambda: training.watches() and text in training.output.read_text()):
        return None
    end = time.monotonic() + delay
    if training.wait_for(lambda: time.monotonic() >= end) is False:
        return None
    if kind == "kill":
        training.process.kill()
        assert training.wait() == -signal.SIGKILL
        return phase, "SIGKILL", 0.0
    number = rng.choice((signal.SIGTERM, signal.SIGINT))
    group, twice, pause = rng.random() < 0.5, rng.random() < 0.25, rng.uniform(0.15, 0.5)
    send = os.killpg if group else os.kill
    start = time.monotonic()
    send(training.process.pid, number)
    if twice and training.wait_for(lambda: time.monotonic() >= start + pause):
        send(training.process.pid, number)
    status, errors = training.wait(), training.errors.read_text()
    seconds = time.monotonic() - start
    name = f"{number.name}{' twice' * twice}{' to the group' * group}"
    assert status == 0 or (twice and status == 128 + number), (phase, name, status, errors)
    assert "Traceback" not in errors, (phase, name, errors)
    if status == 0:  # every finished step is saved
        output = training.output.read_text()
        last = max(map(int, re.findall(r"^step (\d+)  ", output, re.MULTILINE)), default=0)
        assert last <= max(saved_steps(training.workdir), default=0), (phase, name, output)
        assert "finished" in output or number.name in errors, (phase, name, errors)
    return phase, name, seconds


def run_disturbed(workdir, environment, kinds, seed):
    """Trains to the end through some disturbances; returns those that happened.

    Args:
      workdir: folder of the run.
      environment: environment of its processes.
      kinds: "kill" or "signal", one after another.
      seed: of the moments.
    """
    rng, done = random.Random(seed), []
    for kind in kinds:
        training = Training(workdir, environment, f"--config.data.workers={rng.choice((0, 2))}")
        disturbance = disturb(training, kind, rng)
        status, errors = training.wait(), training.errors.read_text()
        assert not training.orphans(), (disturbance, seed)
        if disturbance is None:  # it had ended
            assert status == 0, errors
            break
        done.append((kind, *disturbance))
    training = Training(workdir, environment)
    assert training.wait() == 0, training.errors.read_text()
    return done


def assert_same_run(workdir, reference):
    assert logged(workdir) == logged(reference)
    found, expected = load_checkpoint(workdir), load_checkpoint(reference)
    assert found.step == expected.step
    jax.tree.map(np.testing.assert_array_equal, found.variables, expected.variables)


# ------------------------------------------------------------------------------------------------
# Tests
# ------------------------------------------------------------------------------------------------


def test_nothing_is_lost(environment, tmp_path):
    """Every run ends with the metrics and the parameters of an undisturbed one, bit by bit."""
    reference = tmp_path / "reference"
    training = Training(reference, environment)
    assert training.wait() == 0, training.errors.read_text()

    wanted = {"kill": NUM_KILLS, "signal": NUM_SIGNALS}
    done, rng = [], random.Random(SEED)
    with futures.ThreadPoolExecutor(JOBS) as executor:
        running, numbers = {}, itertools.count()
        while True:
            counts = collections.Counter(kind for kind, *_ in done)
            missing = [kind for kind in wanted for _ in range(wanted[kind] - counts[kind])]
            while missing and len(running) < JOBS:
                rng.shuffle(missing)
                workdir = tmp_path / f"run-{next(numbers)}"
                arguments = (workdir, environment, missing[:MAX_PER_RUN], rng.getrandbits(32))
                running[executor.submit(run_disturbed, *arguments)] = workdir
            if not running:
                break
            finished, _ = futures.wait(running, return_when=futures.FIRST_COMPLETED)
            for future in finished:
                workdir = running.pop(future)
                done += future.result()
                assert_same_run(workdir, reference)

    print(f"\n{len(done)} disturbances:")
    for (phase, kind), count in sorted(collections.Counter((d[1], d[0]) for d in done).items()):
        print(f"  {count:4} x {kind} in the phase: {phase}")
    seconds = sorted(d[3] for d in done if d[0] == "signal")
    print(
        f"  from a signal to the end: {seconds[len(seconds) // 2]:.1f} s, at most {seconds[-1]:.1f}"
    )


def test_memory_does_not_grow(environment, tmp_path):
    """The memory of a training process stays the same over hundreds of checkpoints.

    The first evaluation, which allocates buffers of its own, is before the first measurement.
    """
    flags = [f"--config.num_steps={10 * NUM_CHECKPOINTS}", "--config.checkpoint_every_steps=10"]
    flags += ["--config.eval_every_steps=100", "--config.log_every_steps=10"]
    training = Training(tmp_path / "run", environment, *flags)
    megabytes = {}  # step of the last checkpoint -> resident memory

    def measure():
        steps = saved_steps(training.workdir)
        with contextlib.suppress(OSError, StopIteration):
            status = Path(f"/proc/{training.process.pid}/status").read_text().splitlines()
            resident = next(line for line in status if line.startswith("VmRSS"))
            megabytes[max(steps, default=0)] = int(resident.split()[1]) / 1024
        time.sleep(0.02)

    training.wait_for(measure)
    assert training.wait() == 0, training.errors.read_text()
    after_twenty = next(size for step, size in sorted(megabytes.items()) if step >= 200)
    last = megabytes[max(megabytes)]
    print(f"\n{after_twenty:.0f} MB after 20 checkpoints, {last:.0f} MB after {NUM_CHECKPOINTS}")
    assert last - after_twenty < MAX_MEGABYTES
