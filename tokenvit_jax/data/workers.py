"""Iterates over batches that can be made in any order, optionally ahead of time in other processes.

grain's own process prefetch (`mp_prefetch` of grain 0.2.18) makes the same batches, but

- its state has an entry per worker, so a run could not go on with another number of workers; here
  the state is one number;
- its workers go on when their parent is killed, and end when a signal is sent to the process group;
  here they end with their parent, and only then;
- its workers import the program again, which therefore needs a guard (`if __name__ ==
  "__main__":`) and a file; here a program may be typed, piped or a notebook;
- its arrays must fit into /dev/shm, which many containers limit to less than one large batch.

`experiments/input_pipeline` compares the two.
"""

import collections
import contextlib
import logging
import math
import mmap
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain
import numpy as np

from tokenvit_jax.data.batching import Batch, ExampleBatches
from tokenvit_jax.data.record import Spec
from tokenvit_jax.errors import UserError
from tokenvit_jax.stopping import SIGNALS

Specs = dict[str, Spec]

# Smaller arrays come back through a pipe, which is no bottleneck for them.
_MAX_PIPE_BYTES = 64 * 1024
_ALIGNMENT = 8  # alignment of arrays in shared memory [bytes]


class Batches:
    """Iterates over batches in order, with the state `{"next_index": number of returned batches}`.

    Workers live until :meth:`close`, or until neither this object nor an iterator needs them: the
    next iterator uses the workers of one that was closed.

    Args:
      batches: dicts of arrays.
      specs: shapes and types of the arrays of a batch; arrays that are not listed must be small.
      workers: number of processes that make batches ahead of time, at most one per batch; 0: a
        thread of this process.

    Attributes:
      workers: that number.
    """

    def __init__(self, batches: ExampleBatches, specs: Specs, workers: int):
        self._batches = batches
        self._specs = specs
        self.workers = min(workers, len(batches))
        self._pools = []  # those that no iterator uses

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> "BatchIterator":
        return BatchIterator(self)

    def start(self) -> None:
        """Starts the workers of the first iterator, which takes seconds; returns at once."""
        if self.workers and not self._pools:
            self._pools.append(self._new_pool())

    def close(self) -> None:
        """Ends the workers; close the iterators first."""
        while self._pools:
            self._pools.pop().close()

    def open_reader(self, first: int) -> "Reader":
        """Returns an iterator over the batches from a position on."""
        if not self.workers:
            rest = self._batches[first:]
            return iter(rest.to_iter_dataset(grain.ReadOptions(1, prefetch_buffer_size=2)))
        pool = self._pools.pop() if self._pools else self._new_pool()
        pool.restart(first)
        return pool

    def close_reader(self, reader: "Reader") -> None:
        """Takes an iterator back."""
        if isinstance(reader, _Pool):
            self._pools.append(reader)
        else:
            reader.close()

    def _new_pool(self) -> "_Pool":
        return _Pool(self._batches, self._specs, self.workers)


class BatchIterator:
    """See :class:`Batches`; an error in making a batch is raised when the batch is requested.

    Close the iterator when no more batches are needed: at exit, Python waits for unfinished ones.
    """

    def __init__(self, dataset: Batches):
        self._dataset = dataset
        self._next_index = 0
        self._reader = None  # opened at the first batch, because the state may be set before

    def __iter__(self) -> "BatchIterator":
        return self

    def start(self) -> None:
        """Lets the workers begin, before the first batch is requested; returns at once."""
        if self._reader is None:
            self._reader = self._dataset.open_reader(self._next_index)

    def __next__(self) -> Batch:
        self.start()
        try:
            batch = next(self._reader)
        except UserError as error:
            vars(error).pop("__notes__", None)  # grain's, about frames that it has removed
            raise
        self._next_index += 1
        return batch

    def get_state(self) -> dict[str, int]:
        return {"next_index": self._next_index}

    def set_state(self, state: dict[str, int]) -> None:
        self._close_reader()
        self._next_index = state["next_index"]

    def close(self) -> None:
        self._close_reader()

    def _close_reader(self) -> None:
        if self._reader is not None:
            self._dataset.close_reader(self._reader)
            self._reader = None


_PACKAGE = str(Path(__file__).absolute().parents[1] / "__init__.py")
# Runs `tokenvit_jax.worker`. The package is loaded from its file: the path of the parent may name
# its folder relative to another current folder, or lead to another version.
_CODE = """
import sys
from importlib import util
sys.path[:] = {!r}
spec = util.spec_from_file_location("tokenvit_jax", {!r})
sys.modules[spec.name] = package = util.module_from_spec(spec)
spec.loader.exec_module(package)
from tokenvit_jax.worker import main
main({})
"""


class _Pool:
    """Makes batches in worker processes; large arrays come back through shared memory.

    Batch i is made by worker i modulo their number, into slot i modulo the number of slots.
    """

    def __init__(self, batches: ExampleBatches, specs: Specs, workers: int):
        self._num_batches = len(batches)
        shared = {name: spec for name, spec in specs.items() if _num_bytes(spec) > _MAX_PIPE_BYTES}
        pickled = pickle.dumps((batches, shared))
        num_bytes = max(1, sum(map(_padded_bytes, shared.values())))
        source, num_slots = _SharedMemory(len(pickled)), workers + 1
        # One batch is ready while each worker makes another.
        slots = [_SharedMemory(num_bytes) for _ in range(num_slots)]
        source.memory[:] = pickled
        self._workers = [_Worker(source, slots) for _ in range(workers)]
        for memory in (source, *slots):
            os.close(memory.file)
        self._slots = [_arrays(slot.memory, shared) for slot in slots]
        self._next_index = 0  # next batch to request
        self._pending = collections.deque()  # batches that are requested
        self._end = weakref.finalize(self, _end, self._workers)

    def restart(self, first: int) -> None:
        """Goes to a batch; what was requested before is dropped."""
        while self._pending:
            self._receive()
        self._next_index = first
        for _ in self._slots:
            self._request()

    def __next__(self) -> Batch:
        if not self._pending:
            raise StopIteration
        index, (done, result) = self._pending[0], self._receive()
        if not done:
            error, trace = result
            raise error from (RuntimeError(trace) if trace else None)
        slot, (batch, shapes) = self._slots[index % len(self._slots)], result
        batch |= {name: array.reshape(shapes[name]).copy() for name, array in slot.items()}
        self._request()
        return batch

    def close(self) -> None:
        self._end()

    def _request(self) -> None:
        index = self._next_index
        if index < self._num_batches:
            with contextlib.suppress(OSError):  # it died: its result will be missing
                self._worker(index).connection.send((index, index % len(self._slots)))
            self._pending.append(index)
            self._next_index += 1

    def _receive(self) -> Any:
        worker = self._worker(self._pending.popleft())
        try:
            return worker.connection.recv()
        except (EOFError, OSError) as error:
            status = worker.process.wait()
            why = "its error is above"  # on standard error
            if status < 0:  # a signal
                why = "possibly for lack of memory; lower data.workers or the batch size"
            raise UserError(
                f"a worker process of the data pipeline died (status {status}): {why}"
            ) from error

    def _worker(self, index: int) -> "_Worker":
        return self._workers[index % len(self._workers)]


Reader = grain.DatasetIterator | _Pool


class _Worker:
    """A process that runs `tokenvit_jax.worker`, and the connection to it."""

    def __init__(self, source: "_SharedMemory", slots: list["_SharedMemory"]):
        self.connection, theirs = multiprocessing.Pipe()
        # Not multiprocessing.Process, whose workers import the program of their parent.
        code = _CODE.format([*map(str, sys.path)], _PACKAGE, theirs.fileno())
        # The new process inherits what this thread blocks; the worker then ignores the signals.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), source.file, *(slot.file for slot in slots)),
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
        files = [(memory.file, len(memory.memory)) for memory in (source, *slots)]
        with contextlib.suppress(OSError):  # it died: its first result will be missing
            self.connection.send(files)


def _end(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.process.kill()  # it holds nothing that could be lost
    for worker in workers:
        worker.process.wait()
        worker.connection.close()


class _SharedMemory:
    """Memory that worker processes inherit as a file without a name.

    Attributes:
      file: file descriptor; may be closed when the workers are started.
      memory: the memory.
    """

    def __init__(self, num_bytes: int):
        if hasattr(os, "memfd_create"):  # on Linux
            self.file = os.memfd_create("batches")
        else:
            with tempfile.TemporaryFile() as file:
                self.file = os.dup(file.fileno())
        os.ftruncate(self.file, num_bytes)
        self.memory = mmap.mmap(self.file, num_bytes)


def _num_bytes(spec: Spec) -> int:
    return math.prod(spec.shape) * np.dtype(spec.dtype).itemsize


def _padded_bytes(spec: Spec) -> int:
    return -(-_num_bytes(spec) // _ALIGNMENT) * _ALIGNMENT


def _arrays(memory: mmap.mmap, specs: Specs) -> Batch:
    """Returns the arrays that are stored one after another in shared memory."""
    arrays, offset = {}, 0
    for name, spec in specs.items():
        arrays[name] = np.ndarray(spec.shape, spec.dtype, memory, offset)
        offset += _padded_bytes(spec)
    return arrays


def serve(receive: Callable[[], Any], send: Callable[[Any], None]) -> None:
    """Makes batches in a worker process, forever.

    Args:
      receive: returns first (file descriptor, bytes) of the pickled batches and of the slots, then
        pairs (number of the batch, number of the slot).
      send: takes (True, (the small arrays of a batch, the shapes of the others)), or (False,
        (error, its traceback)).
    """
    logging.basicConfig(format="%(levelname)s: %(message)s")
    source, *slots = (mmap.mmap(file, num_bytes) for file, num_bytes in receive())
    try:
        batches, specs = pickle.loads(source)
    except Exception as error:  # a module of the program may raise any error
        send((False, (_not_loaded(error), "")))
        return
    slots = [_arrays(slot, specs) for slot in slots]
    while True:
        index, slot = receive()
        try:
            result = True, batches.write(index, slots[slot])
        except Exception as error:
            result = False, _sendable(error)
        send(result)


def _not_loaded(error: Exception) -> UserError:
    return UserError(
        f"data.workers: a worker process cannot load the data ({type(error).__name__}: {error}); "
        "classes that it needs must be in a module, not in the program itself"
    )


def _sendable(error: Exception) -> tuple[Exception, str]:
    """Returns an error and its traceback, which is "" if the message says everything."""
    if isinstance(error, UserError):
        return UserError(*error.args), ""
    trace = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # an error may hold anything
        error = RuntimeError(f"{type(error).__name__}: {error}")
    return error, trace
