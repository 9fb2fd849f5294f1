"""Trains the networks of an experiment into folders, which are read or go on the next time."""

from pathlib import Path

from ml_collections import ConfigDict

from tokenvit_jax.training.loop import train
from tokenvit_jax.training.train_log import read_metrics


def trained(config: ConfigDict, workdir: Path, metric: str) -> dict[str, float]:
    """Trains unless the folder holds the finished run; returns the metrics after the last step.

    Args:
      config: configuration of the training, with an evaluation after the last step.
      workdir: folder of the run.
      metric: a metric of the evaluation, such as "eval/ap".
    """
    for _ in range(2):
        lines = read_metrics(workdir) if workdir.exists() else []
        for metrics in lines:
            if metrics["step"] == config.num_steps and metric in metrics:
                return metrics
        train(config, workdir)
    raise AssertionError(f"{workdir} was stopped")
