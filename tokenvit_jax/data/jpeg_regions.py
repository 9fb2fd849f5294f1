"""Decodes and resizes regions of JPEGs with exactly Pillow's pixels.

Neither simplejpeg (decodes whole images) nor PyTurboJPEG (needs a system library, resizes nothing)
does this. The decoder is the libjpeg-turbo that Pillow has loaded.

The extension `_jpeg_regions` is compiled at installation. Without it (no C compiler, Windows, or a
Pillow that was built with another libjpeg than libjpeg-turbo), :func:`jpeg_size` returns None for
every file, and Pillow decodes and resizes whole images: the same pixels in more time.
"""

from types import ModuleType

import numpy as np
import PIL
from PIL import Image

try:
    import tokenvit_jax.data._jpeg_regions as _jpeg_regions
except ImportError:
    _jpeg_regions = None

Box = tuple[float, float, float, float]  # left, top, right, bottom [pixels]

_START, _END = b"\xff\xd8", b"\xff\xd9"
_CUBIC = {Image.Resampling.BILINEAR: False, Image.Resampling.BICUBIC: True}
# From this version on, Pillow resizes tall images vertically first. Values are rounded between the
# two passes, so the order shows in the pixels.
_VERTICAL_FIRST = int(PIL.__version__.split(".")[0]) >= 13


def _load(vectors: bool = True) -> ModuleType | None:
    """Returns the extension if it is there and Pillow's libjpeg fits it.

    Args:
      vectors: whether it uses AVX2 where the processor has it; the results are the same.
    """
    fits = _jpeg_regions and _jpeg_regions.load(Image.core.__file__, vectors)
    return _jpeg_regions if fits else None


_extension = _load()


def jpeg_size(content: bytes) -> tuple[int, int] | None:
    """Returns the width and height of an intact JPEG [pixels]; None if Pillow has to decode it.

    A file without an end marker is not intact: it is truncated, perhaps below the region that is
    decoded later.
    """
    if _extension is None or not (content.startswith(_START) and content.endswith(_END)):
        return None
    return _extension.read_size(content)


def resize_region(
    content: bytes,
    crop: tuple[int, int, int, int],
    box: Box,
    size: tuple[int, int],
    resample: Image.Resampling,
    window: tuple[int, int, int, int],
    flip: bool,
) -> np.ndarray | None:
    """Returns `image.crop(crop).resize(size, resample, box).crop(window)` in RGB, perhaps mirrored.

    Args:
      content: a file with a :func:`jpeg_size`.
      crop: part of the image that the filter sees.
      box: part of the crop that is resized, in pixels of the crop.
      size: width and height after the resize [pixels].
      resample: bilinear or bicubic.
      window: part of the resized image that is returned.
      flip: whether the window is mirrored horizontally.

    Returns:
      uint8 (H, W, 3); None if the file is damaged, and Pillow has to decide.
    """
    if _extension is None:
        return None
    (crop_width, crop_height), (width, height) = _sides(crop), _sides(window)
    across, down = crop_width - size[0], crop_height - size[1]
    vertical_first = _VERTICAL_FIRST and down > max(0, 2 * across)
    count = height * width * 3
    pixels = np.empty(count + _extension.SLACK, np.uint8)
    done = _extension.resize(
        content, pixels, crop, box, size, window, _CUBIC[resample], flip, vertical_first
    )
    return pixels[:count].reshape(height, width, 3) if done else None


def _sides(box: tuple[int, int, int, int]) -> tuple[int, int]:
    left, top, right, bottom = box
    return right - left, bottom - top
