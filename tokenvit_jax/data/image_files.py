"""Finds image files by names, folders and patterns."""

import functools
import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from tokenvit_jax.errors import UserError

# Pillow recognises these formats but has no decoder for them.
_NO_DECODER = {"BUFR", "GRIB", "HDF5", "MPEG"}


def list_images(names: Sequence[str]) -> list[Path]:
    """Returns the image files that a user names, each once.

    Args:
      names: each a file, a folder (all images below it), a pattern such as ``photos/**/*.jpg``, or
        several of these separated by commas. Files may have commas in their names. A file that is
        named itself can have any suffix; folders and patterns give the files of :func:`is_image`,
        sorted by name.

    Raises:
      UserError: a file does not exist, or a folder or pattern holds no image.
    """
    found = [file for text in names for name in _split(text) for file in _expand(name)]
    return list(dict.fromkeys(found))


def is_image(file: Path) -> bool:
    """Returns whether a name has the suffix of an image format, in upper or lower case.

    Hidden files are no images; among them are the "._" files that macOS writes beside images.
    """
    return not file.name.startswith(".") and file.suffix.lower() in _suffixes()


@functools.cache
def _suffixes() -> frozenset[str]:
    """Returns the suffixes of all formats that Pillow decodes."""
    Image.init()
    formats = Image.OPEN.keys() - _NO_DECODER
    return frozenset(
        suffix for suffix, name in Image.registered_extensions().items() if name in formats
    )


def _split(text: str) -> Iterator[str]:
    """Yields the names in a list that is separated by commas."""
    if _is_found(text):
        yield text
        return
    parts = text.split(",")
    while parts:
        for count in range(1, len(parts) + 1):
            joined = ",".join(parts[:count])
            name = joined if _is_found(joined) else joined.strip()
            if _is_found(name):
                break
        else:  # nothing has this name: report the part up to the next comma
            count, name = 1, parts[0].strip()
        if name:
            yield name
        parts = parts[count:]


def _is_found(name: str) -> bool:
    path = os.path.expanduser(name)
    # Not Path.exists, which raises OSError for a name that is too long.
    return os.path.exists(path) or (glob.has_magic(path) and any(glob.iglob(path, recursive=True)))


def _expand(name: str) -> list[Path]:
    """Returns the files of a name without commas."""
    path = Path(name).expanduser()
    if path.is_dir():
        files, kind = sorted(_below(path)), "folder"
    elif not path.exists() and glob.has_magic(name):
        matches = map(Path, glob.glob(str(path), recursive=True))
        # A pattern may match a folder and the files in it.
        found = (_below(match) if match.is_dir() else [match] for match in matches)
        files, kind = (
            sorted({file for files in found for file in files if is_image(file)}),
            "pattern",
        )
    elif path.exists():
        return [path]
    else:
        raise UserError(f"{name}: No such file or directory")
    if not files:
        raise UserError(f"{name}: the {kind} holds no image")
    return files


def _below(folder: Path) -> Iterator[Path]:
    """Yields the images below a folder, without hidden folders."""
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from filter(is_image, (Path(root, name) for name in files))
