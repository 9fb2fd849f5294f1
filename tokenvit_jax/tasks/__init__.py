"""Registers the tasks: each has one folder and one line of `TASKS`."""

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from tokenvit_jax.config import ENTRIES, Entry, check_entries, make_config
from tokenvit_jax.data import dataset_info, datasets_with
from tokenvit_jax.errors import UserError, did_you_mean
from tokenvit_jax.tasks.classification import Classification
from tokenvit_jax.tasks.depth import Depth
from tokenvit_jax.tasks.detection import Detection
from tokenvit_jax.tasks.masks import Masks
from tokenvit_jax.tasks.pose import Pose
from tokenvit_jax.tasks.segmentation import Segmentation
from tokenvit_jax.tasks.task import Aux, Meter, Outcome, Prediction, Task
from tokenvit_jax.valid import OneOf, shown

TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "segmentation": Segmentation,
    "depth": Depth,
    "detection": Detection,
    "masks": Masks,
    "pose": Pose,
}

__all__ = [
    "TASKS",
    "Aux",
    "Classification",
    "Depth",
    "Detection",
    "Masks",
    "Meter",
    "Outcome",
    "Pose",
    "Prediction",
    "Segmentation",
    "Task",
    "check_values",
    "create_task",
    "default_config",
    "entries_of",
    "tasks_with",
]


def default_config(task: str) -> ConfigDict:
    """Returns the configuration that all others of a task start from.

    The configuration is locked: it refuses misspelt entries and entries of other tasks. Only the
    arguments of models and heads (`model_overrides`, `head_overrides`) can be added.

    Args:
      task: a key of `TASKS`.

    Raises:
      UserError: there is no such task.
    """
    config = make_config(entries_of(task))
    config.lock()
    for key in config:
        if key.endswith("_overrides"):
            config[key].unlock()
    return config


def entries_of(task: str) -> dict[str, Entry]:
    """Returns all entries of a task's configuration by key, such as "data.workers".

    Args:
      task: a key of `TASKS`.

    Raises:
      UserError: there is no such task.
    """
    if not isinstance(task, str) or task not in TASKS:
        hint = did_you_mean(task, TASKS) if isinstance(task, str) else ""
        raise UserError(f"config.task={shown(task)} is not valid{hint}; valid: {', '.join(TASKS)}")
    own = Entry(task, "name of the task", OneOf(tuple(TASKS)))
    return {"task": own, **ENTRIES, **TASKS[task].entries}


def check_values(config: ConfigDict) -> None:
    """Raises UserError for the first entry of a configuration whose value is not valid by itself.

    Args:
      config: configuration that has all entries of its task.
    """
    check_entries(config, entries_of(config.task))


def create_task(config: ConfigDict, axis_name: str | None = None) -> Task:
    """Returns the task of a configuration.

    Args:
      config: configuration that starts from :func:`default_config`.
      axis_name: axis of `jax.pmap` over which a batch is split; None under `jax.jit`.

    Raises:
      UserError: the task or the dataset is unknown, or the dataset lacks the labels that the task
        reads.
    """
    missing = sorted(_keys(default_config(config.task)) - _keys(config))
    if missing:
        raise UserError(
            f"config.task={config.task!r} needs the entry config.{missing[0]}, which this "
            f"configuration does not have; start from tasks.default_config({config.task!r})"
        )
    cls, info = TASKS[config.task], dataset_info(config)
    if not cls.reads <= info.fields:
        missing = ", ".join(sorted(cls.reads - info.fields))
        raise UserError(
            f"config.dataset={config.dataset!r} has no {missing}, which config.task="
            f"{config.task!r} reads; valid: {', '.join(datasets_with(cls.reads))}"
        )
    return cls(config, info, axis_name)


def tasks_with(key: str) -> list[str]:
    """Returns the tasks whose configuration has an entry, or a group of entries, of this name.

    Args:
      key: name of the entry or group, such as "augment.crop_scale" or "mix".
    """
    return [
        name
        for name in TASKS
        if any(f"{other}.".startswith(f"{key}.") for other in entries_of(name))
    ]


def _keys(config: ConfigDict) -> set[str]:
    return set(flatten_dict(config.to_dict(), sep="."))
