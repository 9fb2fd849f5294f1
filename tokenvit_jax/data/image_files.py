"""Reads images from files that the user names."""

from pathlib import Path

from PIL import Image

from tokenvit_jax.data.transforms import decode_image
from tokenvit_jax.errors import UserError


def read_image(file: Path) -> Image.Image:
    """Returns the RGB image in a file.

    Raises:
      UserError: the file cannot be read, or is not an image.
    """
    try:
        return decode_image(file.read_bytes())
    except OSError as error:
        raise UserError(f"--images: {file}: {error.strerror}") from error
    except UserError as error:
        raise UserError(f"--images: {file}: {error}") from error
