"""Writes runs that begin with given weights, published or from another run."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from tokenvit_jax.errors import UserError
from tokenvit_jax.tasks import create_task
from tokenvit_jax.training.checkpoint import FOLDER, Checkpoints
from tokenvit_jax.training.optimizer import make_optimizer
from tokenvit_jax.training.state import TrainState, averaged_variables
from tokenvit_jax.training.workdir import write_config


def check_new(out: Path) -> None:
    """Raises UserError if a folder already holds a run."""
    if (out / FOLDER).exists():
        raise UserError(f"--out={out} holds checkpoints already; use another folder")


def write_run(out: Path, config: ConfigDict, variables: Any) -> None:
    """Writes a run at step 0, which every command reads like a training run.

    Args:
      out: folder of the run, without checkpoints.
      config: configuration of the run.
      variables: variables for `model.apply`.
    """
    model_state = dict(variables)
    params = model_state.pop("params")
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        model_state=model_state,
        opt_state=make_optimizer(config).init(params),
        ema=averaged_variables(params, model_state) if config.ema_decay else None,
        skipped=jnp.zeros((), jnp.int32),
    )
    write_config(out, config)
    with Checkpoints(out, keep_last=1, keep_best=0, score=create_task(config).score) as checkpoints:
        # Training that continues from here begins with the first batch.
        checkpoints.save(0, state, {"data": {"next_index": 0}})
