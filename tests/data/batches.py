"""Batches of a configuration, or of other records in its place."""

import grain
from ml_collections import ConfigDict

from tokenvit_jax.data import (
    DatasetInfo,
    Source,
    dataset_info,
    eval_batches,
    open_split,
    train_batches,
)
from tokenvit_jax.tasks.classification_examples import ClassificationExamples
from tokenvit_jax.tasks.segmentation_examples import SegmentationExamples


def train_dataset(
    config: ConfigDict, source: Source | None = None, **process: int
) -> grain.IterDataset:
    """Returns batches for training; `source`: read instead of the training split."""
    info = dataset_info(config.dataset)
    source = source or open_split(info.name, info.train_split, config.data.data_dir)
    return train_batches(source, make_examples(config, info, train=True), config, **process)


def eval_dataset(
    config: ConfigDict, source: Source | None = None, **process: int
) -> grain.IterDataset:
    """Returns batches for evaluation; `source`: read instead of the evaluation split."""
    info = dataset_info(config.dataset)
    source = source or open_split(info.name, info.eval_split, config.data.data_dir)
    return eval_batches(source, make_examples(config, info, train=False), config, **process)


def make_examples(config: ConfigDict, info: DatasetInfo, *, train: bool):
    """Returns what turns the records of a dataset into examples."""
    segments = "label_map" in info.fields
    examples = SegmentationExamples if segments else ClassificationExamples
    return examples(config, info, train=train)
