"""Entries of a configuration that every task has, with their meanings and defaults.

Each task adds its own entries (see `tokenvit_jax.tasks`). The recipes in `tokenvit_jax.recipes`
start from `tokenvit_jax.tasks.default_config`. The command line overrides an entry with
``--config.a.b=value``; a key that does not exist is an error.
"""

from typing import Any

from ml_collections import ConfigDict

from tokenvit_jax.errors import UserError


def base_config() -> ConfigDict:
    """Returns the entries that all tasks share, without augmentation and regularisation."""
    config = ConfigDict()
    # The model: one of `tokenvit_jax.list_models()` and arguments of `create_model`.
    config.model = "dgt_t"
    config.model_overrides = ConfigDict()
    config.dtype = "float32"  # compute: "float32" | "bfloat16"; parameters stay float32
    config.seed = 0

    # The run whose parameters training starts from.
    config.initial = ConfigDict()
    config.initial.workdir = ""  # a trained run, or a run that `convert` wrote; "": random
    config.initial.checkpoint = "last"  # "last", "best" or a step

    # The data.
    config.dataset = "digits"  # see `tokenvit_jax.data.datasets`
    config.image_size = 224  # height and width [pixels]
    config.batch_size = 128  # images per step, over all devices of all processes
    config.data = ConfigDict()
    config.data.data_dir = "~/tensorflow_datasets"  # where `prepare` wrote the dataset
    config.data.classes = ()  # names of the classes; (): the dataset's own
    config.data.split = 0.0  # share of the images kept for evaluation; 0: the dataset's own splits
    config.data.workers = 0  # worker processes that read ahead; 0: read in the training process
    config.data.on_corrupt = "raise"  # unreadable image: "raise" | "skip" (counted and logged)
    config.data.repeats = 1  # repeated augmentation: copies of an image in a batch
    config.data.eval_batch_size = 128  # images per evaluation step, over all devices
    config.data.normalization = "imagenet"  # pixels: "imagenet" | "inception" (0.5, 0.5) | "clip"
    config.augment = ConfigDict()
    config.augment.flip = 0.0  # probability of a horizontal flip

    # Optimisation.
    config.num_steps = 1000
    config.accumulate_steps = 1  # micro-batches per step, computed one after another
    config.clip_norm = 0.0  # largest global norm of the gradient; 0: off
    config.ema_decay = 0.0  # moving average of the parameters, used for evaluation; 0: off
    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # "adamw" | "sgd" (with Nesterov momentum)
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.05  # not applied to norms, biases, scales and positions
    config.optimizer.b1 = 0.9  # adamw: decay of the mean of gradients; sgd: momentum
    config.optimizer.b2 = 0.999  # adamw: decay of the mean of squared gradients
    config.optimizer.schedule = "cosine"  # "cosine" | "polynomial", per step, after the warm-up
    config.optimizer.power = 1.0  # exponent of the polynomial schedule; 1: linear
    config.optimizer.warmup_steps = 0  # linear
    config.optimizer.warmup_learning_rate = 1e-6  # at step 0
    config.optimizer.end_learning_rate = 1e-5  # at the last step
    # Factor of the learning rate from each layer to the layer below it; 1: off. The head is on top.
    config.optimizer.layer_decay = 1.0
    # Variables that stay as they are: "backbone" (all but the classifier or head), or patterns of
    # their paths such as "patches,position,blocks_[0-3]"; "": none.
    config.optimizer.freeze = ""

    # Devices.
    config.parallel = "jit"  # "jit" (over a mesh of all devices) | "pmap"
    config.mesh = ConfigDict()
    config.mesh.fsdp = 1  # devices over which parameters and optimizer state are sharded ("jit")

    # Checkpoints and logs in the workdir.
    config.log_every_steps = 50
    config.eval_every_steps = 1000
    config.checkpoint_every_steps = 1000
    config.keep_last_checkpoints = 2
    config.keep_best_checkpoints = 1  # best by the task's score, such as eval/accuracy or eval/miou
    config.profile = ""  # steps of a profiler trace, "first:last"; "": none
    return config


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
            raise UserError(f"config.{key}={value!r} is not valid; valid: {', '.join(valid)}")
    for key, (low, high) in ranges.items():
        value = read_entry(config, key)
        # The comparison is written so that nan is out of range.
        if not value >= low or (high is not None and not value <= high):
            limits = f"at least {low}" if high is None else f"{low} to {high}"
            raise UserError(f"config.{key}={value} is not valid; valid: {limits}")


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
