"""Entries of a configuration that every task has, each with its default and its meaning.

Each task adds its own entries (see `tokenvit_jax.tasks`). The recipes in `tokenvit_jax.recipes`
start from `tokenvit_jax.tasks.default_config`. The command line overrides an entry with
``--config.a.b=value``; a key that does not exist is an error. ``train --help`` and the
documentation list `ENTRIES`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict, FieldReference

from tokenvit_jax.errors import UserError

MAX_IMAGE_SIZE = 2**15  # a longer side is a typing error, which would end in a lack of memory


class Entry(NamedTuple):
    """An entry of a configuration.

    Attributes:
      default: its default, without augmentation and regularisation; {}: a group whose keys the
        model or the head determines.
      meaning: what it means, with its unit or its valid values.
    """

    default: Any
    meaning: str


def size_entry(value: int) -> FieldReference:
    """Returns an entry that holds one number or (height, width), also from the command line."""
    return FieldReference(value, field_type=object)


ENTRIES: dict[str, Entry] = {
    # The model.
    "model": Entry("dgt_t", "name of the model (tokenvit list models)"),
    "model_overrides": Entry({}, "settings of the model that replace the published ones"),
    "dtype": Entry("float32", "compute: float32 | bfloat16; parameters stay float32"),
    "seed": Entry(0, "seed of the parameters, the order of the images and the augmentation"),
    # The run whose parameters training starts from.
    "initial.workdir": Entry("", "a trained run, or a run that convert wrote; empty: random"),
    "initial.checkpoint": Entry("last", "last, best or a step"),
    # The data.
    "dataset": Entry("digits", "name of the dataset (tokenvit list datasets)"),
    "image_size": Entry(size_entry(224), "one number for a square, or (height, width) [pixels]"),
    "in_channels": Entry(3, "channels of the images: 1 (grey) | 3 (RGB) | 4 (RGB and alpha)"),
    "batch_size": Entry(128, "images per step, over all devices of all processes"),
    "data.data_dir": Entry("~/tensorflow_datasets", "folder that prepare wrote the dataset into"),
    "data.classes": Entry((), "names of the classes; (): the dataset's own"),
    "data.split": Entry(0.0, "share of the images kept for evaluation; 0: own splits"),
    "data.workers": Entry(0, "worker processes that read ahead; 0: read in the training process"),
    "data.on_corrupt": Entry("raise", "unreadable image: raise | skip (counted and logged)"),
    "data.repeats": Entry(1, "repeated augmentation: copies of an image in a batch"),
    "data.eval_batch_size": Entry(128, "images per evaluation step, over all devices"),
    "data.normalization": Entry("imagenet", "imagenet | inception (mean 0.5, std 0.5) | clip"),
    "augment.flip": Entry(0.0, "probability of a horizontal flip"),
    # Optimisation.
    "num_steps": Entry(1000, "length of the training"),
    "accumulate_steps": Entry(1, "micro-batches per step, computed one after another"),
    "clip_norm": Entry(0.0, "largest global norm of the gradient; 0: off"),
    "ema_decay": Entry(0.0, "moving average of the parameters, used for evaluation; 0: off"),
    "optimizer.name": Entry("adamw", "adamw | sgd (with Nesterov momentum)"),
    "optimizer.learning_rate": Entry(1e-3, "after the warm-up"),
    "optimizer.weight_decay": Entry(0.05, "not applied to norms, biases, scales and positions"),
    "optimizer.b1": Entry(0.9, "adamw: decay of the mean of gradients; sgd: momentum"),
    "optimizer.b2": Entry(0.999, "adamw: decay of the mean of squared gradients"),
    "optimizer.schedule": Entry("cosine", "cosine | polynomial, per step, after the warm-up"),
    "optimizer.power": Entry(1.0, "exponent of the polynomial schedule; 1: linear"),
    "optimizer.warmup_steps": Entry(0, "length of the linear warm-up"),
    "optimizer.warmup_learning_rate": Entry(1e-6, "learning rate at step 0"),
    "optimizer.end_learning_rate": Entry(1e-5, "learning rate at the last step"),
    "optimizer.layer_decay": Entry(
        1.0, "factor of the learning rate from each layer to the layer below it; 1: off"
    ),
    "optimizer.freeze": Entry(
        "",
        "variables that stay as they are: backbone (all but the classifier or head), or patterns "
        "of their paths, such as patches,position,blocks_[0-3]; empty: none",
    ),
    # Devices.
    "parallel": Entry("jit", "jit (over a mesh of all devices) | pmap"),
    "mesh.fsdp": Entry(1, "devices over which parameters and optimizer state are sharded (jit)"),
    # Checkpoints and logs in the workdir.
    "log_every_steps": Entry(50, "steps between two logged ones"),
    "eval_every_steps": Entry(1000, "steps between two evaluations"),
    "checkpoint_every_steps": Entry(1000, "steps between two checkpoints"),
    "keep_last_checkpoints": Entry(2, "number of latest checkpoints that are kept"),
    "keep_best_checkpoints": Entry(1, "number of checkpoints kept by score (accuracy or mIoU)"),
    "profile": Entry("", "steps of a profiler trace, first:last; empty: none"),
}


def base_config() -> ConfigDict:
    """Returns the entries that all tasks share, without augmentation and regularisation."""
    return make_config(ENTRIES)


def make_config(entries: Mapping[str, Entry]) -> ConfigDict:
    """Returns a new configuration with the defaults of entries such as `ENTRIES`."""
    config = ConfigDict()
    for key, entry in entries.items():
        *groups, name = key.split(".")
        group = config
        for part in groups:
            if part not in group:
                group[part] = ConfigDict()
            group = group[part]
        default = entry.default
        if isinstance(default, FieldReference):  # it also fixes the type; no two may share it
            default = FieldReference(default.get(), field_type=default.get_type())
        group[name] = default
    return config


def height_and_width(size: int | Sequence[int]) -> tuple[int, int]:
    """Returns the two numbers of an entry such as `image_size`, which may be one number."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def input_shape(config: ConfigDict) -> tuple[int, int, int]:
    """Returns the shape of the images that a model is trained on, (H, W, C).

    Args:
      config: reads `image_size` and `in_channels`.
    """
    return *height_and_width(config.image_size), config.in_channels


def read_entry(config: ConfigDict, key: str) -> Any:
    """Returns the entry of a configuration with a key such as "data.workers"."""
    for part in key.split("."):
        config = config[part]
    return config


def check_values(
    config: ConfigDict,
    choices: dict[str, tuple[Any, ...]],
    ranges: dict[str, tuple[float, float | None]],
) -> None:
    """Raises UserError for the first entry with an invalid value.

    Args:
      config: any configuration with these entries.
      choices: valid values by key.
      ranges: lowest and highest valid value by key; None: no upper limit.
    """
    for key, valid in choices.items():
        if (value := read_entry(config, key)) not in valid:
            raise UserError(
                f"config.{key}={value!r} is not valid; valid: {', '.join(map(str, valid))}"
            )
    for key, (low, high) in ranges.items():
        value = read_entry(config, key)
        # The comparison is written so that nan is out of range.
        if not value >= low or (high is not None and not value <= high):
            limits = f"at least {low}" if high is None else f"{low} to {high}"
            raise UserError(f"config.{key}={value} is not valid; valid: {limits}")


def check_size(config: ConfigDict, key: str, lowest: int) -> None:
    """Raises UserError unless an entry is one valid number of pixels, or two.

    Args:
      config: any configuration with this entry, see :func:`size_entry`.
      key: such as "image_size".
      lowest: smallest valid number.
    """
    value = read_entry(config, key)
    sides = value if isinstance(value, tuple | list) else (value, value)
    if len(sides) != 2 or not all(
        type(side) is int and lowest <= side <= MAX_IMAGE_SIZE for side in sides
    ):
        raise UserError(
            f"config.{key}={value!r} is not valid; valid: at least {lowest}, up to "
            f"{MAX_IMAGE_SIZE}; one number, or (height, width)"
        )


def check_interval(config: ConfigDict, key: str, highest: float | None = None) -> None:
    """Raises UserError unless an entry is two ascending numbers above 0.

    Args:
      config: any configuration with this entry.
      key: such as "augment.crop_scale".
      highest: largest valid number; None: no limit.
    """
    value = read_entry(config, key)
    if len(value) != 2 or not 0 < value[0] <= value[1] or (highest and value[1] > highest):
        limit = "" if highest is None else f" and up to {highest}"
        raise UserError(f"config.{key}={value}; valid: lowest and highest, above 0{limit}")
