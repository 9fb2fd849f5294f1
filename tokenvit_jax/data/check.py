"""Checks the entries of a configuration that the data pipeline reads."""

from collections.abc import Sequence

from ml_collections import ConfigDict

from tokenvit_jax.config import default_config, read_entry
from tokenvit_jax.data.sources import DatasetInfo, dataset_info
from tokenvit_jax.data.token_labels import CELL_SIZE
from tokenvit_jax.errors import UserError

MIN_IMAGE_SIZE = CELL_SIZE  # pixels: one cell of the last map

# Entries that only one task reads, and that would change nothing, or the wrong thing, for another.
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


def check_data(config: ConfigDict) -> DatasetInfo:
    """Returns the facts about the dataset of a configuration whose data entries are valid.

    Raises:
        UserError: for the first entry that is not.
    """
    info = dataset_info(config.dataset)
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
    _check_task(config, info)
    _check_segmentation(config)
    return info


def _check_task(config: ConfigDict, info: DatasetInfo) -> None:
    """Raises UserError for the first entry of another task that is not as it is by default."""
    default = default_config()
    for task, keys in _ONLY_FOR.items():
        for key in keys if task != info.task else ():
            value, off = read_entry(config, key), read_entry(default, key)
            if value != off:
                raise UserError(
                    f"config.{key}={value} is for {task}, config.dataset={info.name!r} is "
                    f"for {info.task}; valid: {off}"
                )


def _check_segmentation(config: ConfigDict) -> None:
    data, augment = config.data, config.augment
    for key in ("data.eval_short_side", "augment.short_side"):
        if read_entry(config, key) < 0:
            raise UserError(f"{key}={read_entry(config, key)}; valid: 0 or more")
    for key in ("data.eval_size", "data.label_size"):
        _check_pair(key, read_entry(config, key))
    if any(data.eval_size) and min(data.eval_size) < MIN_IMAGE_SIZE:
        raise UserError(f"data.eval_size={data.eval_size}; valid: at least {MIN_IMAGE_SIZE} each")
    if len(augment.scale_range) != 2 or not 0 < augment.scale_range[0] <= augment.scale_range[1]:
        raise UserError(
            f"augment.scale_range={augment.scale_range}; valid: lowest and highest, above 0"
        )
    if not 0 < augment.max_class_share <= 1:
        raise UserError(
            f"augment.max_class_share={augment.max_class_share}; valid: above 0, up to 1"
        )


def _check_pair(key: str, value: Sequence[int]) -> None:
    if len(value) != 2 or not (all(side > 0 for side in value) or not any(value)):
        raise UserError(f"{key}={value}; valid: height and width, or (0, 0)")
