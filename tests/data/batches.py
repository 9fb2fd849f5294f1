"""Makes batches of a configuration's dataset, or of other records in its place."""

from pathlib import Path

from ml_collections import ConfigDict

from tokenvit_jax.data import Source, eval_batches, open_split, train_batches
from tokenvit_jax.data.workers import Batches
from tokenvit_jax.tasks import create_task


def train_dataset(config: ConfigDict, source: Source | None = None, **process: int) -> Batches:
    """Returns batches for training; `source` replaces the training split."""
    task = create_task(config)
    source = source or open_split(config, task.info.train_split)
    return train_batches(source, task.examples(train=True), config, **process)


def eval_dataset(config: ConfigDict, source: Source | None = None, **process: int) -> Batches:
    """Returns batches for evaluation; `source` replaces the evaluation split."""
    task = create_task(config)
    source = source or open_split(config, task.info.eval_split)
    return eval_batches(source, task.examples(train=False), config, **process)


def children(pid):
    """Returns the ids of the processes that a process has started and not yet waited for."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return {int(child) for task in tasks for child in task.read_text().split()}
