"""The configuration entries of segmentation by masks."""

from ml_collections import ConfigDict

from tokenvit_jax.config import ENTRIES as COMMON
from tokenvit_jax.config import MAX_IMAGE_SIZE, SIDE, Entry, Need, height_and_width
from tokenvit_jax.data.images import mean_pixel
from tokenvit_jax.errors import UserError
from tokenvit_jax.heads.mask_losses import NUM_POINTS
from tokenvit_jax.tasks.canvas import Canvas
from tokenvit_jax.valid import Either, Flag, Group, Number, OneOf, Several, ZeroOr, whole

SEMANTIC, INSTANCE, PANOPTIC = KINDS = ("semantic", "instance", "panoptic")
MULTIPLE = 32  # of the sides of canvases: the largest stride of a backbone [pixels]

_ZEROS = OneOf(((0, 0),))

ENTRIES: dict[str, Entry] = {
    "model": COMMON["model"]._replace(default="swin_t"),
    "head_overrides": Entry({}, "settings of the head", Group()),
    # What the segments are in training, and how predictions are read and compared.
    "inference.kind": Entry(
        PANOPTIC,
        "semantic: a class for every pixel; instance: objects, which may overlap; panoptic: every "
        "pixel belongs to an object or to a class of stuff",
        OneOf(KINDS),
    ),
    "masks.num_points": Entry(
        NUM_POINTS, "points at which a mask is compared in training", whole(4, 2**20)
    ),
    "data.max_segments": Entry(
        100, "segments of an image in training; the largest are kept", whole(1, 1000)
    ),
    # Images keep their proportions, and lie at the top left of a canvas. In evaluation, those that
    # are higher than wide lie in one of width and height.
    "data.eval_size": Entry(
        (0, 0),
        "height and width of the canvas of evaluation [pixels]; zeros: image_size",
        Either((_ZEROS, Several(SIDE, 2))),
    ),
    "data.eval_short_side": Entry(
        0, "shorter side of an image in evaluation [pixels]; 0: of the canvas", ZeroOr(SIDE)
    ),
    "data.long_side": Entry(
        0, "longest side of an image in evaluation [pixels]; 0: of the canvas", ZeroOr(SIDE)
    ),
    "data.result_size": Entry(
        (0, 0),
        "height and width of the largest image, at whose size it is evaluated [pixels]; zeros: a "
        "square of the longer side of the canvas",
        Either((_ZEROS, Several(whole(1, MAX_IMAGE_SIZE), 2))),
    ),
    # Either large-scale jitter, or a shorter side from a list.
    "augment.jitter": Entry(
        (),
        "lowest and highest random factor of images that would just fit; (): short_sides",
        Either((OneOf(((),)), Several(Number(0.01, 100), 2, ascending=True))),
    ),
    "augment.short_sides": Entry(
        (), "random shorter sides of an image [pixels]; (): of image_size", Several(SIDE)
    ),
    "augment.long_side": Entry(
        0, "longest side of an image for short_sides [pixels]; 0: no limit", ZeroOr(SIDE)
    ),
    "augment.photometric": Entry(
        False, "brightness, contrast, saturation and hue, 1/2 each", Flag()
    ),
}


NEEDS: tuple[Need, ...] = (
    Need(
        ("augment.short_sides", "augment.long_side"),
        "config.augment.jitter=()",
        lambda config: not config.augment.jitter,
    ),
)


def eval_canvas(config: ConfigDict) -> Canvas:
    """Returns the canvas of evaluation, with the mean colour around images.

    Raises:
      UserError: its sides are no multiples of 32, or images do not fit into it.
    """
    size = tuple(config.data.eval_size)
    key, size = ("data.eval_size", size) if any(size) else ("image_size", config.image_size)
    low, high = sorted(height_and_width(size))
    _check_multiples(key, (low, high))
    fill = mean_pixel(config.data.normalization, config.in_channels)
    short, long = config.data.eval_short_side or low, config.data.long_side or high
    canvas = Canvas(low, high, short, long, fill)
    canvas.check(f"the canvas of evaluation, {low} x {high}")
    return canvas


def result_size(config: ConfigDict) -> tuple[int, int]:
    """Returns height and width of the buffer of results [pixels]."""
    size = tuple(config.data.result_size)
    return size if any(size) else eval_canvas(config).square


def check_sizes(config: ConfigDict) -> None:
    """Raises UserError for canvases of other sides than multiples of 32, or too small ones."""
    _check_multiples("image_size", height_and_width(config.image_size))
    eval_canvas(config)


def _check_multiples(key: str, size: tuple[int, int]) -> None:
    if any(side % MULTIPLE for side in size):
        raise UserError(
            f"config.{key}: {size[0]} x {size[1]} pixels are not valid; valid: multiples of "
            f"{MULTIPLE}"
        )
