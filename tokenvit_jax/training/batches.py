"""Checks training batches and keeps them ready on the devices."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import jax

from tokenvit_jax.errors import UserError
from tokenvit_jax.tasks import Task


def check_train_batch(task: Task, devices: int | None = None) -> None:
    """Raises UserError unless a training batch, and groups for BatchNorm, fit the devices.

    Args:
      task: task whose configuration has `batch_size`, `accumulate_steps` and `model_overrides`.
      devices: number of devices; None: those that are available.
    """
    devices, config = devices or jax.device_count(), task.config
    if config.batch_size % (devices * config.accumulate_steps):
        raise UserError(
            f"config.batch_size={config.batch_size} is not a multiple of {devices} devices x "
            f"{config.accumulate_steps} accumulate_steps"
        )
    group = config.model_overrides.get("batch_norm", "global")
    if isinstance(group, int) and group > 0 and devices % group:
        raise UserError(
            f"config.model_overrides.batch_norm={group} does not divide the number of devices, "
            f"{devices}; valid: a divisor, global or local"
        )
    task.check_devices(devices)


def prefetch(iterator: Any, put: Callable, *, size: int = 2) -> Iterator[tuple[Any, dict]]:
    """Keeps batches ready on the devices.

    Args:
      iterator: iterator over batches, with a method `get_state()`.
      put: moves a batch to the devices.
      size: number of batches to hold.

    Yields:
      Each batch with the state of the iterator just after this batch. The iterator itself has
      already read further batches.
    """
    ready = deque()
    while True:
        while len(ready) < size:
            batch = put(next(iterator))
            ready.append((batch, iterator.get_state()))
        yield ready.popleft()
