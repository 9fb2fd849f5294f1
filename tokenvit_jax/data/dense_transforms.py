"""Transforms an image together with its label map: PIL image and uint8 (H, W) in, uint8 out.

Images are resized bilinearly, with an antialiasing filter; label maps take the nearest pixel.

References:
  MMSegmentation Contributors, "MMSegmentation" (2020), whose recipes Segmenter (Strudel et al.,
  2021) and the papers on backbones use.
"""

from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from tokenvit_jax.config import height_and_width
from tokenvit_jax.data.images import resize_pixels, strip_length
from tokenvit_jax.data.pixel_ops import from_array, to_array
from tokenvit_jax.data.record import IGNORED

_BILINEAR, _NEAREST = Image.Resampling.BILINEAR, Image.Resampling.NEAREST
_ATTEMPTS = 10  # attempts to draw a crop that no class dominates
_BRIGHTNESS = 32  # largest shift, up or down [levels of 255]
_FACTORS = 0.5, 1.5  # range for contrast and saturation
_HUE = 36  # largest shift, up or down [degrees]

Pixel = tuple[int, ...]


def train_scene(
    image: Image.Image,
    label: np.ndarray,
    size: int | Sequence[int],
    augment: ConfigDict,
    fill: Pixel,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Resizes, crops, flips, distorts colours and pads: the training transform.

    Args:
      image: image of any size.
      label: uint8, the height and width of the image.
      size: height and width of the result [pixels].
      augment: `config.augment`; a transform that is off takes no time.
      fill: colour of the padding below and to the right of an image smaller than the result.
      rng: source of all random numbers.

    Returns:
      Image uint8 (H, W, C) and labels uint8 (H, W), `IGNORED` on the padding.
    """
    size = height_and_width(size)
    crop = _piece_of_strip(*image.size, size, rng)
    label = label[crop[1] : crop[3], crop[0] : crop[2]]
    image_height, image_width = label.shape
    short = augment.short_side or _covering_side(image_width, image_height, size)
    scale = short * rng.uniform(*augment.scale_range) / min(image_width, image_height)
    width, height = scaled_size(image_width, image_height, scale)
    label = resize_label(label, width, height)
    left, top = _draw_crop(label, size, augment.max_class_share, rng)
    label = label[top : top + size[0], left : left + size[1]]
    # Only the crop is resized; its pixels equal a crop of the resized image.
    bottom, right = top + label.shape[0], left + label.shape[1]
    x, y = image_width / width, image_height / height
    box = left * x, top * y, min(right * x, image_width), min(bottom * y, image_height)
    flip = bool(augment.flip and rng.random() < augment.flip)
    pixels = resize_pixels(
        image, (right - left, bottom - top), _BILINEAR, crop=crop, box=box, flip=flip
    )
    if flip:
        label = label[:, ::-1]
    if augment.photometric:
        pixels = to_array(distort_colors(from_array(pixels), rng))
    return pad(pixels, (*size, pixels.shape[-1]), fill), pad(label, size, IGNORED)


def _covering_side(width, height, size):
    """Returns the shorter side of an image that is just large enough for a crop [pixels]."""
    short = min(width, height)
    return max(size[0] * short / height, size[1] * short / width)


def _piece_of_strip(width, height, size, rng):
    """Returns the box of a random piece of a strip, and of the whole of any other image."""
    most = strip_length(min(width, height), *size)
    if max(width, height) <= most:
        return 0, 0, width, height
    start = int(rng.integers(max(width, height) - most + 1))
    return (start, 0, start + most, height) if width > height else (0, start, width, start + most)


def fit_image(image: Image.Image, short_side: int, height: int, width: int) -> np.ndarray:
    """Resizes an image, keeping its aspect ratio, so that it fits: the evaluation transform.

    Args:
      image: image of any size.
      short_side: desired shorter side [pixels].
      height: largest height [pixels].
      width: largest width [pixels].

    Returns:
      uint8 (h, w, C) with h <= `height` and w <= `width`; the shorter side is `short_side`, or less
      if the image would not fit.
    """
    return resize_image(image, *fitted_size(*image.size, short_side, height, width))


def fitted_size(
    width: int, height: int, short_side: int, max_height: int, max_width: int
) -> tuple[int, int]:
    """Returns the width and height of an image after :func:`fit_image` [pixels].

    Args:
      width: width of the image [pixels].
      height: its height [pixels].
      short_side: desired shorter side [pixels].
      max_height: largest height [pixels].
      max_width: largest width [pixels].
    """
    scale = min(short_side / min(width, height), max_width / width, max_height / height)
    return scaled_size(width, height, scale)


def resize_image(image: Image.Image, width: int, height: int) -> np.ndarray:
    """Returns an image of another size, uint8 (height, width, C)."""
    return resize_pixels(image, (width, height), _BILINEAR)


def scaled_size(width: int, height: int, scale: float) -> tuple[int, int]:
    """Returns the width and height of a resized image, at least 1, rounded as in mmcv."""
    return max(1, int(width * scale + 0.5)), max(1, int(height * scale + 0.5))


def resize_label(label: np.ndarray, width: int, height: int) -> np.ndarray:
    """Returns a label map resized by nearest neighbour, uint8 (height, width)."""
    return np.asarray(Image.fromarray(label).resize((width, height), _NEAREST))


def pad(array: np.ndarray, shape: tuple[int, ...], fill: float | Pixel) -> np.ndarray:
    """Returns an array of a larger shape with the given array at the top left."""
    height, width = array.shape[:2]
    padded = np.empty(shape, array.dtype)
    padded[:height, :width] = array
    padded[:height, width:] = padded[height:] = fill  # not below the array: filling is slow
    return padded


def distort_colors(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Changes brightness, contrast, saturation and hue, each with probability 1/2.

    The change of contrast scales the pixel values themselves; it comes before or after saturation
    and hue, with probability 1/2 each.

    Args:
      image: grey images have neither saturation nor hue, and alpha does not change.
      rng: source of the random numbers.

    References:
      MMSegmentation, `PhotoMetricDistortion`; Liu et al., "SSD" (2016).
    """
    if image.mode == "RGBA":
        distorted = distort_colors(image.convert("RGB"), rng)
        distorted.putalpha(image.getchannel("A"))
        return distorted
    brightness, contrast, saturation, hue, contrast_first = rng.random(5) < 0.5
    if brightness:
        image = _change_levels(image, 1.0, rng.uniform(-_BRIGHTNESS, _BRIGHTNESS))
    if contrast and contrast_first:
        image = _change_levels(image, rng.uniform(*_FACTORS))
    if image.mode == "RGB" and (saturation or hue):
        h, s, v = image.convert("HSV").split()
        if saturation:
            s = _change_levels(s, rng.uniform(*_FACTORS))
        if hue:
            shift = round(rng.uniform(-_HUE, _HUE) / 360 * 256)  # the hue circle has 256 levels
            h = h.point([(level + shift) % 256 for level in range(256)])
        image = Image.merge("HSV", (h, s, v)).convert("RGB")
    if contrast and not contrast_first:
        image = _change_levels(image, rng.uniform(*_FACTORS))
    return image


def _change_levels(image: Image.Image, factor: float, offset: float = 0.0) -> Image.Image:
    levels = (np.arange(256) * factor + offset).clip(0, 255).astype(np.uint8)
    return image.point(levels.tolist() * len(image.getbands()))


def _draw_crop(
    label: np.ndarray, size: tuple[int, int], max_share: float, rng: np.random.Generator
) -> tuple[int, int]:
    """Draws the left and top of a crop where no class exceeds a share of the labelled pixels.

    If all attempts fail, the last crop is used.
    """
    height, width = label.shape
    for _ in range(_ATTEMPTS):
        top = int(rng.integers(max(height - size[0], 0) + 1))
        left = int(rng.integers(max(width - size[1], 0) + 1))
        if max_share == 1.0:
            break
        crop = label[top : top + size[0], left : left + size[1]]
        counts = np.bincount(crop.ravel(), minlength=IGNORED + 1)[:IGNORED]
        if 0 < counts.max() <= max_share * counts.sum():
            break
    return left, top
