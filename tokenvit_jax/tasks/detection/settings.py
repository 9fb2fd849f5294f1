"""The configuration entries of object detection."""

from ml_collections import ConfigDict

from tokenvit_jax.config import ENTRIES as COMMON
from tokenvit_jax.config import SIDE, Entry, Need, height_and_width
from tokenvit_jax.data.images import mean_pixel
from tokenvit_jax.errors import UserError
from tokenvit_jax.tasks.canvas import Canvas
from tokenvit_jax.valid import Either, Flag, Group, Number, OneOf, Several, ZeroOr, whole

ENTRIES: dict[str, Entry] = {
    "model": COMMON["model"]._replace(default="swin_t"),
    "head": Entry(
        "mask_rcnn",
        "mask_rcnn: boxes and masks; retinanet: boxes; htc: both in three stages",
        OneOf(("mask_rcnn", "retinanet", "htc")),
    ),
    "head_overrides": Entry({}, "settings of the head", Group()),
    # Images keep their proportions, and lie at the top left of a canvas of `image_size`, height and
    # width; images that are higher than wide lie in one of width and height.
    "data.max_objects": Entry(
        100, "objects of an image in training; the largest are kept", whole(1, 10_000)
    ),
    "data.long_side": Entry(0, "longest side of an image [pixels]; 0: of image_size", ZeroOr(SIDE)),
    "data.eval_short_side": Entry(
        0, "shorter side of an image in evaluation [pixels]; 0: of image_size", ZeroOr(SIDE)
    ),
    # Evaluation of several views of an image; every view contributes boxes of some sizes.
    "inference.short_sides": Entry(
        (), "shorter sides of an image in several views [pixels]; (): one view", Several(SIDE)
    ),
    "inference.long_side": Entry(
        0, "longest side of an image in these views [pixels]; 0: data.long_side", ZeroOr(SIDE)
    ),
    "inference.flip": Entry(False, "every view also mirrored", Flag()),
    "inference.min_sides": Entry(
        (),
        "lowest square root of the area of boxes of every view [pixels of the original image]; "
        "(): 0",
        Several(Number(0, 1e5)),
    ),
    "inference.max_sides": Entry(
        (), "first square root above those of every view; 0, or (): none", Several(Number(0, 1e5))
    ),
    "augment.short_sides": Entry(
        (), "random shorter sides of an image [pixels]; (): of image_size", Several(SIDE)
    ),
    "augment.detr_crop": Entry(
        False, "of every second image, only a random part is seen, as for DETR", Flag()
    ),
    # Large-scale jitter in place of both.
    "augment.jitter": Entry(
        (),
        "lowest and highest random factor of images that would just fit; (): short_sides",
        Either((OneOf(((),)), Several(Number(0.01, 100), 2, ascending=True))),
    ),
}
NEEDS: tuple[Need, ...] = (
    Need(
        ("augment.short_sides", "augment.detr_crop"),
        "config.augment.jitter=()",
        lambda config: not config.augment.jitter,
    ),
    Need(
        ("inference.long_side", "inference.min_sides", "inference.max_sides"),
        "config.inference.short_sides",
        lambda config: bool(config.inference.short_sides),
    ),
)


def canvas(config: ConfigDict) -> tuple[int, int]:
    """Returns height and width of the canvas of images that are not higher than wide [pixels]."""
    low, high = sorted(height_and_width(config.image_size))
    return low, high


def long_side(config: ConfigDict) -> int:
    """Returns the longest side of an image [pixels]."""
    return config.data.long_side or canvas(config)[1]


def eval_short_side(config: ConfigDict) -> int:
    """Returns the shorter side of an image in evaluation [pixels]."""
    return config.data.eval_short_side or canvas(config)[0]


def eval_canvas(config: ConfigDict) -> Canvas:
    """Returns the canvas of evaluation, with the mean colour around images.

    Raises:
      UserError: images do not fit into it.
    """
    fill = mean_pixel(config.data.normalization, config.in_channels)
    low, high = canvas(config)
    found = Canvas(low, high, eval_short_side(config), long_side(config), fill)
    found.check(f"config.image_size={low} x {high}")
    return found


def train_short_sides(config: ConfigDict) -> tuple[int, ...]:
    """Returns the shorter sides from which training draws [pixels]."""
    return tuple(config.augment.short_sides) or (canvas(config)[0],)


def check_sizes(config: ConfigDict) -> None:
    """Raises UserError if images do not fit the canvas."""
    eval_canvas(config)
    (low, high), side = canvas(config), max(train_short_sides(config))
    if side > low:
        raise UserError(
            f"config.augment.short_sides: {side} pixels do not fit config.image_size={low} x "
            f"{high}; valid: at most {low}"
        )
