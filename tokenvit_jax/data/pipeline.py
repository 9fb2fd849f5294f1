"""From records to batches: order, augmentation, batching, processes, workers, iterator state.

Everything is a function of the position in one endless global stream of records, so a batch does
not depend on how many processes and workers make it, nor on where a run was interrupted.
"""

import functools
import logging
from typing import Any

import grain
import numpy as np
from ml_collections import ConfigDict

from tokenvit_jax.data.check import check_data
from tokenvit_jax.data.examples import MAKERS, EvalImages, EvalMaker, Example, TrainMaker
from tokenvit_jax.data.sources import Source, open_source
from tokenvit_jax.data.workers import Batches, Shapes
from tokenvit_jax.errors import UserError


def train_dataset(
    config: ConfigDict, *, process_index: int = 0, process_count: int = 1
) -> grain.IterDataset:
    """Endless, shuffled, augmented batches of the training split.

    Global batch s holds the records [s B, (s + 1) B) of a stream that passes over the dataset again
    and again, in another order each time; process p takes the p-th part of every batch. With
    `data.repeats` R, a global batch holds ceil(B / R) records up to R times, each time augmented
    anew, in the order a b c d a b c: never two of the same side by side, which Mixup would pair.

    The state of its iterator is the number of batches given out: it does not depend on the number
    of workers or processes.

    Args:
        config: reads `dataset`, `seed`, `batch_size`, `image_size`, `data`, `augment` and
            `token_labels`.
        process_index: which part of each batch to make.
        process_count: number of parts.

    Returns:
        A dataset of dicts, with b = batch_size / process_count: `image` uint8 (b, size, size, 3),
        `skipped` int32 (b,): unreadable records passed over for this place. Classification:
        `label` int32 (b,), with `token_labels.files` also what :meth:`TokenLabelFiles.read`
        returns. Segmentation: `label` uint8 (b, size, size), `IGNORED` where it does not count.

    Raises:
        UserError: for a wrong value in the config or a dataset that is not prepared; when
            iterating, for an unreadable image unless `data.on_corrupt` is "skip".
    """
    info = check_data(config)
    batch = _part(config.batch_size, "batch_size", process_count)
    source = open_source(info.name, info.train_split, config.data.data_dir)
    indices = grain.MapDataset.range(len(source)).seed(config.seed).shuffle().repeat()
    if config.data.repeats > 1:
        indices = _Repeated(indices, config.batch_size, config.data.repeats)
    make = MAKERS[info.task].train(config, info, source)
    skip = config.data.on_corrupt == "skip"
    examples = indices.random_map(_TrainExample(source, make, skip))
    return _batches(examples, make.shapes, batch, process_index, process_count, config)


def eval_dataset(
    config: ConfigDict, *, process_index: int = 0, process_count: int = 1
) -> grain.IterDataset:
    """One pass over the evaluation split, in its order, every record once.

    The last batches are filled up, so that all processes have the same number of full batches.

    Args:
        config: reads `dataset`, `image_size` and `data`.
        process_index: which part of each batch to make.
        process_count: number of parts.

    Returns:
        A dataset of dicts, with b = data.eval_batch_size / process_count: `mask` float32 (b,): 1,
        or 0 for what does not count (filling, unreadable images), and `skipped` int32 (b,): 1 for
        an unreadable image. Classification: `image` uint8 (b, size, size, 3) and `label` int32
        (b,). Segmentation: `image` uint8 (b, H, W, 3), resized and at the top left of a buffer of
        `data.eval_size`; `image_size` int32 (b, 2), how many rows and columns of it are image;
        `label` uint8 (b, h, w), the label map as it is and `IGNORED` beyond it, in a buffer of
        `data.label_size`; `label_size` int32 (b, 2), its rows and columns.

    Raises:
        UserError: as :func:`train_dataset`; when iterating, for a label map that is larger than
            its buffer.
    """
    info = check_data(config)
    source = open_source(info.name, info.eval_split, config.data.data_dir)
    make = MAKERS[info.task].evaluate(config, info, source)
    return _one_pass(config, source, make, process_index, process_count)


def record_dataset(config: ConfigDict) -> grain.IterDataset:
    """One pass over the whole images of a training split with classes, in its order, each once.

    Args:
        config: reads `dataset`, `image_size` and `data`.

    Returns:
        A dataset of the batches of :func:`eval_dataset`; every image is squeezed into a square.

    Raises:
        UserError: as :func:`train_dataset`; for a dataset without a class per image.
    """
    info = check_data(config)
    if info.task != "classification":
        raise UserError(f"dataset {info.name!r} has label maps; valid: one with a class per image")
    source = open_source(info.name, info.train_split, config.data.data_dir)
    return _one_pass(config, source, EvalImages(config, info, source, whole=True))


def _one_pass(
    config: ConfigDict,
    source: Source,
    make: EvalMaker,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.IterDataset:
    batch = _part(config.data.eval_batch_size, "data.eval_batch_size", process_count)
    num_batches = -(-len(source) // config.data.eval_batch_size)
    skip = config.data.on_corrupt == "skip"
    examples = grain.MapDataset.range(num_batches * config.data.eval_batch_size).map(
        _EvalExample(source, make, skip)
    )
    return _batches(examples, make.shapes, batch, process_index, process_count, config)


def _batches(
    examples: grain.MapDataset,
    shapes: Shapes,
    batch: int,
    process_index: int,
    process_count: int,
    config: ConfigDict,
) -> Batches:
    batches = examples.batch(batch)[process_index::process_count]
    shapes = {name: (batch, *shape) for name, shape in shapes.items()}
    return Batches(batches, shapes, config.data.workers)


def _part(batch_size: int, name: str, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count:
        valid = f"positive multiples of the number of processes, {process_count}"
        raise UserError(f"{name}={batch_size}; valid: {valid}")
    return batch_size // process_count


class _Repeated(grain.MapDataset):
    """Each batch goes round and round over the next ceil(batch_size / repeats) elements."""

    def __init__(self, parent: grain.MapDataset, batch_size: int, repeats: int):
        super().__init__(parent)
        self._batch_size = batch_size
        self._distinct = -(-batch_size // repeats)

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, position: int) -> Any:
        batch, place = divmod(position, self._batch_size)
        return self._parent[batch * self._distinct + place % self._distinct]


class _TrainExample(grain.transforms.RandomMap):
    """Reads a record and makes an example of it, given its index."""

    def __init__(self, source: Source, make: TrainMaker, skip: bool):
        self._source = source
        self._make = make
        self._skip = skip

    def random_map(self, index: int, rng: np.random.Generator) -> Example:
        for skipped in range(len(self._source)):
            record = (index + skipped) % len(self._source)
            try:
                image, label = self._source.read(record)
            except UserError as error:
                _pass_over(error, self._skip)
                continue
            return self._make(record, image, label, rng) | {"skipped": np.int32(skipped)}
        raise UserError(f"none of the {len(self._source)} records can be read")


class _EvalExample(grain.transforms.Map):
    """Reads a record and makes an example of it, given its index; beyond the last one: filling."""

    def __init__(self, source: Source, make: EvalMaker, skip: bool):
        self._source = source
        self._make = make
        self._skip = skip

    def map(self, index: int) -> Example:
        if index >= len(self._source):
            return self._no_record(skipped=0)
        try:
            image, label = self._source.read(index)
        except UserError as error:
            _pass_over(error, self._skip)
            return self._no_record(skipped=1)
        example = self._make(index, image, label)
        return example | {"mask": np.float32(1), "skipped": np.int32(0)}

    def _no_record(self, skipped: int) -> Example:
        return self._make.empty() | {"mask": np.float32(0), "skipped": np.int32(skipped)}


def _pass_over(error: UserError, skip: bool) -> None:
    if not skip:
        raise UserError(f'{error}; data.on_corrupt="skip" passes over it') from error
    _warn_once(str(error))


@functools.cache
def _warn_once(message: str) -> None:
    """Warns once per record and process that reads."""
    logging.getLogger(__name__).warning("skipped %s", message)
