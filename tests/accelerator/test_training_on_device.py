"""Thirty training steps on the accelerator, beside those of a CPU, again, and interrupted."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from shipped_configs import FOLDER, load_config
from tolerances import FIRST_LOSS, LOSSES

from tokenvit_jax.train import train
from tokenvit_jax.training.checkpoint import load_checkpoint
from tokenvit_jax.training.train_log import read_metrics

STEPS = 30
SETTINGS = {
    "image_size": 32, "batch_size": 32, "num_steps": STEPS, "log_every_steps": 1,
    "eval_every_steps": STEPS, "checkpoint_every_steps": STEPS // 2, "keep_last_checkpoints": 2,
    "optimizer.warmup_steps": 5, "model_overrides.depths": (1, 1, 1, 1),
    "compilation_cache": "off",
}  # fmt: skip


def losses_of(workdir):
    metrics = [line for line in read_metrics(workdir) if "loss" in line]
    assert [line["step"] for line in metrics] == [*range(1, STEPS + 1)]
    return np.array([line["loss"] for line in metrics])


def parameters_of(workdir):
    return jax.tree.leaves(load_checkpoint(workdir, str(STEPS)).variables)


def run_afresh(workdir, **settings):
    """Trains in this process; nothing that was compiled before is used."""
    config = load_config("dgt_t", "digits")
    config.update_from_flattened_dict(SETTINGS | settings)
    jax.clear_caches()
    jax.config.update("jax_enable_compilation_cache", False)
    jax.experimental.compilation_cache.compilation_cache.reset_cache()
    try:
        with jax.default_matmul_precision("highest"):
            train(config, workdir)
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
        jax.experimental.compilation_cache.compilation_cache.reset_cache()


def run_on_cpu(workdir):
    """Trains in a process that sees the CPU only."""
    flags = [f"--config.{key}={value}" for key, value in SETTINGS.items()]
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "tokenvit_jax.train", f"--config={FOLDER / 'dgt_t.py'}:digits",
         f"--workdir={workdir}", *flags],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def straight(accelerator, tmp_path_factory):
    """The folder of a deterministic run without interruption."""
    workdir = tmp_path_factory.mktemp("straight")
    run_afresh(workdir, deterministic=True)
    return workdir


@pytest.mark.accelerator
def test_losses_are_those_of_a_cpu(straight, tmp_path):
    run_on_cpu(tmp_path)
    found, expected = losses_of(straight), losses_of(tmp_path)
    error = np.abs(found - expected) / expected
    print(f"losses: first {error[0]:.2g}, largest difference {error.max():.2g}")
    assert error[0] <= FIRST_LOSS
    assert error.max() <= LOSSES
    assert found[-5:].mean() < 0.9 * found[0]


@pytest.mark.accelerator
def test_two_deterministic_runs_are_equal(straight, tmp_path):
    run_afresh(tmp_path, deterministic=True)
    np.testing.assert_array_equal(losses_of(tmp_path), losses_of(straight))
    for found, expected in zip(parameters_of(tmp_path), parameters_of(straight), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.accelerator
def test_a_resumed_deterministic_run_continues_equally(straight, tmp_path):
    workdir = tmp_path / "resumed"
    shutil.copytree(straight, workdir)
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    run_afresh(workdir, deterministic=True)
    np.testing.assert_array_equal(losses_of(workdir), losses_of(straight))
    for found, expected in zip(parameters_of(workdir), parameters_of(straight), strict=True):
        np.testing.assert_array_equal(found, expected)
