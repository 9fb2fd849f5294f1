"""Tasks: the model, the loss and the metrics that go with a kind of label.

A task is a module with `make_model`, `batch_sums` and `mean_metrics`; the dataset tells which.
"""

from types import ModuleType

from tokenvit_jax.data import DatasetInfo, dataset_info
from tokenvit_jax.tasks import classification, segmentation

TASKS = {"classification": classification, "segmentation": segmentation}


def task_of(dataset: str) -> ModuleType:
    """Returns the task of a dataset.

    Args:
      dataset: one of `tokenvit_jax.data.list_datasets()`.

    Raises:
      UserError: there is no such dataset.
    """
    return TASKS[task_name(dataset_info(dataset))]


def task_name(info: DatasetInfo) -> str:
    """Returns the name of the task that a dataset is for."""
    return "segmentation" if "label_map" in info.fields else "classification"
