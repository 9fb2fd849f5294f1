"""Writes runs that begin with given weights, published or from another run."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from tokenvit_jax.errors import UserError
from tokenvit_jax.tasks import create_task
from tokenvit_jax.training.checkpoint import FOLDER, Checkpoints
from tokenvit_jax.training.exporting import check_parent
from tokenvit_jax.training.optimizer import make_optimizer
from tokenvit_jax.training.state import first_state
from tokenvit_jax.training.workdir import write_config


def check_new(out: Path) -> None:
    """Raises UserError if a path cannot become the folder of a run, or already holds one."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out={out} is a file; valid: a folder")
    check_parent(out / FOLDER, "--out")
    if (out / FOLDER).exists():
        raise UserError(f"--out={out} holds checkpoints already; use another folder")


def write_run(out: Path, config: ConfigDict, variables: Any) -> None:
    """Writes a run at step 0, which every command reads like a training run.

    Args:
      out: folder of the run, without checkpoints.
      config: configuration of the run.
      variables: variables for `model.apply`.
    """
    task = create_task(config)
    state = first_state(variables, make_optimizer(config, task.make_model()), config)
    write_config(out, config)
    with Checkpoints(out, keep_last=1, keep_best=0, score=task.score) as checkpoints:
        # Training that continues from here begins with the first batch.
        checkpoints.save(0, state, {"data": {"next_index": 0}})
