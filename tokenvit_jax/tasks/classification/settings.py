"""The configuration entries of image classification."""

from collections.abc import Iterable

from ml_collections import ConfigDict

from tokenvit_jax.config import check_interval, check_values, read_entry
from tokenvit_jax.data.images import INTERPOLATIONS
from tokenvit_jax.data.token_labels import grid_size
from tokenvit_jax.errors import UserError
from tokenvit_jax.tasks.classification.mixing import MIN_MIXTOKEN_GRID

_RANGES = {
    "label_smoothing": (0, 1),
    "mix.mixup": (0, None),
    "mix.cutmix": (0, None),
    "mix.mixtoken": (0, None),
    "mix.probability": (0, 1),
    "mix.switch_probability": (0, 1),
    "token_labels.weight": (0, None),
    "distillation.weight": (0, 1),
}
_CHOICES = {
    "data.eval_interpolation": tuple(INTERPOLATIONS),
    "distillation.kind": ("hard", "soft"),
}


def default_entries() -> ConfigDict:
    """Returns the entries that only this task has, with everything off."""
    config = ConfigDict()
    config.label_smoothing = 0.0
    config.data = ConfigDict()
    config.data.eval_crop = 0.875  # side of the centre crop / resized shorter side
    config.data.eval_interpolation = "bicubic"  # of the resized image: "bicubic" | "bilinear"
    config.augment = ConfigDict()
    config.augment.crop_scale = (1.0, 1.0)  # random resized crop: area; (1, 1): no crop
    config.augment.crop_ratio = (3 / 4, 4 / 3)  # random resized crop: width / height
    config.augment.color_jitter = 0.0  # strength of brightness, contrast, saturation
    config.augment.randaugment = ConfigDict()
    config.augment.randaugment.num_ops = 0  # operations per image; 0: none
    config.augment.randaugment.magnitude = 9.0  # 0 to 10
    config.augment.randaugment.magnitude_std = 0.5  # standard deviation of the magnitude
    config.augment.erasing = 0.0  # probability of random erasing; the box is filled with noise
    config.augment.rotation = 0.0  # largest random rotation, degrees
    config.augment.translation = 0.0  # largest random shift / side of the image

    # Mixing of the images of a batch, inside the training step.
    config.mix = ConfigDict()
    config.mix.mixup = 0.0  # alpha of the Beta distribution; 0: off
    config.mix.cutmix = 0.0  # alpha of the Beta distribution; 0: off
    config.mix.mixtoken = 0.0  # alpha of the Beta distribution; 0: off; excludes the other two
    config.mix.probability = 1.0  # probability that a batch is mixed
    config.mix.switch_probability = 0.5  # probability of CutMix if Mixup is also on

    # Labels for every cell of the last map; the model needs a token head.
    config.token_labels = ConfigDict()
    config.token_labels.weight = 0.0  # weight of their loss beside the class loss; 0: off
    config.token_labels.teacher = ""  # workdir of a run that labels images during training
    config.token_labels.teacher_checkpoint = "best"  # "last", "best" or a step
    config.token_labels.files = ""  # folder that `label` wrote, instead of a teacher

    # A teacher from whose predictions the model also learns (DeiT).
    config.distillation = ConfigDict()
    config.distillation.weight = 0.0  # weight of its loss; 1 - weight: of the labels' loss; 0: off
    config.distillation.teacher = ""  # workdir of a run, or of a run that `convert` wrote
    config.distillation.teacher_checkpoint = "last"  # "last", "best" or a step
    config.distillation.kind = "hard"  # "hard": its most probable class | "soft": probabilities
    config.distillation.temperature = 1.0  # divides the logits of "soft"
    return config


def check_entries(config: ConfigDict) -> None:
    """Raises UserError for the first invalid one of these entries."""
    check_values(config, _CHOICES, _RANGES)
    if not 0 < config.data.eval_crop <= 1:
        raise UserError(f"config.data.eval_crop={config.data.eval_crop}; valid: above 0, up to 1")
    check_interval(config, "augment.crop_scale", highest=1)
    check_interval(config, "augment.crop_ratio")
    _check_mixtoken(config)
    _check_token_labels(config)
    _check_distillation(config)


def _check_mixtoken(config: ConfigDict) -> None:
    """Checks that MixToken is off, or that there is a map to mix."""
    if not config.mix.mixtoken:
        return
    _refuse(config, "mix.mixtoken", ("mix.mixup", "mix.cutmix"), "takes their place")
    grid = grid_size(config.image_size)
    if grid < MIN_MIXTOKEN_GRID:
        raise UserError(
            f"config.mix.mixtoken={config.mix.mixtoken} mixes nothing on the {grid} x {grid} cells "
            f"of the last map at config.image_size={config.image_size}; valid: at least "
            f"{MIN_MIXTOKEN_GRID} x {MIN_MIXTOKEN_GRID} cells"
        )


def _check_token_labels(config: ConfigDict) -> None:
    """Checks that token labels are off, or come from one source and follow the images."""
    labels = config.token_labels
    if not labels.weight:
        return
    if bool(labels.teacher) == bool(labels.files):
        found = "both are" if labels.teacher else "none is"
        raise UserError(
            f"config.token_labels.weight={labels.weight} needs either config.token_labels.teacher "
            f"or config.token_labels.files, and {found} given"
        )
    reason = "mixes images whose labels do not follow; valid: config.mix.mixtoken"
    _refuse(config, "token_labels.weight", ("mix.mixup", "mix.cutmix"), reason)
    if labels.files:
        moving = ("augment.rotation", "augment.translation")
        _refuse(config, "token_labels.files", moving, "moves images away from their labels")


def _check_distillation(config: ConfigDict) -> None:
    """Checks that distillation is off, or has a teacher that sees what the model sees."""
    weight, teacher = config.distillation.weight, config.distillation.teacher
    if bool(weight) != bool(teacher):
        missing = "teacher, the workdir of a run" if weight else "weight above 0"
        raise UserError(
            f"config.distillation.weight={weight} and config.distillation.teacher={teacher!r} go "
            f"together; missing: config.distillation.{missing}"
        )
    if not config.distillation.temperature > 0:
        raise UserError(
            f"config.distillation.temperature={config.distillation.temperature}; valid: above 0"
        )
    if weight:
        others = ("token_labels.weight", "mix.mixtoken")
        _refuse(config, "distillation.weight", others, "the teacher labels whole images")


def _refuse(config: ConfigDict, key: str, others: Iterable[str], reason: str) -> None:
    """Raises UserError if an entry is on that the entry `key` excludes."""
    for other in others:
        if read_entry(config, other):
            raise UserError(
                f"config.{other}={read_entry(config, other)} does not go with "
                f"config.{key}={read_entry(config, key)!r}: {reason}"
            )
