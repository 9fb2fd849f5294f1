"""Metrics in the checkpoints of a run, and the scores that select the best of them."""

import json
import math
from pathlib import Path

from tokenvit_jax.errors import UserError
from tokenvit_jax.training.digests import unsealed
from tokenvit_jax.training.quiet_orbax import brief

# The task's score, stored with the metrics of an evaluation: it selects the "best" checkpoint.
SCORE = "score"


def metrics_file(path: Path) -> Path:
    """Returns the file of the metrics of a checkpoint, whose folder is the path."""
    return path / "metrics" / "metrics"


def _metrics(path: Path) -> dict[str, float] | None:
    """Returns the metrics of a checkpoint and their score; None if it was not evaluated.

    Raises:
      ValueError: they are damaged.
    """
    file = metrics_file(path)
    try:
        stored = json.loads(file.read_bytes())
        if "digest" in stored:  # an earlier version wrote none, and no file without an evaluation
            stored = unsealed(stored)
        return {**stored, SCORE: float(stored[SCORE])} if stored else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, FileNotFoundError) and not (path / "digests").exists():
            return None
        raise ValueError(f"{file} is damaged: {brief(error)}") from error


def score_of(path: Path) -> float | None:
    """Returns the score of a checkpoint; None if it was not evaluated, or its score is no number.

    Raises:
      ValueError: its metrics are damaged.
    """
    metrics = _metrics(path)
    return metrics[SCORE] if metrics and math.isfinite(metrics[SCORE]) else None


def best_step(folder: Path, steps: list[int]) -> int:
    """Returns the step with the highest score, the latest of several.

    Raises:
      UserError: no checkpoint was evaluated, or the metrics of one are damaged.
    """
    listed = ", ".join(map(str, steps))
    try:
        scores = [(score_of(folder / str(step)), step) for step in steps]
    except ValueError as error:
        raise UserError(
            f"{error}; which checkpoint is best is not known; valid: last, {listed}"
        ) from error
    scored = [(score, step) for score, step in scores if score is not None]
    if not scored:
        raise UserError(f"none of the checkpoints {listed} in {folder} was evaluated")
    return max(scored)[1]
