"""The configuration entries of semantic segmentation."""

from collections.abc import Sequence

from ml_collections import ConfigDict

from tokenvit_jax.config import Entry, check_interval, check_size, check_values, size_entry
from tokenvit_jax.data import MIN_IMAGE_SIZE
from tokenvit_jax.errors import UserError

_RANGES = {
    "data.eval_short_side": (0, None),
    "augment.short_side": (0, None),
}


ENTRIES: dict[str, Entry] = {
    "head": Entry("mask_transformer", "head on the tokens: mask_transformer | linear"),
    "head_overrides": Entry({}, "settings of the head"),
    # Evaluation resizes images, shrinks them further if they do not fit the buffer, and compares
    # the predictions with the label maps at their own size.
    "data.eval_short_side": Entry(
        0, "shorter side of the resized image in evaluation [pixels]; 0: of image_size"
    ),
    "data.eval_size": Entry((0, 0), "height and width of the buffer [pixels]; zeros: image_size"),
    "data.label_size": Entry(
        (0, 0), "buffer of the label maps [pixels]; zeros: size of the image buffer"
    ),
    "augment.short_side": Entry(
        0, "of the resized image, before the factor [pixels]; 0: covers image_size"
    ),
    "augment.scale_range": Entry((1.0, 1.0), "random factor of the size"),
    "augment.max_class_share": Entry(1.0, "largest share of one class in a crop; 1: any crop"),
    "augment.photometric": Entry(False, "brightness, contrast, saturation and hue, 1/2 each"),
    # An image that is larger than a window is predicted in several windows.
    # Both are one number, or one for each direction, (down, right).
    "inference.window": Entry(size_entry(0), "size of a window [pixels]; 0: image_size"),
    "inference.stride": Entry(
        size_entry(0), "stride of the windows [pixels]; 0: the window size (no overlap)"
    ),
}


def check_entries(config: ConfigDict) -> None:
    """Raises UserError for the first invalid one of these entries."""
    check_values(config, {}, _RANGES)
    check_size(config, "inference.window", 0)
    check_size(config, "inference.stride", 0)
    data, augment = config.data, config.augment
    _check_pair("data.eval_size", data.eval_size)
    _check_pair("data.label_size", data.label_size)
    if any(data.eval_size) and min(data.eval_size) < MIN_IMAGE_SIZE:
        raise UserError(
            f"config.data.eval_size={data.eval_size}; valid: at least {MIN_IMAGE_SIZE} each"
        )
    check_interval(config, "augment.scale_range")
    if not 0 < augment.max_class_share <= 1:
        raise UserError(
            f"config.augment.max_class_share={augment.max_class_share}; valid: above 0, up to 1"
        )


def _check_pair(key: str, value: Sequence[int]) -> None:
    if len(value) != 2 or not (all(side > 0 for side in value) or not any(value)):
        raise UserError(f"config.{key}={value}; valid: height and width, or (0, 0)")
