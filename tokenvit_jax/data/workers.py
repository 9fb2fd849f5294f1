"""Iterates over batches that can be made in any order, optionally made ahead by other processes.

Unlike grain's `mp_prefetch`, the state is one number, which does not depend on the number of
workers; and workers end with their parent, however that ends.
"""

import collections
import ctypes
import logging
import math
import multiprocessing
import os
import signal
import threading
from concurrent import futures

import grain
import numpy as np

from tokenvit_jax.errors import UserError

Batch = dict[str, np.ndarray]
Shapes = dict[str, tuple[int, ...]]


class Batches(grain.IterDataset):
    """Batches in order; the state of the iterator is `{"next_index": batches given out}`.

    Args:
        batches: of dicts of arrays, each batch of the same shapes.
        shapes: of the large arrays, such as images; these have type uint8.
        workers: number of processes that make batches ahead; 0: a thread of this process does.
    """

    def __init__(self, batches: grain.MapDataset, shapes: Shapes, workers: int):
        super().__init__(batches)
        self._batches = batches
        self._shapes = shapes
        self._workers = workers

    def __iter__(self) -> "BatchIterator":
        return BatchIterator(self._batches, self._shapes, self._workers)


class BatchIterator(grain.DatasetIterator):
    """See :class:`Batches`; errors of the batches are raised when their turn comes.

    Close it when no more batches are wanted: at exit, Python waits for those that were begun.
    """

    def __init__(self, batches: grain.MapDataset, shapes: Shapes, workers: int):
        super().__init__()
        self._batches = batches
        self._shapes = shapes
        self._workers = workers
        self._next_index = 0
        self._reader = None  # opened at the first batch: the state may be set before

    def __next__(self) -> Batch:
        if self._reader is None:
            self._reader = self._open_reader()
        batch = next(self._reader)
        self._next_index += 1
        return batch

    def get_state(self) -> dict[str, int]:
        return {"next_index": self._next_index}

    def set_state(self, state: dict[str, int]) -> None:
        self._close_reader()
        self._next_index = state["next_index"]

    def close(self) -> None:
        super().close()
        self._close_reader()

    def _open_reader(self) -> "grain.DatasetIterator | _WorkerReader":
        rest = self._batches[self._next_index :]
        if self._workers:
            return _WorkerReader(rest, self._shapes, self._workers)
        return iter(rest.to_iter_dataset(grain.ReadOptions(1, prefetch_buffer_size=2)))

    def _close_reader(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None


class _WorkerReader:
    """Makes batches in processes; large arrays come back through memory that all of them share.

    Through a pipe, the usual way back, batches of 512 took 2 to 8 times as long.
    """

    def __init__(self, batches: grain.MapDataset, shapes: Shapes, workers: int):
        num_slots = workers + 1  # one batch is ready while each worker makes another
        context = multiprocessing.get_context("spawn")  # JAX's threads do not survive a fork
        num_bytes = sum(map(math.prod, shapes.values()))
        memory = [context.RawArray(ctypes.c_uint8, num_bytes) for _ in range(num_slots)]
        self._slots = [_arrays(slot, shapes) for slot in memory]
        self._executor = futures.ProcessPoolExecutor(
            workers, context, initializer=_start_worker, initargs=(batches, memory, shapes)
        )
        self._num_batches = len(batches)
        self._next_index = 0  # to hand to a worker
        self._pending = collections.deque()
        for slot in range(num_slots):
            self._submit(slot)

    def __next__(self) -> Batch:
        if not self._pending:
            raise StopIteration
        slot, future = self._pending.popleft()
        try:
            batch = future.result()
        except futures.BrokenExecutor as error:
            raise UserError(
                "a worker process of the data pipeline died, possibly for lack of memory; lower "
                "data.workers or the batch size"
            ) from error
        batch |= {name: array.copy() for name, array in self._slots[slot].items()}
        self._submit(slot)
        return batch

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _submit(self, slot: int) -> None:
        if self._next_index < self._num_batches:
            self._pending.append((slot, self._executor.submit(_make, self._next_index, slot)))
            self._next_index += 1


def _arrays(memory: ctypes.Array, shapes: Shapes) -> Batch:
    """The arrays of a batch that lie one behind the other in shared memory."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    parts = np.split(np.frombuffer(memory, np.uint8), np.cumsum(sizes)[:-1])
    return {name: part.reshape(shapes[name]) for name, part in zip(shapes, parts, strict=True)}


# In a worker: the batches, and the slots for their large arrays.
_batches = None
_slots = None


def _start_worker(batches: grain.MapDataset, memory: list[ctypes.Array], shapes: Shapes) -> None:
    global _batches, _slots
    _batches = batches
    _slots = [_arrays(slot, shapes) for slot in memory]
    logging.basicConfig(format="%(levelname)s: %(message)s")
    # A signal to the whole group of processes is for the parent, which may still want batches.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _make(index: int, slot: int) -> Batch:
    batch = dict(_batches[index])
    for name, array in _slots[slot].items():
        array[:] = batch.pop(name)
    return batch
