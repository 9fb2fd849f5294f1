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

from tokenvit_jax.data.sources import Source, dataset_info, open_source
from tokenvit_jax.data.token_labels import CELL_SIZE, TokenLabelFiles, grid_size
from tokenvit_jax.data.transforms import draw_view, eval_image, train_image, whole_image
from tokenvit_jax.data.workers import Batches
from tokenvit_jax.errors import UserError

MIN_IMAGE_SIZE = CELL_SIZE  # pixels: one cell of the last map

Example = dict[str, np.ndarray]


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
        `label` int32 (b,), `skipped` int32 (b,): unreadable records passed over for this place.
        With `token_labels.files` also what :meth:`TokenLabelFiles.read` returns.

    Raises:
        UserError: for a wrong value in the config or a dataset that is not prepared; when
            iterating, for an unreadable image unless `data.on_corrupt` is "skip".
    """
    _check(config)
    batch = _part(config.batch_size, "batch_size", process_count)
    size = config.image_size
    info = dataset_info(config.dataset)
    source = open_source(info.name, info.train_split, config.data.data_dir)
    indices = grain.MapDataset.range(len(source)).seed(config.seed).shuffle().repeat()
    if config.data.repeats > 1:
        indices = _Repeated(indices, config.batch_size, config.data.repeats)
    skip = config.data.on_corrupt == "skip"
    token_labels = None
    if config.token_labels.weight and config.token_labels.files:
        files = config.token_labels.files
        token_labels = TokenLabelFiles(files, len(source), info.num_classes)
    example = _TrainExample(source, size, config.augment, skip, token_labels)
    examples = indices.random_map(example)
    batches = examples.batch(batch)[process_index::process_count]
    return Batches(batches, (batch, size, size, 3), config.data.workers)


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
        A dataset of dicts, with b = data.eval_batch_size / process_count: `image` uint8
        (b, size, size, 3), `label` int32 (b,), `mask` float32 (b,): 1, or 0 for what does not
        count (filling, unreadable images), `skipped` int32 (b,): 1 for an unreadable image.

    Raises:
        UserError: as :func:`train_dataset`.
    """
    info = dataset_info(config.dataset)
    crop = config.data.eval_crop if info.center_crop else 1.0
    transform = functools.partial(eval_image, size=config.image_size, crop=crop)
    return _one_pass(config, info.eval_split, transform, process_index, process_count)


def record_dataset(config: ConfigDict) -> grain.IterDataset:
    """One pass over the whole images of the training split, in its order, every record once.

    Args:
        config: reads `dataset`, `image_size` and `data`.

    Returns:
        A dataset of the batches of :func:`eval_dataset`; every image is squeezed into a square.

    Raises:
        UserError: as :func:`train_dataset`.
    """
    transform = functools.partial(whole_image, size=config.image_size)
    return _one_pass(config, dataset_info(config.dataset).train_split, transform)


def _one_pass(
    config: ConfigDict,
    split: str,
    transform: Any,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.IterDataset:
    _check(config)
    batch = _part(config.data.eval_batch_size, "data.eval_batch_size", process_count)
    size = config.image_size
    source = open_source(config.dataset, split, config.data.data_dir)
    skip = config.data.on_corrupt == "skip"
    num_batches = -(-len(source) // config.data.eval_batch_size)
    examples = grain.MapDataset.range(num_batches * config.data.eval_batch_size).map(
        _EvalExample(source, transform, size, skip)
    )
    batches = examples.batch(batch)[process_index::process_count]
    return Batches(batches, (batch, size, size, 3), config.data.workers)


def _check(config: ConfigDict) -> None:
    if config.image_size < MIN_IMAGE_SIZE:
        raise UserError(f"image_size={config.image_size} is below {MIN_IMAGE_SIZE}")
    if not 0 <= config.seed < 2**32:
        raise UserError(f"seed={config.seed}; valid: 0 to {2**32 - 1}")
    if config.data.on_corrupt not in ("raise", "skip"):
        raise UserError(f"data.on_corrupt={config.data.on_corrupt!r}; valid: 'raise', 'skip'")
    if config.data.workers < 0:
        raise UserError(f"data.workers={config.data.workers}; valid: 0 or more")
    if not 0 < config.data.eval_crop <= 1:
        raise UserError(f"data.eval_crop={config.data.eval_crop}; valid: above 0, up to 1")
    repeats = config.data.repeats
    if repeats < 1 or (repeats > 1 and repeats >= config.batch_size):
        raise UserError(
            f"data.repeats={repeats}; valid: 1, or more below batch_size={config.batch_size}"
        )


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
    """Reads and augments a record and the labels of its cells, if any, given its index."""

    def __init__(
        self,
        source: Source,
        size: int,
        augment: ConfigDict,
        skip: bool,
        token_labels: TokenLabelFiles | None,
    ):
        self._source = source
        self._size = size
        self._augment = augment
        self._skip = skip
        self._token_labels = token_labels

    def random_map(self, index: int, rng: np.random.Generator) -> Example:
        for skipped in range(len(self._source)):
            record = (index + skipped) % len(self._source)
            try:
                image, label = self._source.read(record)
            except UserError as error:
                _pass_over(error, self._skip)
                continue
            view = draw_view(*image.size, self._augment, rng)
            pixels = train_image(image, self._size, self._augment, rng, view)
            example = _example(pixels, label, skipped=skipped)
            if self._token_labels:
                grid = grid_size(self._size)
                example |= self._token_labels.read(record, view, *image.size, grid)
            return example
        raise UserError(f"none of the {len(self._source)} records can be read")


class _EvalExample(grain.transforms.Map):
    """Reads and transforms a record, given its index; beyond the last one: filling."""

    def __init__(self, source: Source, transform: Any, size: int, skip: bool):
        self._source = source
        self._transform = transform
        self._empty = np.zeros((size, size, 3), np.uint8)
        self._skip = skip

    def map(self, index: int) -> Example:
        mask = np.float32(index < len(self._source))
        if not mask:
            return _example(self._empty, 0, skipped=0) | {"mask": mask}
        try:
            image, label = self._source.read(index)
        except UserError as error:
            _pass_over(error, self._skip)
            return _example(self._empty, 0, skipped=1) | {"mask": np.float32(0)}
        return _example(self._transform(image), label, skipped=0) | {"mask": mask}


def _example(image: np.ndarray, label: int, *, skipped: int) -> Example:
    return {"image": image, "label": np.int32(label), "skipped": np.int32(skipped)}


def _pass_over(error: UserError, skip: bool) -> None:
    if not skip:
        raise UserError(f'{error}; data.on_corrupt="skip" passes over it') from error
    _warn_once(str(error))


@functools.cache
def _warn_once(message: str) -> None:
    """Warns once per record and process that reads."""
    logging.getLogger(__name__).warning("skipped %s", message)
