"""Transforms single images: PIL images in, uint8 arrays (H, W, C) out.

The pixels equal those of torchvision and timm exactly: Pillow does the resampling, colour changes
and warps, or `jpeg_regions` and `pixel_ops`, which give the same pixels. All random numbers come
from the generator that is passed in. Images are grey, RGB, or RGB with alpha; sizes are one number
or (height, width) [pixels].
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from tokenvit_jax.config import height_and_width
from tokenvit_jax.data.decoding import LazyJpeg, crop_box
from tokenvit_jax.data.jpeg_regions import Box, resize_region
from tokenvit_jax.data.pixel_ops import (
    MODES,
    brightness,
    change_colors,
    color,
    contrast,
    from_array,
    to_array,
)
from tokenvit_jax.data.randaugment import randaugment
from tokenvit_jax.errors import UserError

# Mean and standard deviation of ImageNet's training images, RGB, pixels in [0, 1].
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
# `config.data.normalization` -> mean and standard deviation for normalising pixels.
NORMALIZATIONS = {
    "imagenet": (MEAN, STD),
    "inception": ((0.5,) * 3, (0.5,) * 3),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}

_BICUBIC = Image.Resampling.BICUBIC
_STRIP = 16  # longer side / shorter side from which an image is a strip
_LEAST_PART = 1 / 4  # of the length of a strip that remains for small crops
# `config.data.eval_interpolation` -> Pillow's filter, which antialiases.
INTERPOLATIONS = {"bicubic": _BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_ATTEMPTS = 10  # attempts to place a random box, as in torchvision and timm


def mean_and_std(
    normalization: str, channels: int = 3
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns the mean and the standard deviation of a pixel normalisation, pixels in [0, 1].

    Grey images have the means over the three colours, as in timm. Alpha is reduced by 1, so that a
    network for RGB images sees no difference at opaque pixels.

    Args:
      normalization: `config.data.normalization`.
      channels: `config.in_channels`, a key of MODES.

    Returns:
      Means and standard deviations, `channels` numbers each.

    Raises:
      UserError: unknown normalization.
    """
    if normalization not in NORMALIZATIONS:
        raise UserError(
            f"config.data.normalization={normalization!r} is not valid; valid: "
            f"{', '.join(NORMALIZATIONS)}"
        )
    statistics = NORMALIZATIONS[normalization]
    if channels == 1:
        mean, std = ((sum(values) / len(values),) for values in statistics)
    else:
        mean, std = (values + (1.0,) * (channels - 3) for values in statistics)
    return mean, std


def mean_pixel(normalization: str, channels: int) -> tuple[int, ...]:
    """Returns the colour that a normalisation maps to zero, up to rounding."""
    mean, _ = mean_and_std(normalization, channels)
    return tuple(round(255 * level) for level in mean)


def with_channels(image: Image.Image, channels: int) -> Image.Image:
    """Returns an image with 1, 3 or 4 channels.

    Transparent pixels become white for models without alpha: the colours that they hide, often
    black, are nobody's picture. Grey loses nothing by a detour through RGB.
    """
    mode = MODES[channels]
    if image.mode == "RGBA" and mode != "RGBA" and image.getextrema()[3][0] < 255:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == mode else image.convert(mode)


def resize_pixels(
    image: Image.Image,
    size: tuple[int, int],
    resample: Image.Resampling,
    *,
    crop: tuple[int, int, int, int] | None = None,
    box: Box | None = None,
    window: tuple[int, int, int, int] | None = None,
    flip: bool = False,
) -> np.ndarray:
    """Crops, resizes, crops and mirrors an image; decodes no more of a JPEG than that needs.

    The pixels are those of `image.crop(crop).resize(size, resample, box).crop(window)`.

    Args:
      image: image of any size.
      size: width and height of the resized crop [pixels].
      resample: Pillow's filter, bilinear or bicubic.
      crop: part of the image (left, top, right, bottom) that the filter sees; None: all of it.
      box: part of the crop that is resized; None: all of it.
      window: part of the resized crop that is returned; None: all of it.
      flip: whether the result is mirrored horizontally.

    Returns:
      uint8 (H, W, C).
    """
    crop = crop or (0, 0, *image.size)
    box = box or (0, 0, crop[2] - crop[0], crop[3] - crop[1])
    window = window or (0, 0, *size)
    content = image.content if isinstance(image, LazyJpeg) else None
    if content is not None:
        pixels = resize_region(content, crop, box, size, resample, window, flip)
        if pixels is not None:
            return pixels
    if crop != (0, 0, *image.size):
        image = crop_box(image, crop)
    image = image.resize(size, resample, box)
    if window != (0, 0, *size):
        image = image.crop(window)
    return to_array(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image)


def eval_image(
    image: Image.Image,
    size: int | Sequence[int],
    crop: float,
    interpolation: str = "bicubic",
    flip: bool = False,
) -> np.ndarray:
    """Resizes an image to cover size / crop and crops the centre: the evaluation transform.

    Args:
      image: image of any size.
      size: height and width of the result [pixels].
      crop: height of the centre crop / height that the resized image covers, in (0, 1].
      interpolation: a key of INTERPOLATIONS.
      flip: whether the result is mirrored horizontally.

    Returns:
      uint8 (H, W, C); if H = W, equal to timm's evaluation transform.
    """
    height, width = height_and_width(size)
    part = _middle_of_strip(*image.size, height, width, crop)
    image_width, image_height = part[2] - part[0], part[3] - part[1]
    tall, wide = math.floor(height / crop), math.floor(width / crop)
    if image_width * tall <= image_height * wide:
        tall = int(wide * image_height / image_width)
    else:
        wide = int(tall * image_width / image_height)
    left, top = round((wide - width) / 2), round((tall - height) / 2)
    window = left, top, left + width, top + height
    resample = INTERPOLATIONS[interpolation]
    return resize_pixels(image, (wide, tall), resample, crop=part, window=window, flip=flip)


def strip_length(short: int, height: int, width: int) -> int:
    """Returns the length of a strip that is worth resizing to cover height x width [pixels].

    A picture of 30000 x 1 pixels would otherwise become gigabytes of which a crop shows little.

    Args:
      short: shorter side of the image [pixels].
      height: height to cover, in any unit.
      width: width to cover, in the same unit.
    """
    return math.ceil(_STRIP * short * max(height, width) / min(height, width))


def _middle_of_strip(image_width, image_height, height, width, crop):
    """Returns the box of the middle of a strip, and of the whole of any other image."""
    # A small crop shows less of an image that is resized to more pixels.
    most = strip_length(min(image_width, image_height), height, width)
    most = math.ceil(most * max(crop, _LEAST_PART))
    # An even number of pixels is cut off, so that the centre stays where it is.
    left, top = (max(side - most, 0) // 2 for side in (image_width, image_height))
    return left, top, image_width - left, image_height - top


class View(NamedTuple):
    """The part of an image that a training example shows, and whether it is mirrored.

    Attributes:
      box: (left, top, right, bottom) [pixels]; None: the largest centred box of the shape of the
        example.
      flip: whether the image is mirrored horizontally.
    """

    box: tuple[int, int, int, int] | None
    flip: bool


def draw_view(
    image_size: tuple[int, int],
    size: int | Sequence[int],
    augment: ConfigDict,
    rng: np.random.Generator,
) -> View:
    """Draws the crop and the flip, the first steps of the training transform, if they are on.

    Args:
      image_size: width and height of the image [pixels], as Pillow gives them.
      size: height and width of the example [pixels].
      augment: `config.augment`.
      rng: source of the random numbers.
    """
    box, scale, flip = None, tuple(augment.crop_scale), augment.flip
    if scale != (1.0, 1.0):
        height, width = height_and_width(size)
        # A ratio of 1 is the example's own shape, which is not distorted.
        ratio = [width / height * limit for limit in augment.crop_ratio]
        box = random_crop_box(*image_size, scale, ratio, rng)
    return View(box, flip=bool(flip and rng.random() < flip))


def whole_image(image: Image.Image, size: int | Sequence[int]) -> np.ndarray:
    """Returns the whole image, squeezed into height x width, uint8 (H, W, C)."""
    height, width = height_and_width(size)
    return resize_pixels(image, (width, height), _BICUBIC)


def train_image(
    image: Image.Image,
    size: int | Sequence[int],
    augment: ConfigDict,
    rng: np.random.Generator,
    view: View | None = None,
) -> np.ndarray:
    """Crops, flips, shifts, changes colours and erases, as far as enabled: the training transform.

    Args:
      image: image of any size.
      size: height and width of the result [pixels].
      augment: `config.augment`; a transform that is off takes no time.
      rng: source of all random numbers.
      view: crop and flip that :func:`draw_view` drew from `rng`; None: they are drawn here.

    Returns:
      uint8 (H, W, C).
    """
    view = view or draw_view(image.size, size, augment, rng)
    if view.box is None:
        pixels = eval_image(image, size, crop=1.0, flip=view.flip)
    else:
        # A crop, not a box, beyond which the filter would reach.
        height, width = height_and_width(size)
        pixels = resize_pixels(image, (width, height), _BICUBIC, crop=view.box, flip=view.flip)
    pixels = _change_look(pixels, augment, rng)
    if augment.erasing and rng.random() < augment.erasing:
        pixels = erase(pixels, rng)
    return pixels


def _change_look(pixels: np.ndarray, augment: ConfigDict, rng: np.random.Generator) -> np.ndarray:
    """Shifts, changes colours and applies RandAugment, as far as enabled."""
    if augment.rotation or augment.translation:
        pixels = _random_shift(pixels, augment.rotation, augment.translation, rng)
    if augment.randaugment.num_ops:
        fill = mean_pixel("imagenet", pixels.shape[-1])
        pixels = randaugment(pixels, rng, fill=fill, **augment.randaugment)
    if augment.color_jitter:
        pixels = color_jitter(pixels, augment.color_jitter, rng)
    return pixels


def random_crop_box(
    width: int,
    height: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> tuple[int, int, int, int]:
    """Draws the box of Inception's random resized crop, with torchvision's distribution.

    Args:
      width: width of the image [pixels].
      height: height of the image [pixels].
      scale: smallest and largest area of the box / area of the image.
      ratio: smallest and largest width / height of the box.
      rng: source of the random numbers.

    Returns:
      (left, top, right, bottom) inside the image; the largest centred box of an allowed shape if
      no drawn box fits.
    """
    log_ratio = np.log(ratio).tolist()
    for _ in range(_ATTEMPTS):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(*log_ratio))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
            return int(left), int(top), int(left) + w, int(top) + h
    w = min(width, round(height * max(ratio)))
    h = min(height, round(width / min(ratio)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def color_jitter(pixels: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Changes brightness, contrast and saturation in random order, like torchvision's ColorJitter.

    Args:
      pixels: uint8 (H, W, C); grey images have no saturation, and alpha does not change.
      strength: factors are drawn from [1 - strength, 1 + strength], clipped at 0.
      rng: source of the random numbers.

    Returns:
      uint8 (H, W, C).
    """
    changes = (brightness, contrast, color)
    for i in rng.permutation(len(changes)):
        factor = rng.uniform(max(0.0, 1.0 - strength), 1.0 + strength)
        pixels = change_colors(functools.partial(changes[i], factor=factor), pixels)
    return pixels


def erase(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Fills a random box with noise: random erasing in timm's mode "pixel".

    The box covers 2 % to 1/3 of the area and has an aspect ratio of 0.3 to 10/3. The noise is
    standard normal after ImageNet's normalisation: N(MEAN, STD) in pixels, rounded and clipped.

    Args:
      pixels: uint8 (H, W, C); not changed.
      rng: source of the random numbers.

    Returns:
      uint8 (H, W, C).
    """
    height, width, channels = pixels.shape
    mean, std = mean_and_std("imagenet", channels)
    for _ in range(_ATTEMPTS):
        area = height * width * rng.uniform(0.02, 1 / 3)
        aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < height and w < width:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            noise = rng.standard_normal((h, w, channels), dtype=np.float32) * std + mean
            pixels = pixels.copy()
            pixels[top : top + h, left : left + w] = np.rint(noise * 255).clip(0, 255)
            break
    return pixels


def _random_shift(
    pixels: np.ndarray, rotation: float, translation: float, rng: np.random.Generator
) -> np.ndarray:
    """Rotates by up to `rotation` degrees and shifts by up to `translation` times each side."""
    image = from_array(pixels)
    angle = rng.uniform(-rotation, rotation)
    shift = rng.uniform(-translation, translation, size=2) * image.size
    # The fill is black, like the background of the digits.
    return to_array(image.rotate(angle, Image.Resampling.BILINEAR, translate=tuple(shift)))
