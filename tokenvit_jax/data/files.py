"""Finds image files in folders."""

import functools
import os
from pathlib import Path

from PIL import Image

# Formats that Pillow only names, or reads with the help of another program.
_NOT_READ = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


def list_folders(folder: Path) -> tuple[str, ...]:
    """Returns the sorted names of the visible folders in a folder."""
    with os.scandir(folder) as entries:
        return tuple(sorted(e.name for e in entries if e.is_dir() and not is_hidden(e.name)))


def list_images(folder: Path) -> list[str]:
    """Returns the sorted paths of the images at any depth, relative to a folder, with "/"."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not is_hidden(name)]
        inside = Path(parent).relative_to(folder)
        found += [
            (inside / name).as_posix()
            for name in files
            if not is_hidden(name) and Path(name).suffix.lower() in image_suffixes()
        ]
    return sorted(found)


def is_hidden(name: str) -> bool:
    """Tells hidden files, with macOS's AppleDouble files ("._a.jpg"), from others."""
    return name.startswith(".") or name == "__MACOSX"


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Returns the suffixes of all files that Pillow reads by itself, in lower case."""
    Image.init()
    formats = Image.OPEN.keys() - _NOT_READ
    return frozenset(s for s, name in Image.registered_extensions().items() if name in formats)
