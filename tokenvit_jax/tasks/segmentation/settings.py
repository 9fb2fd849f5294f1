"""The configuration entries of semantic segmentation."""

import math
from collections.abc import Sequence

from ml_collections import ConfigDict

from tokenvit_jax.config import (
    MAX_IMAGE_SIZE,
    SIDE,
    Entry,
    Need,
    height_and_width,
    size_entry,
)
from tokenvit_jax.errors import UserError
from tokenvit_jax.valid import Either, Flag, Group, Number, OneOf, Several, Size, ZeroOr, whole

WHOLE = "whole"  # value of inference.window
MULTIPLE = 32  # of the sides of images that are predicted whole [pixels]: strides of all maps

_ZEROS = OneOf(((0, 0),))
_LENGTH = whole(0, MAX_IMAGE_SIZE)

ENTRIES: dict[str, Entry] = {
    "head": Entry(
        "mask_transformer",
        "head on the tokens; upernet and semantic_fpn: on the maps of a hierarchical backbone",
        OneOf(("mask_transformer", "linear", "upernet", "semantic_fpn")),
    ),
    "head_overrides": Entry({}, "settings of the head", Group()),
    "auxiliary_weight": Entry(
        0.4, "weight of the auxiliary head's loss; 0: there is none", Number(0, 100)
    ),
    # Evaluation resizes images, shrinks them further if they do not fit the buffer, and compares
    # the predictions with the label maps at their own size.
    "data.eval_short_side": Entry(
        0,
        "shorter side of the resized image in evaluation [pixels]; 0: of image_size",
        ZeroOr(SIDE),
    ),
    "data.eval_size": Entry(
        (0, 0),
        "height and width of the buffer [pixels]; zeros: image_size",
        Either((_ZEROS, Several(SIDE, 2))),
    ),
    "data.label_size": Entry(
        (0, 0),
        "buffer of the label maps [pixels]; zeros: size of the image buffer",
        Either((_ZEROS, Several(whole(1, MAX_IMAGE_SIZE), 2))),
    ),
    "augment.short_side": Entry(
        0,
        "of the resized image, before the factor [pixels]; 0: covers image_size",
        ZeroOr(SIDE),
    ),
    "augment.scale_range": Entry(
        (1.0, 1.0), "random factor of the size", Several(Number(0.01, 100), 2, ascending=True)
    ),
    "augment.max_class_share": Entry(
        1.0, "largest share of one class in a crop; 1: any crop", Number(0.001, 1)
    ),
    "augment.photometric": Entry(
        False, "brightness, contrast, saturation and hue, 1/2 each", Flag()
    ),
    # An image that is larger than a window is predicted in several windows.
    # Both are one number, or one for each direction, (down, right).
    "inference.window": Entry(
        size_entry(0),
        "size of a window [pixels]; 0: image_size; whole: the image in one piece, with its sides "
        f"rounded up to multiples of {MULTIPLE}",
        Either((Size(_LENGTH), OneOf((WHOLE,)))),
    ),
    "inference.stride": Entry(
        size_entry(0),
        "stride of the windows [pixels]; 0: the window size (no overlap)",
        Size(_LENGTH),
    ),
    # An image is predicted once for every scale, and once more mirrored. The mean of the
    # probabilities, at the size of the result, decides.
    "inference.scales": Entry(
        (1.0,), "sizes of the image, as factors", Several(Number(0.1, 10), empty=False)
    ),
    "inference.flip": Entry(False, "also predict the mirrored image", Flag()),
}


def eval_size(config: ConfigDict) -> tuple[int, int]:
    """Returns height and width of the image buffer of the evaluation [pixels]."""
    size = config.data.eval_size
    return height_and_width(tuple(size) if any(size) else config.image_size)


def short_side(config: ConfigDict) -> int:
    """Returns the shorter side of a resized image in evaluation [pixels]."""
    return config.data.eval_short_side or min(height_and_width(config.image_size))


def is_whole(config: ConfigDict) -> bool:
    """Returns whether images are predicted in one piece, whatever their size."""
    return config.inference.window == WHOLE


def one_view(config: ConfigDict) -> bool:
    """Returns whether an image is predicted once, at its own size."""
    return set(config.inference.scales) == {1} and not config.inference.flip


def window_size(config: ConfigDict) -> tuple[int, int]:
    """Returns height and width of a window [pixels], from `inference.window` and `image_size`.

    Images that are predicted whole have no windows; the size is then that of training images.
    """
    return _size_or_default(0 if is_whole(config) else config.inference.window, config.image_size)


def scaled_sides(config: ConfigDict, sides: tuple[int, int], scale: float) -> tuple[int, int]:
    """Returns height and width of an image, or of its buffer, at one of the scales [pixels].

    Args:
      config: provides `inference.window`.
      sides: height and width at scale 1 [pixels].
      scale: factor, one of `inference.scales`.
    """
    height, width = (max(1, int(side * scale + 0.5)) for side in sides)
    if is_whole(config):
        height, width = (-(-side // MULTIPLE) * MULTIPLE for side in (height, width))
    return height, width


def windows(config: ConfigDict, buffer: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns height and width of a window and of the stride [pixels].

    Args:
      config: provides `image_size`, `inference.window` and `inference.stride`.
      buffer: height and width of the image buffer [pixels]; of the image itself if it is predicted
        whole.

    Raises:
      UserError: the windows do not fit into the buffer, or leave gaps.
    """
    if is_whole(config):
        return buffer, buffer
    window = window_size(config)
    stride = _size_or_default(config.inference.stride, window)
    if any(side > room for side, room in zip(window, buffer, strict=True)):
        raise UserError(
            f"config.inference.window={config.inference.window} is not valid: windows of "
            f"{_by(window)} pixels do not fit into config.data.eval_size={buffer}; valid: up to "
            "its height and width"
        )
    if any(step > side for step, side in zip(stride, window, strict=True)):
        raise UserError(
            f"config.inference.stride={config.inference.stride} is not valid; valid: up to the "
            f"windows' {_by(window)} pixels"
        )
    return window, stride


def check_scales(config: ConfigDict) -> None:
    """Raises UserError if images are smaller than a window at one of the scales.

    Images that are smaller at scale 1 are padded; at lower scales they would be mostly padding.

    Args:
      config: provides `inference`, `image_size`, `data.eval_size` and `data.eval_short_side`.
    """
    scale, window = min(config.inference.scales), window_size(config)
    if is_whole(config) or scale >= 1:
        return
    short, buffer = short_side(config), eval_size(config)
    needs = [(min(window), short), *zip(window, buffer, strict=True)]
    if any(int(side * scale + 0.5) < need for need, side in needs):
        lowest = min(max(need / side for need, side in needs), 1)
        raise UserError(
            f"config.inference.scales={config.inference.scales} is not valid: at {scale:g}, images "
            f"with a shorter side of {short} in a buffer of {_by(buffer)} are smaller than windows "
            f"of {_by(window)} pixels; valid: from {math.ceil(lowest * 1000) / 1000:g}, or "
            f"config.inference.window={WHOLE}"
        )


def _size_or_default(size: int | Sequence[int], default: int | Sequence[int]) -> tuple[int, int]:
    """Returns height and width, those of the default where they are 0."""
    pairs = zip(height_and_width(size), height_and_width(default), strict=True)
    height, width = (side or other for side, other in pairs)
    return height, width


def _by(size: tuple[int, int]) -> str:
    return " x ".join(map(str, size))


NEEDS: tuple[Need, ...] = (
    Need(("auxiliary_weight",), "config.head=upernet", lambda config: config.head == "upernet"),
    Need(
        ("inference.stride",),
        "windows below config.data.eval_size",
        lambda config: not is_whole(config) and window_size(config) != eval_size(config),
    ),
)
