"""Trainings whose disk gets full: one line, and nothing that was there is lost.

The disk is a file system in memory, which only root can mount; each trial has another size.
"""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys

import pytest
import tiny_config
from timings import without_timings

pytestmark = pytest.mark.stress

SEED = 0
TRIALS = int(os.environ.get("STRESS_TRIALS", 20))
SIZES = (64, 4096)  # of the disk [KiB]; the whole run needs more
FLAGS = ["--config.num_steps=12", "--config.checkpoint_every_steps=2"]
FLAGS += ["--config.eval_every_steps=6", "--config.keep_last_checkpoints=20"]


@contextlib.contextmanager
def disk(folder, kilobytes):
    """Mounts a file system of a size [KiB] on a folder."""
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def train(workdir):
    """Trains in a process of its own; returns its exit status and its errors."""
    command = [sys.executable, "-m", "tokenvit_jax.train", f"--config={tiny_config.__file__}"]
    found = subprocess.run(
        [*command, f"--workdir={workdir}", *FLAGS], capture_output=True, text=True
    )
    return found.returncode, found.stderr


def logged(workdir):
    """Returns everything that was logged except the timings."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [without_timings(json.loads(line)) for line in lines]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The workdir of a run with enough space."""
    workdir = tmp_path_factory.mktemp("reference") / "run"
    assert train(workdir) == (0, "")
    return workdir


@pytest.mark.parametrize("trial", range(TRIALS))
def test_a_training_whose_disk_gets_full(tmp_path, reference, trial):
    size = random.Random(SEED + trial).randint(*SIZES)
    with disk(tmp_path / "disk", size) as folder:
        status, errors = train(folder / "run")
        assert "Traceback" not in errors
        if status == 1:
            (line,) = (line for line in errors.splitlines() if line.startswith("error: "))
            assert f"{folder}/run" in line and "cannot be written" in line, line
        else:
            assert status == 0, errors
        saved = sorted(path.name for path in folder.glob("run/checkpoints/*"))
        shutil.copytree(folder, tmp_path / "larger")
    # With more space, the run goes on from its last checkpoint.
    status, errors = train(tmp_path / "larger" / "run")
    assert status == 0, errors
    assert logged(tmp_path / "larger" / "run") == logged(reference)
    assert {name for name in saved if name.isdigit()} <= {str(step) for step in range(2, 13, 2)}
