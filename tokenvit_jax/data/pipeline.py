"""Turns records into batches: order, augmentation, processes, workers and iterator state.

A batch is a function of its position in one endless global stream of records. It depends neither on
the number of processes and workers that make it, nor on where a run was interrupted.
"""

import contextlib
import functools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from ml_collections import ConfigDict

from tokenvit_jax.config import AUTO
from tokenvit_jax.data.batching import ExampleBatches
from tokenvit_jax.data.check import check_data
from tokenvit_jax.data.cores import own_cores, share_of_cores
from tokenvit_jax.data.decoding import UndecodableError
from tokenvit_jax.data.record import Examples, Source, Spec
from tokenvit_jax.data.workers import Batches
from tokenvit_jax.errors import UserError

Example = dict[str, np.ndarray]

NO_RECORD = -1  # `index` of an example that fills the last batch


def train_batches(
    source: Source,
    examples: Examples,
    config: ConfigDict,
    *,
    process_index: int = 0,
    process_count: int = 1,
    cores: int | None = None,
) -> Batches:
    """Returns endless, shuffled, augmented batches of a split.

    Global batch s holds the records [s B, (s + 1) B) of a stream that passes over the split again
    and again, in a new order each time; process p takes the p-th part of every batch. With
    `data.repeats` R, a global batch holds ceil(B / R) records up to R times each, with a new
    augmentation each time, in the order a b c d a b c: equal records are never neighbours, because
    Mixup would pair them.

    If the examples have two canvases, all records of a batch have the same one. Each pass over the
    split then has a batch of a canvas for every B of its records, in random order; what is missing
    in the last one comes from the next pass.

    The iterator's state is the number of batches it has returned; it does not depend on the number
    of workers or processes.

    Args:
      source: the records.
      examples: turns records into examples.
      config: provides `seed`, `batch_size`, `data.repeats`, `data.workers` and `data.on_corrupt`.
      process_index: number of this process, which makes this part of each batch.
      process_count: number of processes.
      cores: number of workers if `data.workers` is "auto"; None: as many as this process may use
        cores.

    Returns:
      A dataset of dicts, with b = batch_size / process_count: the arrays of `examples.specs`, (b,
      *shape) each; `index` int32 (b,), the records' numbers in the source; `skipped` int32 (b,),
      the number of unreadable records that were skipped to fill this place.

    Raises:
      UserError: a value of the config is not valid. During iteration: a record cannot be read and
        `data.on_corrupt` is not "skip", or a record does not fit.
    """
    check_data(config)
    batch = _part(config.batch_size, "batch_size", process_count)
    distinct = -(-config.batch_size // config.data.repeats)
    groups = _groups(source, examples)
    indices = _shuffled(len(source), groups, distinct, config.seed)
    if config.data.repeats > 1:
        indices = _Repeated(indices, config.batch_size, distinct)
    skip = config.data.on_corrupt == "skip"
    parts = indices.random_map(_TrainExample(source, examples, groups, skip))
    parts = ExampleBatches(parts, batch, process_index, process_count)
    return Batches(parts, _batch_specs(examples, batch), _num_workers(config, cores))


def eval_batches(
    source: Source,
    examples: Examples,
    config: ConfigDict,
    *,
    devices: int = 1,
    process_index: int = 0,
    process_count: int = 1,
    cores: int | None = None,
) -> Batches:
    """Returns the batches of one pass over a split, in its order, every record once.

    The last batches are filled with empty examples, so that all processes have the same number of
    full batches.

    Args:
      source: the records.
      examples: turns records into examples.
      config: provides `data.eval_batch_size`, `data.workers` and `data.on_corrupt`.
      devices: number of devices of all processes; a batch has the next multiple of it as its size.
      process_index: number of this process, which makes this part of each batch.
      process_count: number of processes.
      cores: number of workers if `data.workers` is "auto"; None: as many as this process may use
        cores.

    Returns:
      A dataset of dicts, with b = (data.eval_batch_size, rounded up) / process_count: the arrays
      of `examples.specs`, (b, *shape) each; `index` int32 (b,), the records' numbers in the source,
      -1 for filling; `mask` float32 (b,), 1 for a record, 0 for filling and for an unreadable
      record; `skipped` int32 (b,), 1 for an unreadable record.

    Raises:
      UserError: as in :func:`train_batches`.
    """
    check_data(config)
    whole = -(-config.data.eval_batch_size // devices) * devices
    batch = _part(whole, "data.eval_batch_size", process_count)
    indices = grain.MapDataset.range(-(-len(source) // whole) * whole)
    skip = config.data.on_corrupt == "skip"
    parts = indices.map(_EvalExample(source, examples, skip))
    parts = ExampleBatches(parts, batch, process_index, process_count)
    return Batches(parts, _batch_specs(examples, batch), _num_workers(config, cores))


def check_records(source: Source, examples: Examples, config: ConfigDict) -> None:
    """Raises UserError for a fault of a split that shows without reading all of it.

    The first and the last record must become examples for evaluation. With `data.on_corrupt`
    "skip", at least one record of the split must.

    Args:
      source: the records.
      examples: turns records into examples.
      config: reads `data.on_corrupt`.
    """
    if not len(source):
        raise UserError(f"config.dataset={config.dataset!r}: a split holds no records")
    example = _EvalExample(source, examples, config.data.on_corrupt == "skip")
    if config.data.on_corrupt != "skip":
        for index in (0, len(source) - 1):
            example.map(index)
    elif not any(example.map(index)["mask"] for index in range(len(source))):
        raise UserError(_none_readable(source))


def _none_readable(source: Source) -> str:
    return f"none of the {len(source)} records can be read, from {source.name(0)} on"


def _num_workers(config: ConfigDict, cores: int | None) -> int:
    if config.data.workers != AUTO:
        return config.data.workers
    own = own_cores()
    return share_of_cores(own, [own]) if cores is None else cores


def _batch_specs(examples: Examples, batch: int) -> dict[str, Spec]:
    return {name: Spec((batch, *spec.shape), spec.dtype) for name, spec in examples.specs.items()}


def _part(batch_size: int, name: str, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count:
        valid = f"positive multiples of the number of processes, {process_count}"
        raise UserError(f"config.{name}={batch_size} is not valid; valid: {valid}")
    return batch_size // process_count


def _groups(source: Source, examples: Examples) -> list[np.ndarray]:
    """Returns the records of each canvas, in order; [] if all have the same."""
    if len(getattr(examples, "canvases", ())) < 2:
        return []
    if not hasattr(source, "portrait"):
        raise UserError(
            f"the dataset does not tell which images are higher than wide: {type(source).__name__} "
            "has no portrait(); valid without it: a square config.image_size"
        )
    portrait = source.portrait()
    return [group for group in map(np.flatnonzero, (~portrait, portrait)) if len(group)]


def _shuffled(
    count: int, groups: Sequence[np.ndarray], batch_size: int, seed: int
) -> grain.MapDataset:
    """Returns an endless stream of the records, in a new order in every pass."""
    if not groups:
        return grain.MapDataset.range(count).seed(seed).shuffle().repeat()
    streams = [
        grain.MapDataset.range(len(group)).seed((seed + i) % 2**32).shuffle().repeat()
        for i, group in enumerate(groups)
    ]
    return _InGroups(streams, groups, batch_size, seed)


class _InGroups(grain.MapDataset):
    """Fills each batch with elements of one group; the groups take turns at random."""

    def __init__(
        self,
        streams: Sequence[grain.MapDataset],
        groups: Sequence[np.ndarray],
        batch_size: int,
        seed: int,
    ):
        super().__init__(streams)
        self._groups, self._batch_size, self._seed = groups, batch_size, seed
        self._batches = [-(-len(group) // batch_size) for group in groups]  # in a pass

    def __len__(self) -> int:
        return len(self._parents[0])

    def __getitem__(self, position: int) -> Any:
        batch, place = divmod(position, self._batch_size)
        number, batch = divmod(batch, sum(self._batches))
        order = self._order_of(number)
        group = order[batch]
        earlier = number * self._batches[group] + int((order[:batch] == group).sum())
        stream = self._parents[group]
        return self._groups[group][stream[earlier * self._batch_size + place]]

    def _order_of(self, number: int) -> np.ndarray:
        """Returns the group of every batch of a pass."""
        rng = np.random.default_rng((self._seed, number))
        return rng.permutation(np.repeat(np.arange(len(self._groups)), self._batches))


class _Repeated(grain.MapDataset):
    """Fills each batch with the next few distinct elements, again and again."""

    def __init__(self, parent: grain.MapDataset, batch_size: int, distinct: int):
        super().__init__(parent)
        self._batch_size = batch_size
        self._distinct = distinct

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, position: int) -> Any:
        batch, place = divmod(position, self._batch_size)
        return self._parent[batch * self._distinct + place % self._distinct]


class _TrainExample(grain.transforms.RandomMap):
    """Returns the example of the record with an index, or of the next one that can be read."""

    def __init__(
        self, source: Source, examples: Examples, groups: Sequence[np.ndarray], skip: bool
    ):
        self._source = source
        self._examples = examples
        self._groups = groups
        self._skip = skip

    def random_map(self, index: int, rng: np.random.Generator) -> Example:
        group, place = range(len(self._source)), index
        for group in self._groups:
            place = int(np.searchsorted(group, index))
            if place < len(group) and group[place] == index:
                break
        for skipped in range(len(group)):
            number = int(group[(place + skipped) % len(group)])
            example = _read_example(self._source, self._examples, number, rng, self._skip)
            if example is not None:
                return example | {"index": np.int32(number), "skipped": np.int32(skipped)}
        raise UserError(_none_readable(self._source))


class _EvalExample(grain.transforms.Map):
    """Returns the example of the record with an index; filling beyond the last record."""

    def __init__(self, source: Source, examples: Examples, skip: bool):
        self._source = source
        self._examples = examples
        self._skip = skip

    def map(self, index: int) -> Example:
        if index >= len(self._source):
            return self._examples.empty() | _counts(NO_RECORD, mask=0, skipped=0)
        example = _read_example(self._source, self._examples, index, None, self._skip)
        if example is None:
            return self._examples.empty() | _counts(index, mask=0, skipped=1)
        return example | _counts(index, mask=1, skipped=0)


def _counts(index: int, mask: int, skipped: int) -> Example:
    return {"index": np.int32(index), "mask": np.float32(mask), "skipped": np.int32(skipped)}


def _read_example(
    source: Source, examples: Examples, index: int, rng: np.random.Generator | None, skip: bool
) -> Example | None:
    """Returns the example of a record; None if the record cannot be read and is passed over."""
    try:
        record = source.read(index)
    except UserError as error:
        return _pass_over(error, skip)
    try:
        with _named(source, index):
            return examples(record, rng)
    except UndecodableError as error:  # damage that shows when the pixels are needed
        return _pass_over(error, skip)


@contextlib.contextmanager
def _named(source: Source, index: int) -> Iterator[None]:
    """Prepends the record's name to the message of a UserError."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{source.name(index)}: {error}") from error


def _pass_over(error: UserError, skip: bool) -> None:
    if not skip:
        raise UserError(f'{error}; data.on_corrupt="skip" passes over it') from error
    _warn_once(str(error))


@functools.cache
def _warn_once(message: str) -> None:
    """Logs a warning, once per record and reading process."""
    logging.getLogger(__name__).warning("skipped %s", message)
