"""Damages files of a run at random: whatever is read afterwards is what was written, or refused.

One file, or a folder inside a checkpoint, is damaged at a time. Then the run is read as `evaluate`
reads it, and now and then as `train` resumes it.
"""

import collections
import gc
import json
import logging
import os
import random
import shutil
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_config

from tokenvit_jax.errors import UserError
from tokenvit_jax.training.batches import WaitWarning
from tokenvit_jax.training.checkpoint import FOLDER, Checkpoints, load_checkpoint, saved_steps
from tokenvit_jax.training.state import TrainState
from tokenvit_jax.training.train_log import TrainLog
from tokenvit_jax.training.workdir import check_same_run, read_config, write_config

TRIALS = int(os.environ.get("STRESS_TRIALS", 1000))
SEED = 0
RESUME_EVERY = 4  # damages
SHORT_TRIALS = 40

STEPS = (10, 20, 30)
SCORES = {10: 0.5, 20: 0.9, 30: 0.7}
GOOD = {"equal", "refused in a line", "older with a warning", "older: no folder of the latest"}


def state_at(step):
    """A state with arrays of several types, of some bytes to some hundred kilobytes."""
    rng = np.random.default_rng(step)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), "float32")  # noqa: E731
    params = {
        "embed": {"kernel": normal(16, 16, 3, 32)},
        "block_0": {"kernel": normal(64, 64), "bias": jnp.zeros(64)},
        "head": {"kernel": normal(64, 10).astype(jnp.bfloat16)},
    }
    return TrainState(
        step=jnp.int32(step),
        params=params,
        model_state={"batch_stats": {"mean": normal(64)}},
        opt_state=(
            jnp.int32(step),
            jax.tree.map(jnp.ones_like, params),
            jnp.uint32([step, 7]),
        ),
        ema={"params": jax.tree.map(lambda x: x * 2, params)},
        skipped=jnp.int32(0),
    )


def score(metrics):
    return metrics["eval/accuracy"]


def open_checkpoints(workdir):
    return Checkpoints(workdir, keep_last=3, keep_best=1, score=score)


def open_log(workdir, config, step):
    return TrainLog(
        workdir,
        steps_done=step,
        num_steps=config.num_steps,
        batch_size=config.batch_size,
        every_steps=1,
        waited=lambda: 0.0,
        warning=WaitWarning(0, 1),
        enabled=True,
    )


class Damaged:
    """A run whose files are damaged one after the other; `counts` says what came of it."""

    def __init__(self, folder):
        self.workdir, self._copy = folder / "run", folder / "copy"
        self._random = random.Random(SEED)
        self.counts = collections.Counter()
        self.wrong = []
        self._write()
        states = {step: state_at(step) for step in STEPS}
        self._variables = {step: load_checkpoint(self.workdir, str(step)) for step in STEPS}
        self._states = jax.device_get(states)
        self._like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), states[10]
        )
        self._config = read_config(self.workdir)

    def _write(self):
        config = tiny_config.get_config()
        write_config(self.workdir, config)
        with (
            open_checkpoints(self.workdir) as checkpoints,
            open_log(self.workdir, config, 0) as log,
        ):
            for step in STEPS:
                metrics = {"eval/accuracy": SCORES[step]}
                checkpoints.save(step, state_at(step), {"data": {"next_index": 16 * step}})
                log.write(step, metrics)
                checkpoints.record(step, metrics)

    def trials(self, number):
        """Damages and reads the run a number of times."""
        assert self._evaluate(self.workdir) == "equal"
        for trial in range(number):
            resumes = trial % RESUME_EVERY == 0
            target, damage = self._choose(resumes)
            undo = damage(target)
            outcome = (
                self._outcome(self._resume) if resumes else self._outcome(self._evaluate, target)
            )
            self.counts[outcome] += 1
            if outcome not in GOOD:
                name = target.relative_to(self.workdir)
                self.wrong.append(f"{damage.__name__} of {name} (trial {trial}): {outcome}")
            undo()

    def _choose(self, resumes):
        """Returns a file and a damage; more often files that are read, and large ones."""
        draw, checkpoints = self._random.random, self.workdir / FOLDER
        below = checkpoints / str(STEPS[-1]) if resumes and draw() < 0.7 else self.workdir
        paths = sorted(below.rglob("*"))
        if draw() < 0.05:
            folders = [path for path in paths if path.is_dir() and checkpoints in path.parents]
            return self._random.choice(folders), self.missing_folder
        files = [path for path in paths if path.is_file()]
        if draw() < 0.3:
            files = sorted(files, key=lambda path: path.stat().st_size)[-len(files) // 4 :]
        damages = [self.flipped_bit, self.cut, self.empty, self.zeros, self.noise, self.missing]
        return self._random.choice(files), self._random.choice(damages)

    def _outcome(self, read, *arguments):
        try:
            return read(*arguments)
        except UserError as error:
            return "refused in a line" if "\n" not in str(error) else f"several lines: {error}"
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    def _evaluate(self, target):
        """Reads a checkpoint for inference, most often one that a damage concerns."""
        concerned = [str(step) for step in STEPS if f"/{step}/" in f"{target}/"]
        which = self._random.choice(["last", "best", *3 * concerned])
        step = {"last": STEPS[-1], "best": 20}.get(which) or int(which)
        config = read_config(self.workdir)
        loaded = load_checkpoint(self.workdir, which)
        if config.to_dict() != self._config.to_dict():
            return "another configuration"
        if loaded.step != step:
            gone = step not in saved_steps(self.workdir)
            return "older: no folder of the latest" if gone else f"step {loaded.step} as {which}"
        return same(loaded.variables, self._variables[step].variables) or "equal"

    def _resume(self):
        shutil.copytree(self.workdir, self._copy)
        try:
            config = read_config(self._copy)
            check_same_run(self._copy, config, STEPS[-1])
            with open_checkpoints(self._copy) as checkpoints:
                restored = checkpoints.restore(self._like)
                if restored is None:
                    return "nothing restored"
                state, progress = restored
                step = int(state.step)
                with open_log(self._copy, config, step):
                    pass
            if progress != {"data": {"next_index": 16 * step}}:
                return f"progress {progress}"
            if config.to_dict() != self._config.to_dict():
                return "another configuration"
            older = "older with a warning" if step < STEPS[-1] else "equal"
            return same(state, self._states[step]) or older
        finally:
            shutil.rmtree(self._copy)

    # ---------------------------------------------------------------- damages; each can be undone

    def _replaced(self, path, content):
        before = path.read_bytes()
        path.write_bytes(content)
        return lambda: path.write_bytes(before)

    def flipped_bit(self, path):
        content = bytearray(path.read_bytes())
        if content:
            content[self._random.randrange(len(content))] ^= 1 << self._random.randrange(8)
        return self._replaced(path, content)

    def cut(self, path):
        return self._replaced(
            path, path.read_bytes()[: self._random.randrange(path.stat().st_size or 1)]
        )

    def empty(self, path):
        return self._replaced(path, b"")

    def zeros(self, path):
        return self._filled(path, bytes)

    def noise(self, path):
        return self._filled(path, self._random.randbytes)

    def _filled(self, path, make):
        content = bytearray(path.read_bytes())
        first, end = sorted(self._random.randrange(len(content) + 1) for _ in range(2))
        content[first:end] = make(end - first)
        return self._replaced(path, content)

    def missing(self, path):
        before = path.read_bytes()
        path.unlink()
        return lambda: path.write_bytes(before)

    def missing_folder(self, path):
        aside = self.workdir.parent / "aside"
        path.rename(aside)
        return lambda: aside.rename(path)


def same(found, expected):
    """Returns a difference between two trees of arrays, or None."""
    if jax.tree.structure(found) != jax.tree.structure(expected):
        return "another structure"
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        if (a.dtype, a.shape, a.tobytes()) != (b.dtype, b.shape, b.tobytes()):
            return "other numbers"
    return None


def check(folder, number, caplog, monkeypatch):
    noise = []
    monkeypatch.setattr(threading, "excepthook", noise.append)
    monkeypatch.setattr(sys, "unraisablehook", noise.append)
    damaged = Damaged(folder)
    damaged.trials(number)
    print(json.dumps(damaged.counts, indent=2))
    assert not damaged.wrong, "\n".join(damaged.wrong)
    gc.collect()
    assert [report.exc_value for report in noise] == []
    assert [record for record in caplog.records if record.levelno > logging.WARNING] == []
    for outcome in ("equal", "refused in a line", "older with a warning"):
        assert damaged.counts[outcome] > number / 50


def test_damages(tmp_path, caplog, monkeypatch):
    check(tmp_path, SHORT_TRIALS, caplog, monkeypatch)


@pytest.mark.stress
def test_many_damages(tmp_path, caplog, monkeypatch):
    check(tmp_path, TRIALS, caplog, monkeypatch)
