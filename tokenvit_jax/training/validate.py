"""Checks a training configuration before anything is loaded or compiled."""

import re
from collections.abc import Iterable

from ml_collections import ConfigDict

from tokenvit_jax.config import read_entry
from tokenvit_jax.data import NORMALIZATIONS
from tokenvit_jax.data.token_labels import grid_size
from tokenvit_jax.errors import UserError
from tokenvit_jax.models.reducers import SEARCH
from tokenvit_jax.training.mixing import MIN_MIXTOKEN_GRID

# Entries with a fixed set of values. What the data pipeline and the models read, they check.
_CHOICES = {
    "dtype": ("float32", "bfloat16"),
    "parallel": ("jit", "pmap"),
    "optimizer.name": ("adamw", "sgd"),
    "optimizer.schedule": ("cosine", "polynomial"),
    "centroids.rule": ("literal", "swapped", "constant"),
    "data.normalization": tuple(NORMALIZATIONS),
}
# Entries with a range: lowest and highest valid value.
_RANGES = {
    "batch_size": (1, None),
    "data.eval_batch_size": (1, None),
    "num_steps": (1, None),
    "accumulate_steps": (1, None),
    "label_smoothing": (0, 1),
    "clip_norm": (0, None),
    "ema_decay": (0, 1),
    "mix.mixup": (0, None),
    "mix.cutmix": (0, None),
    "mix.mixtoken": (0, None),
    "mix.probability": (0, 1),
    "mix.switch_probability": (0, 1),
    "token_labels.weight": (0, None),
    "retention.penalty": (0, None),
    "retention.learning_rate_factor": (0, None),
    "optimizer.learning_rate": (0, None),
    "optimizer.weight_decay": (0, None),
    "optimizer.b1": (0, 1),
    "optimizer.power": (0, None),
    "optimizer.warmup_steps": (0, None),
    "centroids.old_weight": (0, 1),
    "inference.window": (0, None),
    "inference.stride": (0, None),
    "log_every_steps": (1, None),
    "eval_every_steps": (1, None),
    "checkpoint_every_steps": (1, None),
    "keep_last_checkpoints": (1, None),
    "keep_best_checkpoints": (0, None),
}


def check_config(config: ConfigDict) -> None:
    """Raises UserError for the first entry of a configuration whose value is not valid."""
    for key, choices in _CHOICES.items():
        if (value := read_entry(config, key)) not in choices:
            raise UserError(f"config.{key}={value!r} is not valid; valid: {', '.join(choices)}")
    for key, (low, high) in _RANGES.items():
        value = read_entry(config, key)
        # Written so that nan is out of range.
        if not value >= low or (high is not None and not value <= high):
            limits = f"at least {low}" if high is None else f"{low} to {high}"
            raise UserError(f"config.{key}={value} is not valid; valid: {limits}")
    if config.optimizer.warmup_steps >= config.num_steps:
        raise UserError(
            f"config.optimizer.warmup_steps={config.optimizer.warmup_steps} must be below "
            f"config.num_steps={config.num_steps}"
        )
    _check_token_mixing(config)
    _check_token_labels(config)
    _check_retention(config)
    profiled_steps(config)


def profiled_steps(config: ConfigDict) -> tuple[int, int]:
    """Returns the first and the last step of the profiler trace; (0, 0): none.

    Raises:
      UserError: `config.profile` is not of the form "first:last".
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


def _check_token_mixing(config: ConfigDict) -> None:
    """Raises UserError unless MixToken is off, or can mix what it is given."""
    if not config.mix.mixtoken:
        return
    _refuse(config, "mix.mixtoken", ("mix.mixup", "mix.cutmix"), "takes their place")
    grid = grid_size(config.image_size)
    if grid < MIN_MIXTOKEN_GRID:
        raise UserError(
            f"config.mix.mixtoken={config.mix.mixtoken} mixes nothing on the {grid} x {grid} cells "
            f"of the last map at config.image_size={config.image_size}; valid: at least "
            f"{MIN_MIXTOKEN_GRID} x {MIN_MIXTOKEN_GRID} cells"
        )


def _check_token_labels(config: ConfigDict) -> None:
    """Raises UserError unless token labels are off, or come from one place and fit the images."""
    labels = config.token_labels
    if not labels.weight:
        return
    if bool(labels.teacher) == bool(labels.files):
        found = "both are" if labels.teacher else "none is"
        raise UserError(
            f"config.token_labels.weight={labels.weight} needs either config.token_labels.teacher "
            f"or config.token_labels.files, and {found} given"
        )
    reason = "mixes images whose labels do not follow; valid: config.mix.mixtoken"
    _refuse(config, "token_labels.weight", ("mix.mixup", "mix.cutmix"), reason)
    if labels.files:
        moving = ("augment.rotation", "augment.translation")
        _refuse(config, "token_labels.files", moving, "moves images away from their labels")


def _check_retention(config: ConfigDict) -> None:
    """Raises UserError if there is a penalty on retention parameters, but none of them."""
    method = (config.model_overrides.get("token_reducer") or {}).get("method")
    if config.retention.penalty and method != SEARCH:
        raise UserError(
            f"config.retention.penalty={config.retention.penalty} needs "
            f"config.model_overrides.token_reducer.method={SEARCH!r}, not {method!r}"
        )


def _refuse(config: ConfigDict, key: str, others: Iterable[str], reason: str) -> None:
    """Raises UserError for the first of some entries that is on and does not go with another."""
    for other in others:
        if read_entry(config, other):
            raise UserError(
                f"config.{other}={read_entry(config, other)} does not go with "
                f"config.{key}={read_entry(config, key)!r}: {reason}"
            )
