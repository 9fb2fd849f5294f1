"""Finds files in folders, and reads text files."""

import codecs
import errno
import functools
import os
import stat
from pathlib import Path
from typing import BinaryIO, NoReturn

from PIL import Image

from tokenvit_jax.errors import UserError

# Formats that Pillow only names, or reads with the help of another program.
_NOT_READ = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
# Files and folders that macOS, Windows and network drives leave beside images.
_LEFT_BY_SYSTEMS = {"__macosx", "thumbs.db", "desktop.ini", "$recycle.bin", "@eadir"}


def list_folders(folder: Path) -> tuple[str, ...]:
    """Returns the sorted names of the visible folders in a folder.

    Raises:
      UserError: the folder cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            return tuple(sorted(e.name for e in entries if not is_hidden(e.name) and _is_folder(e)))
    except OSError as error:
        _cannot_read(error)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links that form a circle
        return False


def list_images(folder: Path) -> list[str]:
    """Returns the sorted paths of the images at any depth, relative to a folder, with "/".

    Linked folders are read, too, but no folder twice: links may form circles.

    Raises:
      UserError: a folder cannot be read.
    """
    found, seen = [], set()
    for parent, folders, files in os.walk(folder, onerror=_cannot_read, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        inside = Path(parent).relative_to(folder)
        found += [
            (inside / name).as_posix()
            for name in files
            if not is_hidden(name) and Path(name).suffix.lower() in image_suffixes()
        ]
    return sorted(found)


def _cannot_read(error: OSError) -> NoReturn:
    raise UserError(f"{error.filename}: {error.strerror}") from error


def open_file(path: Path) -> BinaryIO:
    """Opens a file for reading; OSError for anything else.

    Opening a pipe would wait for its writer, and a device may have no end.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise OSError(errno.EINVAL, f"is {kind}; valid: a file", str(path))
    return open(path, "rb")


def read_file(path: Path) -> bytes:
    """Returns the contents of a file.

    Raises:
      UserError: it cannot be read; the message names it.
    """
    try:
        with open_file(path) as file:
            return file.read()
    except OSError as error:
        raise UserError(f"{path}: {error_text(error)}") from error


def read_text(path: Path) -> str:
    """Returns the text of a file in UTF-8, or in UTF-16 with its mark, as Windows writes it.

    Raises:
      UserError: the file cannot be read, or has another encoding.
    """
    content = read_file(path)
    marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if marked else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not a text in UTF-8: byte {error.start:,} is {content[error.start]:#04x}; "
            "valid: save it as UTF-8"
        ) from error
    if "\0" in text:
        raise UserError(f"{path} is not a text in UTF-8: it has zeros; valid: save it as UTF-8")
    return text


def is_hidden(name: str) -> bool:
    """Tells hidden files, and those that systems leave beside images ("._a.jpg"), from others."""
    return name.startswith(".") or name.lower() in _LEFT_BY_SYSTEMS


@functools.cache
def image_formats() -> tuple[str, ...]:
    """Returns the formats that Pillow reads by itself, the common ones first."""
    Image.preinit()
    Image.init()
    return tuple(name for name in Image.ID if name not in _NOT_READ)


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Returns the suffixes of all files that Pillow reads by itself, in lower case."""
    formats = image_formats()
    return frozenset(s for s, name in Image.registered_extensions().items() if name in formats)


def error_text(error: Exception) -> str:
    """Returns the text of an error; its type where the text alone says nothing."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error)
    known = isinstance(error, OSError | RuntimeError | SyntaxError | ValueError)
    return text if text and known else f"{type(error).__name__} {text}".strip()
