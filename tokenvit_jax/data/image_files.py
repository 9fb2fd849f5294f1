"""Finds the image files that a user names: files, folders and patterns."""

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenvit_jax.data.files import image_suffixes, is_hidden, list_images
from tokenvit_jax.errors import UserError


def find_images(names: Sequence[str]) -> list[Path]:
    """Returns the image files that a user names, each once.

    Args:
      names: each a file, a folder (all images below it), a pattern such as ``photos/**/*.jpg``, or
        several of these separated by commas. Files may have commas in their names. A file that is
        named itself can have any suffix; folders and patterns give the visible files that have
        the suffix of an image, sorted by name.

    Raises:
      UserError: a file does not exist, or a folder or pattern holds no image.
    """
    found = [file for text in names for name in _split(text) for file in _expand(name)]
    return list(dict.fromkeys(found))


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
    return os.path.lexists(path) or (glob.has_magic(path) and any(glob.iglob(path, recursive=True)))


def _expand(name: str) -> list[Path]:
    """Returns the files of a name without commas."""
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path):
        files, kind = _below(path), "folder"
    elif os.path.lexists(path):  # reading tells what is wrong with a dangling link
        return [path]
    elif glob.has_magic(name):
        files, kind = _matches(str(path)), "pattern"
    else:
        raise UserError(f"{name}: No such file or directory")
    if not files:
        raise UserError(f"{name}: the {kind} holds no image")
    return files


def _matches(pattern: str) -> list[Path]:
    """Returns the images that match a pattern, and those below the folders that match it."""
    found = {}
    for path in map(Path, glob.iglob(pattern, recursive=True)):
        if os.path.isdir(path):
            images = _below(path)
        else:
            visible = not is_hidden(path.name) and path.suffix.lower() in image_suffixes()
            images = [path] if visible else []
        for image in images:
            # Linked folders may form circles, in which a pattern finds an image again and again.
            real = os.path.realpath(image.parent), image.name
            found[real] = min(found.get(real, image), image, key=lambda p: (len(p.parts), p))
    return sorted(found.values())


def _below(folder: Path) -> list[Path]:
    return [folder / name for name in list_images(folder)]
