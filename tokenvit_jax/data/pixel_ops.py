"""Warps and colour changes of images as arrays, uint8 (H, W, C), with exactly Pillow's pixels.

The extension `_pixel_ops` is compiled at installation; it changes RGB images on processors with
AVX2. Without it, and for grey images and images with alpha, Pillow does the same in more time.
"""

from collections.abc import Callable, Sequence
from types import ModuleType

import numpy as np
from PIL import Image, ImageEnhance

from tokenvit_jax.errors import UserError

try:
    import tokenvit_jax.data._pixel_ops as _pixel_ops
except ImportError:
    _pixel_ops = None

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # `config.in_channels` -> Pillow's mode

_LEVELS = np.arange(256)


def _load() -> ModuleType | None:
    """Returns the extension if it is there and the processor has what it needs."""
    return _pixel_ops if _pixel_ops and _pixel_ops.supported() else None


_extension = _load()


def to_array(image: Image.Image) -> np.ndarray:
    """Returns the pixels of an image, uint8 (H, W, C), also for one channel."""
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def from_array(pixels: np.ndarray) -> Image.Image:
    """Returns an image with the given pixels, uint8 (H, W, C) with 1, 3 or 4 channels.

    Raises:
      UserError: the array has another shape or type.
    """
    fits = pixels.ndim == 3 and pixels.shape[-1] in MODES and pixels.size
    if not fits or pixels.dtype != np.uint8:
        raise UserError(
            f"image is {pixels.dtype}{pixels.shape}; valid: uint8 (height, width, channels) with "
            f"{', '.join(map(str, MODES))} channels"
        )
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def change_colors(change: Callable[[np.ndarray], np.ndarray], pixels: np.ndarray) -> np.ndarray:
    """Applies a change of colours to all channels but alpha."""
    if pixels.shape[-1] < 4:
        return change(pixels)
    colors, alpha = np.split(pixels, [3], axis=-1)
    return np.concatenate([change(np.ascontiguousarray(colors)), alpha], axis=-1)


def warp(pixels: np.ndarray, matrix: Sequence[float], fill: tuple[int, ...]) -> np.ndarray:
    """Returns an image that is warped bicubically, as `Image.transform` does.

    Args:
      pixels: image.
      matrix: maps (x, y) of the result to the image: (a, b, c, d, e, f), as in Pillow.
      fill: colour of pixels that come from outside the image.
    """
    size = pixels.shape[1::-1]
    if _is_fast(pixels):
        warped = np.empty_like(pixels)
        _extension.warp(pixels, warped, size, tuple(matrix), tuple(fill))
        return warped
    transform, bicubic = Image.Transform.AFFINE, Image.Resampling.BICUBIC
    return to_array(from_array(pixels).transform(size, transform, matrix, bicubic, fillcolor=fill))


def map_levels(pixels: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Returns an image whose values are replaced by their entries in a table.

    Args:
      pixels: image with C channels.
      table: uint8 (256,), or (C, 256) with a table per channel.
    """
    tables = np.empty((pixels.shape[-1], 256), np.uint8)
    tables[:] = table
    if _is_fast(pixels):
        mapped = np.empty_like(pixels)
        _extension.map_levels(pixels, mapped, tables)
        return mapped
    return to_array(from_array(pixels).point(tables.ravel().tolist()))


def histogram(pixels: np.ndarray) -> np.ndarray:
    """Returns how often each channel has each value, int64 (C, 256)."""
    if _is_fast(pixels):
        counts = np.empty((3, 256), np.int64)
        _extension.histogram(pixels, counts)
        return counts
    return np.reshape(from_array(pixels).histogram(), (-1, 256))


def auto_contrast(pixels: np.ndarray) -> np.ndarray:
    """Stretches the values of each channel to 0 to 255, like `ImageOps.autocontrast`."""
    return map_levels(pixels, np.stack([_stretch(counts) for counts in histogram(pixels)]))


def _stretch(counts: np.ndarray) -> np.ndarray:
    (present,) = counts.nonzero()
    low, high = int(present[0]), int(present[-1])
    if low == high:
        return _LEVELS
    scale = 255.0 / (high - low)
    return (_LEVELS * scale - low * scale).clip(0, 255).astype(int)


def equalize(pixels: np.ndarray) -> np.ndarray:
    """Makes all values of each channel about equally frequent, like `ImageOps.equalize`."""
    return map_levels(pixels, np.stack([_flatten(counts) for counts in histogram(pixels)]))


def _flatten(counts: np.ndarray) -> np.ndarray:
    present = counts[counts > 0]
    step = int(present.sum() - present[-1]) // 255
    if not step:  # few pixels, or one value
        return _LEVELS
    below = counts.cumsum() - counts
    return ((below + step // 2) // step).clip(0, 255)


def brightness(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Blends black and a grey or RGB image, like `ImageEnhance.Brightness`."""
    return map_levels(pixels, _blend_levels(0, factor))


def contrast(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Blends the mean grey level and a grey or RGB image, like `ImageEnhance.Contrast`."""
    height, width, _ = pixels.shape
    if _is_fast(pixels):
        total = _extension.grey_sum(pixels)
    else:
        total = np.asarray(from_array(pixels).convert("L")).sum(dtype=np.int64)
    return map_levels(pixels, _blend_levels(int(total / (height * width) + 0.5), factor))


def _blend_levels(base: int, factor: float) -> np.ndarray:
    """Returns base + factor * (level - base) of all levels, in single precision as in Pillow."""
    blended = np.float32(base) + np.float32(factor) * (_LEVELS - base).astype(np.float32)
    return blended.clip(0, 255).astype(np.uint8)


def color(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Blends the grey levels and an RGB image, like `ImageEnhance.Color`; grey stays grey."""
    if pixels.shape[-1] == 1:
        return pixels
    if _is_fast(pixels):
        changed = np.empty_like(pixels)
        _extension.color(pixels, changed, factor)
        return changed
    return to_array(ImageEnhance.Color(from_array(pixels)).enhance(factor))


def sharpness(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Blends a smoothed copy and a grey or RGB image, like `ImageEnhance.Sharpness`."""
    if _is_fast(pixels):
        changed = np.empty_like(pixels)
        _extension.sharpness(pixels, changed, pixels.shape[1::-1], factor)
        return changed
    return to_array(ImageEnhance.Sharpness(from_array(pixels)).enhance(factor))


def _is_fast(pixels: np.ndarray) -> bool:
    return _extension is not None and pixels.shape[-1] == 3 and pixels.flags.c_contiguous
