"""Makes tasks with any number of classes, so that models can be small."""

import dataclasses

from ml_collections import ConfigDict

from tokenvit_jax.config import base_config
from tokenvit_jax.data import Source, open_split
from tokenvit_jax.tasks import Task, create_task
from tokenvit_jax.training.validate import check_task


def make_task(config: ConfigDict, num_classes: int = 0, axis_name: str | None = None) -> Task:
    """Returns the task of a configuration; `num_classes` 0 means the dataset's own number."""
    task = create_task(config, axis_name)
    if not num_classes:
        return task
    info = dataclasses.replace(task.info, num_classes=num_classes, classes=None)
    return dataclasses.replace(task, info=info)


def check_config(config: ConfigDict) -> None:
    """Raises UserError for the first invalid entry of a configuration."""
    check_task(create_task(config))


def open_dataset(name: str, split: str, data_dir: str = "", **data: object) -> Source:
    """Returns a split of a dataset; `data` holds further entries of `config.data`."""
    config = base_config()
    config.dataset = name
    config.data.update({"data_dir": data_dir, **data})
    return open_split(config, split)
