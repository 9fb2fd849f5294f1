"""Entries of a configuration that every task has: defaults, meanings and valid values.

Each task adds its own entries (see `tokenvit_jax.tasks`). The recipes in `tokenvit_jax.recipes`
start from `tokenvit_jax.tasks.default_config`. The command line overrides an entry with
``--config.a.b=value``; a key that does not exist is an error. ``train --help`` and the
documentation list `ENTRIES`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict, FieldReference

from tokenvit_jax.errors import UserError
from tokenvit_jax.valid import (
    Either,
    Flag,
    Form,
    Group,
    Number,
    OneOf,
    Rule,
    Several,
    Size,
    Text,
    ZeroOr,
    check,
    shown,
    whole,
)

MIN_IMAGE_SIZE = 32  # one cell of the last map of a hierarchical backbone [pixels]
MAX_IMAGE_SIZE = 2**15  # a longer side is a typing error, which would end in a lack of memory

AUTO = "auto"  # value of data.workers

# Fields of models and heads that are no settings: the task or Flax sets them.
SET_ELSEWHERE = ("num_classes", "num_keypoints", "dtype", "axis_name", "parent", "name")

# Rules of several entries.
SIDE = whole(MIN_IMAGE_SIZE, MAX_IMAGE_SIZE)
SHARE = Number(0, 1)
CHECKPOINT = Form("last|best|[0-9]+", "last, best or a step")
_STEPS = whole(1, 2**31 - 1)  # the step is a 32-bit integer
_BATCH = whole(1, 2**20)
_RATE = Number(0, 1000)
_DECAY = Number(0, 1, below=True)


class Entry(NamedTuple):
    """An entry of a configuration.

    Attributes:
      default: its default, without augmentation and regularisation; {}: a group whose keys the
        model or the head determines.
      meaning: what it means, with its unit.
      valid: rule for its value.
    """

    default: Any
    meaning: str
    valid: Rule

    @property
    def text(self) -> str:
        """The meaning, with the valid values unless these are any text or group."""
        return with_valid(self.meaning, self.valid)


def with_valid(meaning: str, valid: Rule | None) -> str:
    """Returns a meaning, followed by the valid values unless these are any text or group."""
    return meaning if valid is None or isinstance(valid, Text | Group) else f"{meaning} ({valid})"


class Need(NamedTuple):
    """Entries that change nothing unless another entry has some value.

    Attributes:
      keys: the entries.
      condition: the value of the other entry, in words.
      holds: returns whether a configuration meets the condition.
    """

    keys: tuple[str, ...]
    condition: str
    holds: Callable[[ConfigDict], Any]


def size_entry(value: int) -> FieldReference:
    """Returns an entry that holds one number or (height, width), also from the command line."""
    return FieldReference(value, field_type=object)


ENTRIES: dict[str, Entry] = {
    # The model.
    "model": Entry("dgt_t", "name of the model (tokenvit list models)", Text(empty=False)),
    "model_overrides": Entry({}, "settings of the model that replace the published ones", Group()),
    "dtype": Entry(
        "float32",
        "type of the computation; parameters stay float32",
        OneOf(("float32", "bfloat16")),
    ),
    "seed": Entry(
        0,
        "seed of the parameters, the order of the images and the augmentation",
        whole(0, 2**32 - 1),
    ),
    # The run whose parameters training starts from.
    "initial.workdir": Entry(
        "", "a trained run, or a run that convert wrote; empty: random", Text()
    ),
    "initial.checkpoint": Entry("last", "checkpoint of that run", CHECKPOINT),
    # The data.
    "dataset": Entry(
        "digits",
        "name of the dataset",
        Form(
            r"tfds:\S+|[\w-]+(\.[\w-]+)*",
            "a name that tokenvit list datasets prints, tfds:NAME, or a module",
        ),
    ),
    "image_size": Entry(size_entry(224), "sides of the images [pixels]", Size(SIDE)),
    "in_channels": Entry(
        3, "channels of the images: grey, RGB, or RGB and alpha", OneOf((1, 3, 4))
    ),
    "batch_size": Entry(128, "images per step, over all devices of all processes", _BATCH),
    "data.data_dir": Entry(
        "~/tensorflow_datasets", "folder that prepare wrote the dataset into", Text(empty=False)
    ),
    "data.classes": Entry(
        (), "names of the classes; (): the dataset's own", Several(Text(empty=False))
    ),
    "data.split": Entry(0.0, "share of the images kept for evaluation; 0: own splits", _DECAY),
    "data.workers": Entry(
        FieldReference(0, field_type=object),
        "worker processes that read ahead; auto: one per core that this process may use, shared "
        "with the other processes of its host; 0: read in the training process",
        Either((OneOf((AUTO,)), whole(0, 1000))),
    ),
    "data.on_corrupt": Entry(
        "raise",
        "what follows an unreadable image; skipped ones are counted and logged",
        OneOf(("raise", "skip")),
    ),
    "data.repeats": Entry(1, "repeated augmentation: copies of an image in a batch", _BATCH),
    "data.eval_batch_size": Entry(
        128,
        "images per evaluation step, over all devices; rounded up to a multiple of their number",
        _BATCH,
    ),
    "data.normalization": Entry(
        "imagenet",
        "mean and standard deviation of the pixels; inception: 0.5 and 0.5",
        OneOf(("imagenet", "inception", "clip")),
    ),
    "augment.flip": Entry(0.0, "probability of a horizontal flip", SHARE),
    # Optimisation.
    "num_steps": Entry(1000, "length of the training", _STEPS),
    "accumulate_steps": Entry(1, "micro-batches per step, computed one after another", _BATCH),
    "clip_norm": Entry(
        0.0, "largest global norm of the gradient; 0: off", ZeroOr(Number(1e-6, 10**6))
    ),
    "ema_decay": Entry(
        0.0, "moving average of the parameters, used for evaluation; 0: off", _DECAY
    ),
    "optimizer.name": Entry(
        "adamw", "the optimizer; sgd has Nesterov momentum", OneOf(("adamw", "sgd"))
    ),
    "optimizer.learning_rate": Entry(1e-3, "after the warm-up", Number(1e-12, 1000)),
    "optimizer.weight_decay": Entry(
        0.05, "applied to the parameters that optimizer.decay names", Number(0, 100)
    ),
    "optimizer.decay": Entry(
        "matrices",
        "parameters with weight decay; matrices: neither norms, biases, scales nor positions",
        OneOf(("matrices", "all")),
    ),
    "optimizer.b1": Entry(0.9, "adamw: decay of the mean of gradients; sgd: momentum", _DECAY),
    "optimizer.b2": Entry(0.999, "adamw: decay of the mean of squared gradients", _DECAY),
    "optimizer.schedule": Entry(
        "cosine",
        "course of the learning rate, per step, after the warm-up",
        OneOf(("cosine", "polynomial", "step")),
    ),
    "optimizer.milestones": Entry(
        (), "steps at which the step schedule multiplies the rate", Several(_STEPS, ascending=True)
    ),
    "optimizer.milestone_factor": Entry(
        0.1, "factor of the step schedule at every milestone", Number(1e-6, 1)
    ),
    "optimizer.power": Entry(1.0, "exponent of the polynomial schedule; 1: linear", Number(0, 100)),
    "optimizer.warmup_steps": Entry(
        0, "length of the linear warm-up, below num_steps", whole(0, 2**31 - 2)
    ),
    "optimizer.warmup_learning_rate": Entry(1e-6, "learning rate at step 0", _RATE),
    "optimizer.end_learning_rate": Entry(1e-5, "learning rate at the last step", _RATE),
    "optimizer.layer_decay": Entry(
        1.0,
        "factor of the learning rate from each layer to the layer below it; 1: off",
        Number(0.001, 1),
    ),
    "optimizer.backbone_factor": Entry(
        1.0,
        "factor of the learning rate of all parameters but the classifier's or head's",
        Number(1e-6, 1),
    ),
    "optimizer.freeze": Entry(
        "",
        "variables that stay as they are: backbone (all but the classifier or head), or patterns "
        "of their paths, such as patches,position,blocks_[0-3]; empty: none",
        Form(
            r"|\s*[^,\s\0][^,\0]*(,\s*[^,\s\0][^,\0]*)*",
            "names and patterns, separated by commas",
        ),
    ),
    # Devices.
    "parallel": Entry(
        "jit", "jit runs over a mesh of all devices, pmap over all devices", OneOf(("jit", "pmap"))
    ),
    "mesh.fsdp": Entry(
        1,
        "devices over which parameters and optimizer state are sharded (parallel=jit)",
        whole(1, 2**20),
    ),
    "gradient_reduce_dtype": Entry(
        "float32",
        "type in which gradients are added over devices; bfloat16 halves the bytes",
        OneOf(("float32", "bfloat16")),
    ),
    "deterministic": Entry(
        False,
        "on a GPU, the same numbers in every run: no choice of algorithms by time, no atomic "
        "additions (parallel=jit)",
        Flag(),
    ),
    "compilation_cache": Entry(
        "",
        "folder that keeps compiled programs for later starts; empty: tokenvit_jax in the user's "
        "cache folder; off: none",
        Text(),
    ),
    # Checkpoints and logs in the workdir.
    "log_every_steps": Entry(50, "steps between two logged ones", _STEPS),
    "eval_every_steps": Entry(1000, "steps between two evaluations", _STEPS),
    "checkpoint_every_steps": Entry(1000, "steps between two checkpoints", _STEPS),
    "keep_last_checkpoints": Entry(2, "number of latest checkpoints that are kept", _STEPS),
    "keep_best_checkpoints": Entry(
        1,
        "number of checkpoints kept by score (accuracy, mIoU, -AbsRel or AP)",
        whole(0, 2**31 - 1),
    ),
    "profile": Entry(
        "",
        "steps of a profiler trace; empty: none",
        Form("|[1-9][0-9]{0,9}:[1-9][0-9]{0,9}", "first:last, steps from 1"),
    ),
}

# What changes nothing is refused when training starts: it is a mistake, or a trial of something
# else than its author thinks.
NEEDS: tuple[Need, ...] = (
    Need(
        ("initial.checkpoint",),
        "config.initial.workdir, the folder of a run",
        lambda config: config.initial.workdir,
    ),
    Need(
        ("optimizer.b2",),
        "config.optimizer.name=adamw",
        lambda config: config.optimizer.name == "adamw",
    ),
    Need(
        ("optimizer.end_learning_rate",),
        "config.optimizer.schedule=cosine or polynomial",
        lambda config: config.optimizer.schedule != "step",
    ),
    Need(
        ("optimizer.milestones", "optimizer.milestone_factor"),
        "config.optimizer.schedule=step",
        lambda config: config.optimizer.schedule == "step",
    ),
    Need(
        ("optimizer.power",),
        "config.optimizer.schedule=polynomial",
        lambda config: config.optimizer.schedule == "polynomial",
    ),
    Need(
        ("optimizer.warmup_learning_rate",),
        "config.optimizer.warmup_steps above 0",
        lambda config: config.optimizer.warmup_steps,
    ),
)


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


def check_entries(config: ConfigDict, entries: Mapping[str, Entry]) -> None:
    """Raises UserError for the first entry of a configuration whose value is not valid.

    Args:
      config: any configuration with these entries.
      entries: the entries by key, such as `ENTRIES`.
    """
    for key, entry in entries.items():
        check(f"config.{key}", read_entry(config, key), entry.valid)


def check_needs(config: ConfigDict, entries: Mapping[str, Entry], needs: Iterable[Need]) -> None:
    """Raises UserError for the first entry that changes nothing, although it has been changed.

    Args:
      config: any configuration with these entries, whose values are valid.
      entries: the entries by key, with their defaults.
      needs: conditions of entries.
    """
    for need in needs:
        if need.holds(config):
            continue
        for key in need.keys:
            value, default = read_entry(config, key), entries[key].default
            default = default.get() if isinstance(default, FieldReference) else default
            if value != default:
                raise UserError(
                    f"config.{key}={shown(value)} changes nothing without {need.condition}; "
                    f"valid: {default!r}, the default, or both"
                )
