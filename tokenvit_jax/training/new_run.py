"""Writes runs that begin with given weights, published or from another run."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from tokenvit_jax import output
from tokenvit_jax.tasks import create_task
from tokenvit_jax.training.checkpoint import Checkpoints
from tokenvit_jax.training.optimizer import make_optimizer
from tokenvit_jax.training.state import first_state
from tokenvit_jax.training.workdir import write_config


def check_new(out: Path) -> None:
    """Raises UserError if a path cannot become the folder of a run, or already holds something."""
    output.check_new_folder(out, "--out")


def write_run(out: Path, config: ConfigDict, variables: Any) -> None:
    """Writes a run at step 0, which every command reads like a training run.

    Args:
      out: folder of the run, new or empty; it receives the run when that is complete.
      config: configuration of the run.
      variables: variables for `model.apply`.

    Raises:
      UserError: the folder is not empty, or cannot be written.
    """
    task = create_task(config)
    state = first_state(variables, make_optimizer(config, task.make_model()), config)
    with output.new_folder(out, "--out") as folder:
        write_config(folder, config)
        with Checkpoints(folder, keep_last=1, keep_best=0, score=task.score) as checkpoints:
            # Training that continues from here begins with the first batch.
            checkpoints.save(0, state, {"data": {"next_index": 0}})
