"""Transforms an image together with its depth map: PIL image and float32 (H, W) in, arrays out.

Images are resized and rotated bilinearly; depth maps take the nearest pixel, so that depths are
never mixed across the border of an object. Depth that a rotation brings in from outside is unknown.

References:
  Lee et al. 2019, "From Big to Small" (BTS), whose augmentation others use.
"""

from collections.abc import Callable, Sequence

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from tokenvit_jax.config import height_and_width
from tokenvit_jax.data.decoding import crop_box
from tokenvit_jax.data.dense_transforms import Pixel
from tokenvit_jax.data.images import resize_pixels
from tokenvit_jax.data.pixel_ops import change_colors
from tokenvit_jax.errors import UserError

_BILINEAR, _NEAREST = Image.Resampling.BILINEAR, Image.Resampling.NEAREST

Box = tuple[int, int, int, int]  # left, top, right, bottom [pixels]


def _kitti(height: int, width: int) -> Box:
    left = (width - 1216) // 2
    return left, height - 352, left + 1216, height


# Name of a frame -> function from height and width of an image to the part that is used. "kitti" is
# the part that laser scans reach; "nyu" is NYUv2's without its border.
FRAMES: dict[str, Callable[[int, int], Box]] = {
    "whole": lambda h, w: (0, 0, w, h),
    "kitti": _kitti,
    "nyu": lambda h, w: (43, 45, 608, 472),
}


def frame_box(frame: str, height: int, width: int) -> Box:
    """Returns the part of an image that a frame names.

    Args:
      frame: a key of FRAMES.
      height: height of the image [pixels].
      width: its width [pixels].

    Raises:
      UserError: the image is too small for the frame.
    """
    left, top, right, bottom = FRAMES[frame](height, width)
    if left < 0 or top < 0 or right > width or bottom > height:
        raise UserError(
            f"image of {height} x {width} pixels is too small for the frame {frame!r}; valid: "
            "whole, the value of config.data.frame and config.augment.frame for such images"
        )
    return left, top, right, bottom


def train_depth_scene(
    image: Image.Image,
    depth: np.ndarray,
    size: int | Sequence[int],
    augment: ConfigDict,
    fill: Pixel,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Rotates, crops, flips and changes colours: the training transform.

    An image that is smaller than the result is enlarged first; otherwise sizes stay, because the
    size of an object tells its depth.

    Args:
      image: image of any size.
      depth: float32, the height and width of the image [metres]; 0 is unknown.
      size: height and width of the result [pixels].
      augment: `config.augment`; a transform that is off takes no time.
      fill: colour that a rotation brings in from outside.
      rng: source of all random numbers.

    Returns:
      Image uint8 (H, W, C) and depth float32 (H, W).
    """
    size = height_and_width(size)
    crop = frame_box(augment.frame, *depth.shape)
    depth = depth[crop[1] : crop[3], crop[0] : crop[2]]
    if augment.rotation and rng.random() < 0.5:
        angle = rng.uniform(-augment.rotation, augment.rotation)
        image = crop_box(image, crop).rotate(angle, _BILINEAR, fillcolor=fill_of(image, fill))
        depth = np.asarray(Image.fromarray(depth).rotate(angle, _NEAREST, fillcolor=0))
        crop = (0, 0, *image.size)
    old = depth.shape
    scale = max(new / side for new, side in zip(size, old, strict=True))
    height, width = (max(new, round(side * max(scale, 1)))
                     for new, side in zip(size, old, strict=True))  # fmt: skip
    top, left = (int(rng.integers(side - new + 1))
                 for side, new in zip((height, width), size, strict=True))  # fmt: skip
    # Only the crop is resized; its pixels equal a crop of the resized image.
    y, x = old[0] / height, old[1] / width
    rows = ((top + np.arange(size[0]) + 0.5) * y).astype(int)
    columns = ((left + np.arange(size[1]) + 0.5) * x).astype(int)
    depth = depth[rows[:, None], columns]
    box = left * x, top * y, min((left + size[1]) * x, old[1]), min((top + size[0]) * y, old[0])
    flip = bool(augment.flip and rng.random() < augment.flip)
    pixels = resize_pixels(image, size[::-1], _BILINEAR, crop=crop, box=box, flip=flip)
    depth = depth[:, ::-1] if flip else depth
    return change_look(pixels, augment, rng), np.ascontiguousarray(depth)


def fill_of(image: Image.Image, fill: Pixel) -> int | Pixel:
    """Returns a colour in the form that Pillow takes for the mode of an image."""
    return fill[0] if len(image.getbands()) == 1 else fill


def change_look(pixels: np.ndarray, augment: ConfigDict, rng: np.random.Generator) -> np.ndarray:
    """Changes gamma, brightness and colours of every second image; alpha does not change.

    Args:
      pixels: uint8 (H, W, C).
      augment: provides `gamma_range`, `brightness_range` and `color_range`.
      rng: source of the random numbers.

    Returns:
      uint8 (H, W, C).
    """
    ranges = augment.gamma_range, augment.brightness_range, augment.color_range
    if all(tuple(limits) == (1, 1) for limits in ranges) or rng.random() < 0.5:
        return pixels
    gamma, brightness = (rng.uniform(*limits) for limits in ranges[:2])

    def change(colors):
        factors = brightness * rng.uniform(*ranges[2], colors.shape[-1])
        # One table of 256 levels per colour: cheaper than a power per pixel.
        levels = 255 * (np.arange(256) / 255) ** gamma * factors[:, None]
        tables = levels.round().clip(0, 255).astype(np.uint8)
        return np.stack([tables[i][colors[..., i]] for i in range(len(tables))], -1)

    return change_colors(change, pixels)
