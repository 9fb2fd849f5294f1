"""Iterates over batches that can be made in any order, optionally ahead of time in other processes.

grain's own process prefetch (`mp_prefetch` of grain 0.2.18) makes the same batches, but

- its state has an entry per worker, so a run could not go on with another number of workers; here
  the state is one number;
- its workers go on when their parent is killed; here they end;
- the way from a worker to this process takes about 1.3 times as long (without decoding and
  augmentation, which take far more; with them the two do not differ beyond the noise);
- its arrays must fit into /dev/shm, which many containers limit to less than one large batch; the
  shared memory here falls back to a file in the temporary folder.

`experiments/input_pipeline` has the measurements.
"""

import collections
import ctypes
import logging
import math
import multiprocessing
import os
import pickle
import signal
import threading
from concurrent import futures

import grain
import numpy as np

from tokenvit_jax.data.record import Spec
from tokenvit_jax.errors import UserError

Batch = dict[str, np.ndarray]
Specs = dict[str, Spec]

# Smaller arrays come back through a pipe, which is no bottleneck for them.
_MAX_PIPE_BYTES = 64 * 1024
_ALIGNMENT = 8  # alignment of arrays in shared memory [bytes]


class Batches(grain.IterDataset):
    """Iterates over batches in order, with the state `{"next_index": number of returned batches}`.

    Args:
      batches: dicts of arrays, equal in shapes and types.
      specs: shapes and types of the arrays of a batch; arrays that are not listed must be small.
      workers: number of processes that make batches ahead of time; 0: a thread of this process.
    """

    def __init__(self, batches: grain.MapDataset, specs: Specs, workers: int):
        super().__init__(batches)
        self._batches = batches
        self._specs = specs
        self._workers = workers

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> "BatchIterator":
        return BatchIterator(self._batches, self._specs, self._workers)


class BatchIterator(grain.DatasetIterator):
    """See :class:`Batches`; an error in making a batch is raised when the batch is requested.

    Close the iterator when no more batches are needed: at exit, Python waits for unfinished ones.
    """

    def __init__(self, batches: grain.MapDataset, specs: Specs, workers: int):
        super().__init__()
        self._batches = batches
        self._specs = specs
        self._workers = workers
        self._next_index = 0
        self._reader = None  # opened at the first batch, because the state may be set before

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
            return _WorkerReader(rest, self._specs, self._workers)
        return iter(rest.to_iter_dataset(grain.ReadOptions(1, prefetch_buffer_size=2)))

    def _close_reader(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None


class _WorkerReader:
    """Makes batches in worker processes; large arrays come back through shared memory."""

    def __init__(self, batches: grain.MapDataset, specs: Specs, workers: int):
        _check_guard(workers)
        num_slots = workers + 1  # one batch is ready while each worker makes another
        context = multiprocessing.get_context("spawn")  # JAX's threads do not survive a fork
        shared = {name: spec for name, spec in specs.items() if _num_bytes(spec) > _MAX_PIPE_BYTES}
        num_bytes = max(1, sum(map(_padded_bytes, shared.values())))
        memory = [context.RawArray(ctypes.c_uint8, num_bytes) for _ in range(num_slots)]
        self._slots = [_arrays(slot, shared) for slot in memory]
        # Not as an argument: if a worker ends before it reads arguments that are larger than the
        # buffer of a pipe, this process waits forever (CPython keeps the reading end open).
        pickled = np.frombuffer(pickle.dumps(batches), np.uint8)
        source = context.RawArray(ctypes.c_uint8, len(pickled))
        np.frombuffer(source, np.uint8)[:] = pickled
        self._executor = futures.ProcessPoolExecutor(
            workers, context, initializer=_start_worker, initargs=(source, memory, shared)
        )
        self._num_batches = len(batches)
        self._next_index = 0  # next batch to hand to a worker
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
                "a worker process of the data pipeline died, possibly for lack of memory (lower "
                "data.workers or the batch size), or because a script starts workers outside "
                "`if __name__ == '__main__':`"
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


def _check_guard(workers: int) -> None:
    """Raises UserError in a worker that runs the script again which started it."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise UserError(
            f"data.workers={workers}: workers import the script, which starts more; put its "
            "commands under: if __name__ == '__main__':"
        )


def _num_bytes(spec: Spec) -> int:
    return math.prod(spec.shape) * np.dtype(spec.dtype).itemsize


def _padded_bytes(spec: Spec) -> int:
    return -(-_num_bytes(spec) // _ALIGNMENT) * _ALIGNMENT


def _arrays(memory: ctypes.Array, specs: Specs) -> Batch:
    """Returns the arrays that are stored one after another in shared memory."""
    arrays, offset = {}, 0
    for name, spec in specs.items():
        arrays[name] = np.ndarray(spec.shape, spec.dtype, memory, offset)
        offset += _padded_bytes(spec)
    return arrays


# Set in a worker: the batches, and the slots for their large arrays.
_batches = None
_slots = None


def _start_worker(batches: ctypes.Array, memory: list[ctypes.Array], specs: Specs) -> None:
    global _batches, _slots
    _batches = pickle.loads(batches)
    _slots = [_arrays(slot, specs) for slot in memory]
    logging.basicConfig(format="%(levelname)s: %(message)s")
    # A signal to the whole process group is meant for the parent, which may still need batches.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _make(index: int, slot: int) -> Batch:
    batch = dict(_batches[index])
    for name, array in _slots[slot].items():
        np.copyto(array, batch.pop(name), casting="no")  # another type than the spec is an error
    return batch
