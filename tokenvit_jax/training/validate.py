"""Checks a configuration before anything is loaded or compiled."""

import re

from ml_collections import ConfigDict

from tokenvit_jax.config import check_values
from tokenvit_jax.data import check_data
from tokenvit_jax.errors import UserError
from tokenvit_jax.tasks import Task

# Entries with a fixed set of values.
_CHOICES = {
    "dtype": ("float32", "bfloat16"),
    "parallel": ("jit", "pmap"),
    "optimizer.name": ("adamw", "sgd"),
    "optimizer.schedule": ("cosine", "polynomial"),
}
# Entries with a range: lowest and highest valid value.
_RANGES = {
    "batch_size": (1, None),
    "data.eval_batch_size": (1, None),
    "num_steps": (1, None),
    "accumulate_steps": (1, None),
    "clip_norm": (0, None),
    "ema_decay": (0, 1),
    "optimizer.learning_rate": (0, None),
    "optimizer.weight_decay": (0, None),
    "optimizer.b1": (0, 1),
    "optimizer.power": (0, None),
    "optimizer.warmup_steps": (0, None),
    "optimizer.layer_decay": (0, 1),
    "log_every_steps": (1, None),
    "eval_every_steps": (1, None),
    "checkpoint_every_steps": (1, None),
    "keep_last_checkpoints": (1, None),
    "keep_best_checkpoints": (0, None),
}


def check_task(task: Task) -> None:
    """Raises UserError for the first invalid entry of a task's configuration."""
    config = task.config
    check_values(config, _CHOICES, _RANGES)
    if config.optimizer.warmup_steps >= config.num_steps:
        raise UserError(
            f"config.optimizer.warmup_steps={config.optimizer.warmup_steps} must be below "
            f"config.num_steps={config.num_steps}"
        )
    if not config.optimizer.layer_decay:
        raise UserError(
            "config.optimizer.layer_decay=0 is not valid; valid: above 0, up to 1 (off)"
        )
    profiled_steps(config)
    check_data(config)
    task.check()


def profiled_steps(config: ConfigDict) -> tuple[int, int]:
    """Returns the first and the last step of the profiler trace; (0, 0): none.

    Raises:
      UserError: `config.profile` does not have the form "first:last".
    """
    if not config.profile:
        return 0, 0
    match = re.fullmatch(r"(\d+):(\d+)", config.profile)
    first, last = map(int, match.groups()) if match else (0, 0)
    if not 1 <= first <= last:
        raise UserError(
            f"config.profile={config.profile!r} is not valid; valid: steps 'first:last', from 1"
        )
    return first, last
