"""Decodes image files: everything that is known about files, formats and modes of Pillow.

Whatever a file holds, the result is an 8-bit image or one :class:`UserError`: Pillow's decoders
raise all kinds of errors on damaged files, and some formats run other programs or claim sizes that
no memory holds.
"""

import contextlib
import io
import logging
import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from tokenvit_jax.data.files import error_text, image_formats, open_file
from tokenvit_jax.data.jpeg_regions import jpeg_size
from tokenvit_jax.errors import UserError

# Pixels of the largest image that is decoded: 2 GB in Pillow's memory. A file of a few bytes can
# claim any size.
MAX_PIXELS = 500_000_000

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
_ROWS = 256  # rows of grey levels that are converted at a time
# Pillow's mode I has 32 bits; from these formats it holds 16 bits.
_16_BITS_IN_32 = ("PNG", "PPM")


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------


def decode_image(file: bytes | Path, upright: bool = False) -> Image.Image:
    """Decodes a whole image file.

    CMYK, grey and palette images become RGB; alpha stays, for models that take it. Grey levels of
    16 bits are divided by 257. The format is read from the contents, not from the file's extension
    (one of ImageNet's .JPEG files is a PNG). The first frame of several is read.

    Args:
      file: the contents of the file, or its path.
      upright: whether a rotation noted in EXIF is applied. Prepared datasets are read as they are
        stored, as in torchvision and timm, and images stay aligned with their label maps.

    Returns:
      An RGB image, or RGBA where the file has alpha.

    Raises:
      UserError: the file cannot be read, is not an image, or is truncated; its pixels are floats or
        integers of 32 bits; or it has more than MAX_PIXELS pixels.
    """
    with opened(file, "an image") as image:
        image.load()
        rotation = _rotation(image) if upright else None
        image = to_rgb(image)
        return image if rotation is None else image.transpose(rotation)


class UndecodableError(UserError):
    """The pixels of an image that was opened cannot be decoded."""


class LazyJpeg(Image.Image):
    """An RGB image whose file is decoded when its pixels are needed.

    Args:
      content: contents of the file.
      size: its :func:`jpeg_size`.

    Attributes:
      content: contents of the file; None once it is decoded.
    """

    content: bytes | None = None

    def __init__(self, content: bytes, size: tuple[int, int]):
        super().__init__()
        self._mode, self._size = "RGB", size
        self.content = content

    def load(self):
        """Decodes the file; Pillow calls it before it touches the pixels.

        Raises:
          UndecodableError: the file is damaged.
        """
        if self.content is not None:
            try:
                self.im = decode_image(self.content).im
            except UserError as error:
                raise UndecodableError(str(error)) from error
            self.content = None
        return super().load()


def open_image(file: bytes | Path, upright: bool = False) -> Image.Image:
    """Opens an image file like :func:`decode_image`, but decodes a JPEG only when it is needed.

    Returns:
      As for decode_image; a :class:`LazyJpeg` if the file is an intact JPEG that is not rotated.

    Raises:
      UserError: as for decode_image; damage inside a JPEG, which does not end too early, shows
        when its pixels are needed.
    """
    content = _jpeg_content(file)
    size = jpeg_size(content) if content is not None else None
    if not size or size[0] * size[1] > MAX_PIXELS or (upright and _is_rotated(content)):
        return decode_image(file if content is None else content, upright)
    return LazyJpeg(content, size)


def _jpeg_content(file: bytes | Path) -> bytes | None:
    """Returns the contents of a file that starts like a JPEG, and None for any other file."""
    if isinstance(file, bytes):
        return file
    try:
        with open_file(file) as stream:
            start = stream.read(2)
            return start + stream.read() if start == b"\xff\xd8" else None
    except (OSError, MemoryError):  # decode_image reports it
        return None


def _is_rotated(content: bytes) -> bool:
    if b"Exif" not in content and b"tiff:Orientation" not in content:  # faster than Pillow
        return False
    with opened(content, "an image") as image:
        return _rotation(image) is not None


def read_image(path: Path) -> Image.Image:
    """Reads an image file, upright; see :func:`decode_image`.

    Raises:
      UserError: the file cannot be read, or is not an image; the message names it.
    """
    try:
        return decode_image(path, upright=True)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


@contextlib.contextmanager
def opened(file: bytes | Path, what: str) -> Iterator[Image.Image]:
    """Opens an image file with Pillow, without reading its pixels.

    All errors that are raised until the file is closed become a UserError.

    Args:
      file: the contents of the file, or its path.
      what: what the file should be, for the message: "an image".

    Raises:
      UserError: the file cannot be read or decoded, or has more than MAX_PIXELS pixels.
    """
    size = None
    try:
        with _stream(file) as stream, unlimited:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(0)
            # Other formats are not tried: EPS would run Ghostscript on the file.
            with Image.open(stream, formats=image_formats()) as image:
                _check_pixels(image)
                yield image
    except UnidentifiedImageError as error:  # Pillow's own message names a Python object
        raise UserError(f"cannot decode {size} bytes as {what}: no known format") from error
    except UserError:
        raise
    except Exception as error:
        # OSError, SyntaxError, struct.error, MemoryError, ... Unlike OpenCV, Pillow does not return
        # a truncated JPEG as half grey.
        reason = error_text(error)
        opens = size is not None
        raise UserError(
            f"cannot decode {size} bytes as {what}: {reason}" if opens else reason
        ) from error


def _stream(file: bytes | Path) -> BinaryIO:
    return io.BytesIO(file) if isinstance(file, bytes) else open_file(file)


def _check_pixels(image: Image.Image) -> None:
    if not 0 < image.width * image.height <= MAX_PIXELS:
        raise UserError(
            f"image has {image.width} x {image.height} pixels; valid: 1 to {MAX_PIXELS:,} pixels"
        )


def _rotation(image: Image.Image) -> Image.Transpose | None:
    """Returns the transposition that brings an image upright, as noted in EXIF; None if none is."""
    try:
        return _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # the pixels are fine even if the note beside them is malformed
        return None


class _Unlimited:
    """See :data:`unlimited`; counts its users, as the settings belong to the whole process."""

    # Not `warnings.catch_warnings`: it makes Python forget which warnings of others it has shown.
    _IGNORE = ("ignore", None, Warning, None, 0)

    def __init__(self):
        self._lock = threading.Lock()
        self._users = 0
        self._limit = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._users:
                self._limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
                warnings.filters.insert(0, self._IGNORE)
            self._users += 1

    def __exit__(self, *_) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                Image.MAX_IMAGE_PIXELS = self._limit
                if self._IGNORE in warnings.filters:  # another thread may have replaced them
                    warnings.filters.remove(self._IGNORE)


# A context in which Pillow opens and crops images of any size (its own limit is 179 million pixels)
# and warns of nothing: damaged metadata would be a line per image.
unlimited = _Unlimited()
# It logs the cause of an error that it raises anyway.
logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)


# ------------------------------------------------------------------------------------------------
# Modes
# ------------------------------------------------------------------------------------------------


def to_rgb(image: Image.Image) -> Image.Image:
    """Returns an image in RGB, or RGBA if it has alpha; 16-bit grey 65,535 is white.

    Raises:
      UserError: grey levels are floats or have 32 bits, or there is no pixel.
    """
    _check_pixels(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _grey_to_rgb(image)
    if image.mode == "La":  # grey, premultiplied by alpha: Pillow has no direct way
        image = image.convert("LA")
    mode = "RGBA" if image.has_transparency_data else "RGB"
    if image.mode == mode:
        return image  # a copy of the largest image would take 2 GB
    with unlimited:
        return image.convert(mode)


def _grey_to_rgb(image: Image.Image) -> Image.Image:
    """Converts grey levels of 16 bits; Pillow would clip everything above 255 to white."""
    levels, white = np.asarray(image), _white_level(image)
    grey = np.empty(levels.shape, np.uint8)
    for row in range(0, len(levels), _ROWS):  # few at a time: the sums take four times the memory
        part = levels[row : row + _ROWS].astype(np.uint32)
        grey[row : row + _ROWS] = (part.clip(0, white) * 255 + white // 2) // white
    if _white_is_zero(image):
        grey = 255 - grey
    rgb = Image.fromarray(grey).convert("RGB")
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        rgb.putalpha(Image.fromarray(np.where(levels == transparent, 0, 255).astype(np.uint8)))
    return rgb


def _white_level(image: Image.Image) -> int:
    """Returns the level of an image of integers that is white."""
    if image.mode.startswith("I;16"):
        return 2 ** _tiff_tag(image, ExifTags.Base.BitsPerSample, 16) - 1
    low, high = image.getextrema()
    is_16_bits = image.mode == "I" and 0 <= low <= high <= 65535
    # Without a format, levels up to 255 may be nearly black or all grey levels of 8 bits.
    if is_16_bits and (image.format in _16_BITS_IN_32 or (not image.format and high > 255)):
        return 65535
    kind = "floats" if image.mode == "F" else "integers of 32 bits"
    raise UserError(f"grey levels are {kind} from {low} to {high}; valid: integers of 8 or 16 bits")


def _white_is_zero(image: Image.Image) -> bool:
    """Returns whether a TIFF counts from white to black; Pillow ignores it above 8 bits."""
    return _tiff_tag(image, ExifTags.Base.PhotometricInterpretation, 1) == 0


def _tiff_tag(image: Image.Image, tag: int, default: int) -> int:
    value = getattr(image, "tag_v2", {}).get(tag, default)
    return value[0] if isinstance(value, tuple) else value


def crop_box(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    """Returns a box of an image, also one that Pillow's limit would refuse."""
    with unlimited:
        return image.crop(box)
