"""Decodes and transforms single images: PIL images in, uint8 arrays (size, size, 3) out.

Pillow does the resampling, colour changes and warps, as in torchvision and timm, so that the pixels
equal theirs exactly. All random numbers come from the generator that is passed in.
"""

import io
import math
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict
from PIL import ExifTags, Image, ImageEnhance, UnidentifiedImageError

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

# Orientation in EXIF -> transposition that brings the image upright; 1: it is upright.
_UPRIGHT = dict(
    zip(
        range(2, 9),
        (
            Image.Transpose.FLIP_LEFT_RIGHT,
            Image.Transpose.ROTATE_180,
            Image.Transpose.FLIP_TOP_BOTTOM,
            Image.Transpose.TRANSPOSE,
            Image.Transpose.ROTATE_270,
            Image.Transpose.TRANSVERSE,
            Image.Transpose.ROTATE_90,
        ),
        strict=True,
    )
)
_BICUBIC = Image.Resampling.BICUBIC
# `config.data.eval_interpolation` -> Pillow's filter, which antialiases.
INTERPOLATIONS = {"bicubic": _BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_SIZE_LIMIT = threading.Lock()  # held while Pillow's limit is off
_ATTEMPTS = 10  # attempts to place a random box, as in torchvision and timm


def mean_and_std(normalization: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns the mean and the standard deviation of a pixel normalisation, pixels in [0, 1].

    Args:
      normalization: `config.data.normalization`.

    Raises:
      UserError: unknown normalization.
    """
    if normalization not in NORMALIZATIONS:
        raise UserError(
            f"config.data.normalization={normalization!r} is not valid; valid: "
            f"{', '.join(NORMALIZATIONS)}"
        )
    return NORMALIZATIONS[normalization]


def decode_image(encoded: bytes, upright: bool = False) -> Image.Image:
    """Decodes a whole image file.

    CMYK, grey and palette images become RGB; grey levels of 16 bits are divided by 257. The format
    is read from the contents, not from the file's extension (one of ImageNet's .JPEG files is a
    PNG).

    Args:
      encoded: the contents of the file.
      upright: whether a rotation noted in EXIF is applied. Prepared datasets are read as they are
        stored, as in torchvision and timm, and images stay aligned with their label maps.

    Returns:
      An RGB image.

    Raises:
      UserError: the bytes are not an image, the image is truncated, or its pixels are floats.
    """
    try:
        with _open(encoded) as image:
            image.load()
            rotation = _rotation(image) if upright else None
            rgb = to_rgb(image)
        return rgb if rotation is None else rgb.transpose(rotation)
    except UnidentifiedImageError as error:  # Pillow's own message names a Python object
        message = f"cannot decode {len(encoded)} bytes as an image: no known format"
        raise UserError(message) from error
    except Exception as error:
        # Pillow's decoders raise all kinds of errors on malformed files: OSError, SyntaxError,
        # struct.error, ... Unlike OpenCV, Pillow does not return a truncated JPEG as half grey.
        raise UserError(f"cannot decode {len(encoded)} bytes as an image: {error}") from error


def _open(encoded: bytes) -> Image.Image:
    """Opens an image of any size: Pillow refuses very large ones, though a panorama is no attack.

    The limit is a global of Pillow and is read only while an image is opened, not while its pixels
    are decoded.
    """
    with _SIZE_LIMIT:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(io.BytesIO(encoded))
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _rotation(image: Image.Image) -> Image.Transpose | None:
    """Returns the transposition that brings an image upright, as noted in EXIF; None if none is."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # the pixels are fine even if the note beside them is malformed
        return None
    return _UPRIGHT.get(orientation)


def to_rgb(image: Image.Image) -> Image.Image:
    """Returns an image in RGB; 65,535 of grey levels with 16 bits is white.

    Raises:
      UserError: grey levels are floats, or exceed 16 bits.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        # Pillow's own conversion would clip everything above 255 to white.
        levels = np.asarray(image)
        if image.mode == "F" or levels.min() < 0 or levels.max() > 65535:
            raise UserError(
                f"grey levels are {levels.dtype} from {levels.min()} to {levels.max()}; valid: "
                "integers of 8 or 16 bits"
            )
        image = Image.fromarray(((levels.astype(np.uint32) + 128) // 257).astype(np.uint8))
    return image.convert("RGB")


def read_image(path: Path) -> Image.Image:
    """Reads an image file as RGB and upright; see :func:`decode_image`.

    Raises:
      UserError: the file cannot be read, or is not an image; the message names it.
    """
    try:
        return decode_image(path.read_bytes(), upright=True)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def eval_image(
    image: Image.Image, size: int, crop: float, interpolation: str = "bicubic"
) -> np.ndarray:
    """Resizes the shorter side to size / crop and crops the centre: the evaluation transform.

    Args:
      image: RGB image of any size.
      size: height and width of the result [pixels].
      crop: side of the centre crop / resized shorter side, in (0, 1].
      interpolation: a key of INTERPOLATIONS.

    Returns:
      uint8 (size, size, 3), equal to timm's evaluation transform.
    """
    short = math.floor(size / crop)
    width, height = image.size
    if width <= height:
        width, height = short, int(short * height / width)
    else:
        width, height = int(short * width / height), short
    image = image.resize((width, height), INTERPOLATIONS[interpolation])
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))


class View(NamedTuple):
    """The part of an image that a training example shows, and whether it is mirrored.

    Attributes:
      box: (left, top, right, bottom) [pixels]; None: the largest centred square.
      flip: whether the image is mirrored horizontally.
    """

    box: tuple[int, int, int, int] | None
    flip: bool


def draw_view(width: int, height: int, augment: ConfigDict, rng: np.random.Generator) -> View:
    """Draws the crop and the flip, the first steps of the training transform, if they are on.

    Args:
      width: width of the image [pixels].
      height: height of the image [pixels].
      augment: `config.augment`.
      rng: source of the random numbers.
    """
    box = None
    if tuple(augment.crop_scale) != (1.0, 1.0):
        box = random_crop_box(width, height, augment.crop_scale, augment.crop_ratio, rng)
    return View(box, flip=bool(augment.flip and rng.random() < augment.flip))


def whole_image(image: Image.Image, size: int) -> np.ndarray:
    """Returns the whole image, squeezed into a square, uint8 (size, size, 3)."""
    return np.asarray(image.resize((size, size), _BICUBIC))


def train_image(
    image: Image.Image,
    size: int,
    augment: ConfigDict,
    rng: np.random.Generator,
    view: View | None = None,
) -> np.ndarray:
    """Crops, flips, shifts, changes colours and erases, as far as enabled: the training transform.

    Args:
      image: RGB image of any size.
      size: height and width of the result [pixels].
      augment: `config.augment`; a transform that is off takes no time.
      rng: source of all random numbers.
      view: crop and flip that :func:`draw_view` drew from `rng`; None: they are drawn here.

    Returns:
      uint8 (size, size, 3).
    """
    view = view or draw_view(*image.size, augment, rng)
    if view.box is None:
        image = Image.fromarray(eval_image(image, size, crop=1.0))
    else:
        # Not `resize(box=...)`, whose filter would reach beyond the box.
        image = image.crop(view.box).resize((size, size), _BICUBIC)
    if view.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if augment.rotation or augment.translation:
        image = _random_shift(image, augment.rotation, augment.translation, rng)
    if augment.randaugment.num_ops:
        fill = tuple(round(255 * mean) for mean in MEAN)
        image = randaugment(image, rng, fill=fill, **augment.randaugment)
    if augment.color_jitter:
        image = color_jitter(image, augment.color_jitter, rng)
    pixels = np.asarray(image)
    if augment.erasing and rng.random() < augment.erasing:
        pixels = erase(pixels, rng)
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
    log_ratio = np.log(ratio)
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


def color_jitter(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Changes brightness, contrast and saturation in random order, like torchvision's ColorJitter.

    Args:
      image: RGB image.
      strength: factors are drawn from [1 - strength, 1 + strength], clipped at 0.
      rng: source of the random numbers.
    """
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for i in rng.permutation(len(enhancers)):
        factor = rng.uniform(max(0.0, 1.0 - strength), 1.0 + strength)
        image = enhancers[i](image).enhance(factor)
    return image


def erase(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Fills a random box with noise: random erasing in timm's mode "pixel".

    The box covers 2 % to 1/3 of the area and has an aspect ratio of 0.3 to 10/3. The noise is
    standard normal after ImageNet's normalisation: N(MEAN, STD) in pixels, rounded and clipped.

    Args:
      pixels: uint8 (H, W, 3); not changed.
      rng: source of the random numbers.

    Returns:
      uint8 (H, W, 3).
    """
    height, width, _ = pixels.shape
    for _ in range(_ATTEMPTS):
        area = height * width * rng.uniform(0.02, 1 / 3)
        aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < height and w < width:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            noise = rng.standard_normal((h, w, 3), dtype=np.float32) * STD + MEAN
            pixels = pixels.copy()
            pixels[top : top + h, left : left + w] = np.rint(noise * 255).clip(0, 255)
            break
    return pixels


def _random_shift(
    image: Image.Image, rotation: float, translation: float, rng: np.random.Generator
) -> Image.Image:
    """Rotates by up to `rotation` degrees and shifts by up to `translation` times each side."""
    angle = rng.uniform(-rotation, rotation)
    shift = rng.uniform(-translation, translation, size=2) * image.size
    # The fill is black, like the background of the digits.
    return image.rotate(angle, Image.Resampling.BILINEAR, translate=tuple(shift))
