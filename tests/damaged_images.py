"""Damages image files of all formats at random, and decodes what is left of them."""

import io
import resource
import sys
import warnings

import numpy as np
from PIL import ExifTags, Image

from tokenvit_jax.data.decoding import MAX_PIXELS, decode_image
from tokenvit_jax.errors import UserError

# Kind of file -> Pillow's options for writing it; the last word is the format.
KINDS = {
    "JPEG": {},
    "progressive JPEG": {"progressive": True},
    "PNG": {},
    "WEBP": {},
    "GIF": {},
    "TIFF": {},
    "compressed TIFF": {"compression": "tiff_lzw"},
    "BMP": {},
    "PPM": {},
    "TGA": {},
    "ICO": {"sizes": [(48, 48)]},
}
_WITH_EXIF = ("JPEG", "PNG", "WEBP", "TIFF")
_HEADER = 64  # bytes that every second damage hits


def run_damages(kind: str, seed: int, trials: int) -> list[str]:
    """Returns the faults: what is neither an image nor one line, warnings, and too much memory."""
    content, rng = encode(kind), np.random.default_rng(seed)
    before, faults, refused = _peak_bytes(), [], 0
    for trial in range(trials):
        with warnings.catch_warnings(record=True) as noise:
            warnings.simplefilter("always")
            try:
                image = decode_image(damage(content, rng), upright=True)
                fault = image.mode not in ("RGB", "RGBA") or min(image.size) < 1
            except UserError as error:
                refused, fault = refused + 1, "\n" in str(error) or str(error).endswith(": ")
            except Exception as error:
                fault = repr(error)
        if fault or noise:
            faults.append(f"{kind}, damage {trial}: {fault or noise[0].message}")
    if not refused:
        faults.append(f"{kind}: no damage is noticed")
    if _peak_bytes() - before > 5 * MAX_PIXELS:
        faults.append(f"{kind}: {_peak_bytes() - before:,} bytes of memory")
    return faults


def encode(kind: str) -> bytes:
    """Returns an image file with a photograph, 80 x 60 pixels."""
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    photo = Image.fromarray(coarse).resize((80, 60), Image.Resampling.BICUBIC)
    buffer, options, file_format = io.BytesIO(), KINDS[kind], kind.split()[-1]
    if file_format in _WITH_EXIF:
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6
        exif[ExifTags.Base.Make] = "camera"
        options = {**options, "exif": exif}
    photo.save(buffer, file_format, **options)
    return buffer.getvalue()


def damage(content: bytes, rng: np.random.Generator) -> bytes:
    """Returns a file with one damage: a flipped bit, a cut, zeros, or bytes of something else."""
    changed = bytearray(content)
    start = int(rng.integers(len(content) if rng.random() < 0.5 else _HEADER))
    end = min(start + int(rng.integers(1, 40)), len(content))
    match rng.integers(4):
        case 0:
            changed[start] ^= 1 << int(rng.integers(8))
        case 1:
            del changed[start:]
        case 2:
            changed[start:end] = bytes(end - start)
        case _:
            changed[start:end] = rng.bytes(end - start)
    return bytes(changed)


def _peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
