"""The configuration entries of image classification."""

from collections.abc import Iterable

from ml_collections import ConfigDict

from tokenvit_jax.config import CHECKPOINT, SHARE, Entry, Need, read_entry
from tokenvit_jax.data import DatasetInfo
from tokenvit_jax.data.token_labels import grid_size
from tokenvit_jax.errors import UserError
from tokenvit_jax.tasks.classification.mixing import MIN_MIXTOKEN_GRID
from tokenvit_jax.valid import Number, OneOf, Several, Text, ZeroOr, whole

_ALPHA = ZeroOr(Number(0.001, 1000))

ENTRIES: dict[str, Entry] = {
    "label_smoothing": Entry(
        0.0, "weight of the uniform distribution in the targets", Number(0, 1, below=True)
    ),
    "data.eval_crop": Entry(
        0.875, "height of the centre crop / height the resized image covers", Number(0.1, 1)
    ),
    "data.eval_interpolation": Entry(
        "bicubic", "filter that resizes the image", OneOf(("bicubic", "bilinear"))
    ),
    "augment.crop_scale": Entry(
        (1.0, 1.0),
        "random resized crop: its area; (1, 1): no crop",
        Several(Number(1e-4, 1), 2, ascending=True),
    ),
    "augment.crop_ratio": Entry(
        (3 / 4, 4 / 3),
        "its width / height, relative to the image_size's",
        Several(Number(0.01, 100), 2, ascending=True),
    ),
    "augment.color_jitter": Entry(
        0.0, "strength of brightness, contrast, saturation", Number(0, 10)
    ),
    "augment.randaugment.num_ops": Entry(0, "operations per image; 0: none", whole(0, 100)),
    "augment.randaugment.magnitude": Entry(9.0, "mean level of an operation", Number(0, 10)),
    "augment.randaugment.magnitude_std": Entry(
        0.5, "standard deviation of the magnitude", Number(0, 10)
    ),
    "augment.erasing": Entry(
        0.0, "probability of random erasing; the box is filled with noise", SHARE
    ),
    "augment.rotation": Entry(0.0, "largest random rotation [degrees]", Number(0, 180)),
    "augment.translation": Entry(0.0, "largest random shift / side of the image", SHARE),
    # Mixing of the images of a batch, inside the training step.
    "mix.mixup": Entry(0.0, "alpha of the Beta distribution; 0: off", _ALPHA),
    "mix.cutmix": Entry(0.0, "alpha of the Beta distribution; 0: off", _ALPHA),
    "mix.mixtoken": Entry(
        0.0, "alpha of the Beta distribution; 0: off; excludes mixup and cutmix", _ALPHA
    ),
    "mix.probability": Entry(1.0, "probability that a batch is mixed", Number(1e-6, 1)),
    "mix.switch_probability": Entry(0.5, "probability of CutMix if Mixup is also on", SHARE),
    # Labels for every cell of the last map; the model needs a token head.
    "token_labels.weight": Entry(
        0.0, "weight of their loss beside the class loss; 0: off", ZeroOr(Number(1e-6, 1000))
    ),
    "token_labels.teacher": Entry(
        "", "workdir of a run that labels images during training", Text()
    ),
    "token_labels.teacher_checkpoint": Entry("best", "checkpoint of the teacher", CHECKPOINT),
    "token_labels.files": Entry("", "folder that label wrote, instead of a teacher", Text()),
    # A teacher from whose predictions the model also learns (DeiT).
    "distillation.weight": Entry(
        0.0, "weight of its loss, 1 - weight for the labels; 0: off", ZeroOr(Number(1e-6, 1))
    ),
    "distillation.teacher": Entry("", "workdir of a run, also of one that convert wrote", Text()),
    "distillation.teacher_checkpoint": Entry("last", "checkpoint of the teacher", CHECKPOINT),
    "distillation.kind": Entry(
        "hard",
        "hard: its most probable class; soft: its probabilities",
        OneOf(("hard", "soft")),
    ),
    "distillation.temperature": Entry(1.0, "divides the logits of soft", Number(0.01, 1000)),
}

NEEDS: tuple[Need, ...] = (
    Need(
        ("augment.crop_ratio",),
        "a crop, config.augment.crop_scale below (1, 1)",
        lambda config: tuple(config.augment.crop_scale) != (1, 1),
    ),
    Need(
        ("augment.randaugment.magnitude", "augment.randaugment.magnitude_std"),
        "config.augment.randaugment.num_ops above 0",
        lambda config: config.augment.randaugment.num_ops,
    ),
    Need(
        ("mix.probability",),
        "config.mix.mixup, config.mix.cutmix or config.mix.mixtoken above 0",
        lambda config: config.mix.mixup or config.mix.cutmix or config.mix.mixtoken,
    ),
    Need(
        ("mix.switch_probability",),
        "both config.mix.mixup and config.mix.cutmix above 0",
        lambda config: config.mix.mixup and config.mix.cutmix,
    ),
    Need(
        ("token_labels.teacher", "token_labels.files"),
        "config.token_labels.weight above 0",
        lambda config: config.token_labels.weight,
    ),
    Need(
        ("token_labels.teacher_checkpoint",),
        "config.token_labels.teacher, the workdir of a run",
        lambda config: config.token_labels.teacher,
    ),
    Need(
        ("distillation.teacher", "distillation.teacher_checkpoint", "distillation.kind"),
        "config.distillation.weight above 0",
        lambda config: config.distillation.weight,
    ),
    Need(
        ("distillation.temperature",),
        "config.distillation.kind=soft and config.distillation.weight above 0",
        lambda config: config.distillation.weight and config.distillation.kind == "soft",
    ),
)


def check_relations(config: ConfigDict, info: DatasetInfo) -> None:
    """Raises UserError for the first of these entries that does not go with others.

    Args:
      config: configuration of the task, whose values are valid.
      info: facts about its dataset.
    """
    crop = config.data.eval_crop
    if not info.center_crop and crop != ENTRIES["data.eval_crop"].default:
        raise UserError(
            f"config.data.eval_crop={crop} changes nothing: config.dataset={config.dataset!r} is "
            "evaluated on whole images"
        )
    _check_mixtoken(config)
    _check_token_labels(config)
    _check_distillation(config)


def _check_mixtoken(config: ConfigDict) -> None:
    """Checks that MixToken is off, or that there is a map to mix."""
    if not config.mix.mixtoken:
        return
    _refuse(config, "mix.mixtoken", ("mix.mixup", "mix.cutmix"), "takes their place")
    rows, columns = grid_size(config.image_size)
    if min(rows, columns) < MIN_MIXTOKEN_GRID:
        raise UserError(
            f"config.mix.mixtoken={config.mix.mixtoken} mixes nothing on the {rows} x {columns} "
            f"cells of the last map at config.image_size={config.image_size}; valid: at least "
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
    weight = config.distillation.weight
    if not weight:
        return
    if not config.distillation.teacher:
        raise UserError(
            f"config.distillation.weight={weight} needs a teacher; missing: "
            "config.distillation.teacher, the workdir of a run"
        )
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
