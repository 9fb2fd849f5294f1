"""Checks training batches, keeps them ready on the devices, and measures the wait for them."""

import contextlib
import hashlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from tokenvit_jax.data.cores import Cores, own_cores, share_of_cores
from tokenvit_jax.errors import UserError
from tokenvit_jax.tasks import Task

MAX_WAIT = 0.1  # share of the time without data from which there is a warning
FIRST_CHECK_SECONDS = 10.0  # time that is measured before the first warning
NEXT_CHECK_SECONDS = 600.0  # and after each warning, before the next one
_MAX_CORES = 4096  # of a host


def check_train_batch(task: Task, devices: int | None = None) -> None:
    """Raises UserError unless a training batch, and groups for BatchNorm, fit the devices.

    Args:
      task: task whose configuration has `batch_size`, `accumulate_steps` and overrides.
      devices: number of devices; None: those that are available.
    """
    devices, config = devices or jax.device_count(), task.config
    group = task.images_per_group
    if config.batch_size % (devices * config.accumulate_steps * group):
        grouped = f" x {group} images of a group" if group > 1 else ""
        raise UserError(
            f"config.batch_size={config.batch_size} is not a multiple of {devices} devices x "
            f"{config.accumulate_steps} accumulate_steps{grouped}"
        )
    for name in {"model_overrides", "head_overrides"} & set(config):
        group = config[name].get("batch_norm", "global")
        if isinstance(group, int) and group > 0 and devices % group:
            raise UserError(
                f"config.{name}.batch_norm={group} does not divide the number of devices, "
                f"{devices}; valid: a divisor, global or local"
            )
    task.check_devices(devices)


def cores_of_process() -> int:
    """Returns the cores for the workers of this process; every process must call this.

    The processes of a host divide the cores that several of them may use.
    """
    own = own_cores()
    if jax.process_count() == 1:
        return share_of_cores(own, [own])
    names = [hashlib.sha256(name.encode()).digest() for name in (own.host, own.container)]
    usable = np.packbits(np.isin(np.arange(_MAX_CORES), list(own.numbers)))
    row = np.concatenate([np.frombuffer(b"".join(names), np.uint8), usable])
    rows = np.asarray(multihost_utils.process_allgather(row))
    everyone = [_read_cores(*np.split(row, np.cumsum([*map(len, names)]))) for row in rows]
    mine = everyone[jax.process_index()]._replace(quota=own.quota)
    return share_of_cores(mine, everyone)


def _read_cores(host: np.ndarray, container: np.ndarray, usable: np.ndarray) -> Cores:
    numbers = frozenset(np.flatnonzero(np.unpackbits(usable)).tolist())
    return Cores(host.tobytes().hex(), numbers, container=container.tobytes().hex())


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


class DataWait:
    """Measures how long the devices compute nothing because the next batch is missing.

    Steps are computed while the host goes on, so the time until a batch comes is no loss as long as
    the devices still compute. The wait for a batch begins when it is requested or, if that is
    later, when the devices have ended the last step; it ends when the batch is on its way to the
    devices. Waits are those of this process: its devices may also wait for those of others.

    A thread notes when steps end, because the host waits for the batch at that time. An error in a
    step is raised where its results are read.

    Attributes:
      seconds: sum of all waits.
    """

    def __init__(self):
        self.seconds = 0.0
        self._started = queue.SimpleQueue()  # (number, results) of steps; None: no more
        self._num_started = 0
        self._ended = 0, 0.0  # number of the step that ended last, and time
        self._thread = threading.Thread(target=self._note_ends, name="ends of steps", daemon=True)
        self._thread.start()

    def next(self, batches: Iterator[Any]) -> Any:
        """Returns the next batch."""
        requested = time.monotonic()
        batch = next(batches)
        number, ended = self._ended
        if number == self._num_started:  # the devices have ended all steps
            self.seconds += time.monotonic() - max(requested, ended)
        return batch

    def started(self, results: Any) -> None:
        """Notes that a step was started.

        Args:
          results: arrays that the step computes and that no other step consumes.
        """
        self._num_started += 1
        self._started.put((self._num_started, results))

    def close(self) -> None:
        """Waits until all steps have ended, and ends the thread.

        A thread that still holds an array when Python ends aborts the process: jax takes Python's
        lock to delete the array, and a thread that asks for the lock then is stopped where C++ does
        not allow it.
        """
        self._started.put(None)
        self._thread.join()

    def _note_ends(self) -> None:
        while (step := self._started.get()) is not None:
            number, results = step
            with contextlib.suppress(Exception):  # see above
                jax.block_until_ready(results)
            self._ended = number, time.monotonic()


class WaitWarning:
    """Warns when the devices wait for data too long, and says what to change.

    The first warning needs 10 measured seconds, and each further one another 10 minutes.

    Args:
      workers: number of workers of this process.
      cores: number of cores for the workers of this process.
    """

    def __init__(self, workers: int, cores: int):
        self._workers, self._cores = workers, cores
        self._waited = self._elapsed = 0.0
        self._needed = FIRST_CHECK_SECONDS

    def add(self, waited: float, elapsed: float) -> None:
        """Adds an interval.

        Args:
          waited: see :class:`DataWait` [s].
          elapsed: length of the interval [s].
        """
        self._waited += waited
        self._elapsed += elapsed
        if self._elapsed < self._needed:
            return
        share = self._waited / self._elapsed
        self._waited = self._elapsed = 0.0
        if share > MAX_WAIT:
            self._needed = NEXT_CHECK_SECONDS
            logging.warning("the devices wait for data %.0f %% of the time: %s", 100 * share, self)

    def __str__(self) -> str:
        """Returns what to change."""
        now, cores = self._workers, self._cores
        if now < cores:
            return f"raise config.data.workers from {now} to {cores}, or set it to 'auto'"
        return (
            f"{now} workers on {cores} {'core' if cores == 1 else 'cores'} are not enough; use "
            "more cores, less augmentation, or images that are stored at a smaller size"
        )
