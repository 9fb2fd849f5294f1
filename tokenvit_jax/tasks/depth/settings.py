"""The configuration entries of monocular depth."""

from collections.abc import Sequence

from ml_collections import ConfigDict

from tokenvit_jax.config import ENTRIES as COMMON
from tokenvit_jax.config import MAX_IMAGE_SIZE, SIDE, Entry, height_and_width, input_shape
from tokenvit_jax.data.depth_transforms import FRAMES
from tokenvit_jax.errors import UserError
from tokenvit_jax.metrics.depth import CROPS
from tokenvit_jax.valid import Either, Flag, Group, Number, OneOf, Several, whole

_ZEROS = OneOf(((0, 0),))
_FACTORS = Several(Number(0.1, 10), 2, ascending=True)

ENTRIES: dict[str, Entry] = {
    "model": COMMON["model"]._replace(default="vit_b_r50"),
    "head_overrides": Entry({}, "settings of DPT's decoder", Group()),
    # The decoder returns y >= 0.
    "depth.scale": Entry(1.0, "factor of the decoder's output y", Number(0, 10**6, above=True)),
    "depth.shift": Entry(0.0, "added to scale x y", Number(0, 10**6)),
    "depth.invert": Entry(
        True, "scale x y + shift is the inverse depth [1 / m]; False: the depth [m]", Flag()
    ),
    "depth.loss": Entry(
        "silog",
        "silog: scale-invariant logarithmic error; ssi: of inverse depth up to scale and shift, "
        "with its gradient",
        OneOf(("silog", "ssi")),
    ),
    # Evaluation compares at the size of the depth maps, image by image.
    "depth.limits": Entry(
        (1e-3, 80.0),
        "depths between which pixels are compared [m]; predictions are clipped to them",
        Several(Number(1e-6, 10**6), 2, ascending=True),
    ),
    "depth.crop": Entry(
        "none",
        "part of the depth maps that is compared: of Garg or Eigen for KITTI, of Eigen for NYUv2",
        OneOf(tuple(CROPS)),
    ),
    "depth.align": Entry(
        False,
        "fit scale and shift of the inverse depth to each image's truth before the comparison",
        Flag(),
    ),
    "data.frame": Entry(
        "whole",
        "part of an image that the model sees in evaluation; kitti: the lower middle, 352 x 1216",
        OneOf(tuple(FRAMES)),
    ),
    "data.eval_size": Entry(
        (0, 0),
        "height and width to which that part is resized [pixels]; zeros: image_size",
        Either((_ZEROS, Several(SIDE, 2))),
    ),
    "data.depth_size": Entry(
        (0, 0),
        "buffer of the depth maps [pixels]; zeros: data.eval_size",
        Either((_ZEROS, Several(whole(1, MAX_IMAGE_SIZE), 2))),
    ),
    "augment.frame": Entry(
        "whole",
        "part of an image that training crops are from; nyu: without the border of NYUv2",
        OneOf(tuple(FRAMES)),
    ),
    "augment.rotation": Entry(
        0.0, "largest random rotation of every second image [degrees]", Number(0, 180)
    ),
    # All three change every second image.
    "augment.gamma_range": Entry((1.0, 1.0), "random exponent of the pixels", _FACTORS),
    "augment.brightness_range": Entry((1.0, 1.0), "random factor of the pixels", _FACTORS),
    "augment.color_range": Entry((1.0, 1.0), "random factor of each colour", _FACTORS),
}


def eval_size(config: ConfigDict) -> tuple[int, int]:
    """Returns height and width of the images that the model sees in evaluation [pixels]."""
    size = config.data.eval_size
    return height_and_width(tuple(size) if any(size) else config.image_size)


def depth_size(config: ConfigDict) -> tuple[int, int]:
    """Returns height and width of the buffer of the depth maps [pixels]."""
    size = tuple(config.data.depth_size)
    return size if any(size) else eval_size(config)


def check_sizes(config: ConfigDict, multiple: int) -> None:
    """Raises UserError unless the sides of images fit the model.

    Args:
      config: provides `image_size` and `data.eval_size`.
      multiple: number of pixels that sides are multiples of.
    """
    for key, size in {
        "image_size": input_shape(config)[:2],
        "data.eval_size": eval_size(config),
    }.items():
        if any(side % multiple for side in size):
            raise UserError(
                f"config.{key}={_by(size)} is not valid: DPT needs height and width in multiples "
                f"of {multiple} pixels"
            )


def check_limits(config: ConfigDict) -> None:
    """Raises UserError if no depth is between the limits."""
    low, high = config.depth.limits
    if low >= high:
        raise UserError(
            f"config.depth.limits={tuple(config.depth.limits)} is not valid: no depth is between "
            "them; valid: (low, high) with low below high"
        )


def _by(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))
