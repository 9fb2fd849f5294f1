"""Batches of a configuration's dataset and task."""

import grain
from ml_collections import ConfigDict

from tokenvit_jax.config import default_config, read_entry
from tokenvit_jax.data import dataset_info, eval_batches, open_split, train_batches
from tokenvit_jax.data.check import check_data
from tokenvit_jax.data.record import DatasetInfo
from tokenvit_jax.errors import UserError
from tokenvit_jax.tasks import classification_examples, segmentation_examples, task_name
from tokenvit_jax.tasks.classification_examples import ClassificationExamples, WholeImages
from tokenvit_jax.tasks.segmentation_examples import SegmentationExamples

EXAMPLES = {"classification": ClassificationExamples, "segmentation": SegmentationExamples}

# Entries that only one task reads, and that another task would ignore or misread.
_ONLY_FOR = {
    "classification": (
        "augment.crop_scale",
        "augment.color_jitter",
        "augment.randaugment.num_ops",
        "augment.erasing",
        "augment.rotation",
        "augment.translation",
        "mix.mixup",
        "mix.cutmix",
        "mix.mixtoken",
        "token_labels.weight",
        "label_smoothing",
        "retention.penalty",
        "data.eval_crop",
    ),
    "segmentation": (
        "augment.short_side",
        "augment.scale_range",
        "augment.max_class_share",
        "augment.photometric",
        "data.eval_short_side",
        "data.eval_size",
        "data.label_size",
        "inference.window",
        "inference.stride",
    ),
}


def train_dataset(
    config: ConfigDict, *, process_index: int = 0, process_count: int = 1
) -> grain.IterDataset:
    """Returns the batches of the training split, see :func:`tokenvit_jax.data.train_batches`.

    Raises:
      UserError: a value of the config is not valid, or the dataset is not prepared.
    """
    info = check_entries(config)
    source = open_split(info.name, info.train_split, config.data.data_dir)
    examples = EXAMPLES[task_name(info)](config, info, train=True)
    process = {"process_index": process_index, "process_count": process_count}
    return train_batches(source, examples, config, **process)


def eval_dataset(
    config: ConfigDict, *, process_index: int = 0, process_count: int = 1
) -> grain.IterDataset:
    """Returns the batches of the evaluation split, see :func:`tokenvit_jax.data.eval_batches`.

    Raises:
      UserError: as :func:`train_dataset`.
    """
    info = check_entries(config)
    source = open_split(info.name, info.eval_split, config.data.data_dir)
    examples = EXAMPLES[task_name(info)](config, info, train=False)
    process = {"process_index": process_index, "process_count": process_count}
    return eval_batches(source, examples, config, **process)


def record_dataset(config: ConfigDict) -> grain.IterDataset:
    """Returns one pass over the whole images of the training split, each squeezed into a square.

    Raises:
      UserError: as :func:`train_dataset`; the dataset has no class per image.
    """
    info = check_entries(config)
    if "label" not in info.fields:
        raise UserError(f"dataset {info.name!r} has label maps; valid: one with a class per image")
    source = open_split(info.name, info.train_split, config.data.data_dir)
    return eval_batches(source, WholeImages(config, info), config)


def check_entries(config: ConfigDict) -> DatasetInfo:
    """Checks the entries that the data pipeline of the dataset's task reads.

    Returns:
      The facts about the dataset.

    Raises:
      UserError: the first entry that is not valid.
    """
    check_data(config)
    info = dataset_info(config.dataset)
    _check_task(config, info)
    classification_examples.check_entries(config)
    segmentation_examples.check_entries(config)
    return info


def _check_task(config: ConfigDict, info: DatasetInfo) -> None:
    """Raises UserError for the first entry of another task that differs from its default."""
    default, own = default_config(), task_name(info)
    for task, keys in _ONLY_FOR.items():
        for key in keys if task != own else ():
            value, off = read_entry(config, key), read_entry(default, key)
            if value != off:
                raise UserError(
                    f"config.{key}={value} is for {task}, config.dataset={info.name!r} is "
                    f"for {own}; valid: {off}"
                )
