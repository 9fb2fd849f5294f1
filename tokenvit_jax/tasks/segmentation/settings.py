"""The configuration entries of semantic segmentation."""

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
        size_entry(0), "size of a window [pixels]; 0: image_size", Size(_LENGTH)
    ),
    "inference.stride": Entry(
        size_entry(0),
        "stride of the windows [pixels]; 0: the window size (no overlap)",
        Size(_LENGTH),
    ),
}


def eval_size(config: ConfigDict) -> tuple[int, int]:
    """Returns height and width of the image buffer of the evaluation [pixels]."""
    size = config.data.eval_size
    return height_and_width(tuple(size) if any(size) else config.image_size)


def window_size(config: ConfigDict) -> tuple[int, int]:
    """Returns height and width of a window [pixels], from `inference.window` and `image_size`."""
    return _size_or_default(config.inference.window, config.image_size)


def windows(config: ConfigDict, buffer: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns height and width of a window and of the stride [pixels].

    Args:
      config: provides `image_size`, `inference.window` and `inference.stride`.
      buffer: height and width of the image buffer [pixels].

    Raises:
      UserError: the windows do not fit into the buffer, or leave gaps.
    """
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
        lambda config: window_size(config) != eval_size(config),
    ),
)
