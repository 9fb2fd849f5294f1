"""Writes files and folders: each is complete or does not appear, and every error names its path.

A file is written under a hidden name and renamed when it is complete. So neither a killed process
nor a full disk leaves a half of it, and what it replaces stays until then.

Functions take the name of a path, such as "--out", for messages: "--out=PATH cannot be written".
"""

import contextlib
import logging
import os
import shutil
import stat
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from tokenvit_jax.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HIDDEN = ".tmp-"  # begins the names of files and folders that are not complete
_KEPT = 50  # characters of a name that its hidden name keeps: a name has at most 255 bytes


# ------------------------------------------------------------------------------------------------
# Checks before the work
# ------------------------------------------------------------------------------------------------


def check_writable(path: Path, name: str = "") -> None:
    """Raises UserError if neither a file nor a folder can be made at a path; makes nothing.

    Args:
      path: file or folder that may exist; missing folders above it can be made later.
      name: how the caller calls the path, such as "--out".
    """
    missing, existing = [], path.absolute()
    while not os.path.lexists(existing):
        missing.append(existing.name)
        existing = existing.parent
    if missing and not os.path.isdir(existing):
        raise UserError(f"{_named(path, name)} cannot be written: {existing} is not a folder")
    folder = existing if os.path.isdir(existing) else existing.parent
    if not os.access(existing, os.W_OK) or not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{_named(path, name)} cannot be written: no permission to write {folder}")
    with writing(path, name):
        for long in (path, *(folder / part for part in missing)):  # perhaps too long
            with contextlib.suppress(FileNotFoundError):
                os.lstat(long)
    try:  # permissions do not tell everything, such as for /proc
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(
            f"{_named(path, name)} cannot be written: no file can be made in {folder} "
            f"({_reason(error)})"
        ) from error


def check_folder(path: Path, name: str = "") -> None:
    """Raises UserError unless a path is a folder that can be written, or can become one."""
    if os.path.lexists(path) and not os.path.isdir(path):
        raise UserError(f"{_named(path, name)} is a file; valid: a folder")
    check_writable(path, name)


def check_file(path: Path, name: str = "", inputs: Iterable[Path] = ()) -> None:
    """Raises UserError unless a file can be written, or replaced, at a path.

    Args:
      path: the file.
      name: how the caller calls the path, such as "--plot".
      inputs: files that must not be replaced.
    """
    if os.path.isdir(path):
        raise UserError(f"{_named(path, name)} is a folder; valid: a file")
    with writing(path, name):
        _target(path)
    if is_one_of(path, identities(inputs)):
        raise UserError(f"{_named(path, name)} is an input, which is never replaced")
    check_writable(path, name)


def check_new_file(path: Path, name: str = "") -> None:
    """Raises UserError if something exists at a path, or no file can be written there.

    One new folder is made for it; a path with several is more likely misspelt.
    """
    if os.path.lexists(path):
        raise UserError(f"{_named(path, name)} exists already; valid: a path where nothing exists")
    check_writable(path, name)
    above = path.absolute().parent.parent
    if not above.exists():
        raise UserError(f"{_named(path, name)} cannot be written: there is no folder {above}")


def check_new_folder(path: Path, name: str = "") -> None:
    """Raises UserError unless a path can become a folder, or is an empty one."""
    with writing(path, name):
        if os.path.lexists(path) and not (os.path.isdir(path) and _is_empty(path)):
            raise UserError(
                f"{_named(path, name)} exists already; valid: a path where nothing exists, or an "
                "empty folder"
            )
    check_writable(path, name)


def _is_empty(folder: Path) -> bool:
    """Returns whether a folder has nothing but what a killed process left incomplete."""
    return all(path.name.startswith(_HIDDEN) for path in folder.iterdir())


def identities(files: Iterable[Path]) -> set[tuple[int, int]]:
    """Returns what tells files apart, whatever their paths are, for :func:`is_one_of`."""
    found = set()
    for file in files:
        with contextlib.suppress(OSError):
            status = file.stat()
            found.add((status.st_dev, status.st_ino))
    return found


def is_one_of(path: Path, known: set[tuple[int, int]]) -> bool:
    """Returns whether a path leads to one of the files in a result of :func:`identities`."""
    return not known.isdisjoint(identities([path]))


# ------------------------------------------------------------------------------------------------
# Files and folders
# ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(path: Path, name: str = "", kinds: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turns errors of the operating system into a UserError that names a path.

    Args:
      path: what is written.
      name: how the caller calls the path, such as "--out"; empty: the path alone.
      kinds: exceptions with which a library reports that it cannot write.
    """
    try:
        yield
    except (OSError, *kinds) as error:
        raise UserError(f"{_named(path, name)} cannot be written: {_reason(error)}") from error


@contextlib.contextmanager
def new_file(path: Path, name: str = "", kinds: tuple[type[Exception], ...] = ()) -> Iterator[Path]:
    """Provides a path to write a file to, which then gets its name; an error leaves no part of it.

    Args:
      path: the file, which may exist; folders above it are made.
      name: how the caller calls the path, such as "--out".
      kinds: exceptions with which a library reports that it cannot write.

    Raises:
      UserError: the file cannot be written.
    """
    with writing(path, name, kinds):
        target = _target(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{_HIDDEN}{target.name[-_KEPT:]}")
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())  # a network file system reports a full disk only here
            temporary.replace(target)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def write_file(path: Path, content: bytes | str, name: str = "") -> None:
    """Writes or replaces a file; see :func:`new_file`.

    Raises:
      UserError: the file cannot be written.
    """
    content = content.encode() if isinstance(content, str) else content
    with new_file(path, name) as temporary, temporary.open("wb", buffering=0) as file:
        _write_all(file.fileno(), content)


def write_figure(path: Path, figure: "Figure", name: str = "") -> None:
    """Writes or replaces a picture of a figure, in the format that the suffix names.

    Raises:
      UserError: the file cannot be written.
    """
    write_file(path, figure_bytes(figure, path.suffix[1:].lower()), name)


def figure_bytes(figure: "Figure", kind: str, metadata: Mapping[str, str] | None = None) -> bytes:
    """Returns the content of a picture of a figure.

    Args:
      figure: the figure.
      kind: a format of matplotlib, such as "png".
      metadata: what the file says about itself, in the terms of its format.
    """
    content = BytesIO()
    with warnings.catch_warnings():  # names of files and classes may be in any script: boxes
        warnings.filterwarnings("ignore", r"Glyph .* missing from")
        figure.savefig(content, format=kind, dpi=150, metadata=metadata)
    return content.getvalue()


@contextlib.contextmanager
def new_folder(path: Path, name: str = "") -> Iterator[Path]:
    """Provides a folder to fill, which then becomes a folder at a path; an error leaves no part.

    Args:
      path: the new folder, or an empty one, which receives the content.
      name: how the caller calls the path, such as "--out".

    Raises:
      UserError: something is at the path, or it cannot be written. A UserError about a file in the
        folder names the file's final path.
    """
    check_new_folder(path, name)
    exists = os.path.isdir(path)  # such as a mounted disk, which cannot be replaced
    base = path if exists else path.absolute().parent
    with writing(path, name):
        base.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=_HIDDEN, dir=base))
        folder = temporary / "new"  # unlike its parent, readable for others
    try:
        folder.mkdir()
        try:
            yield folder
        except UserError as error:
            raise UserError(str(error).replace(str(folder), str(path))) from error
        with writing(path, name):
            if exists:
                for part in sorted(folder.iterdir()):
                    part.rename(path / part.name)
            else:
                folder.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class Log:
    """A file that grows by whole records, such as lines.

    A record that cannot be written completely leaves no part. If the file is deleted, it is written
    again with all records.
    """

    def __init__(self, path: Path, end: bytes = b""):
        """Opens a new file, or one that exists, for more records.

        Args:
          path: the file.
          end: what follows the last record; a file that exists ends with it.

        Raises:
          UserError: the file cannot be written.
        """
        self._path, self._end = path, end
        with writing(path):
            self._file = self._open()

    def append(self, record: bytes) -> None:
        """Writes a record.

        Raises:
          UserError: the record cannot be written; the file is as before.
        """
        with writing(self._path):
            self._find_again()
            size = self._file.seek(0, os.SEEK_END)
            place = self._file.seek(max(size - len(self._end), 0))
            try:
                _write_all(self._file.fileno(), record + self._end)
            except OSError:
                with contextlib.suppress(OSError):
                    self._file.truncate(place)
                    self._file.seek(place)
                    _write_all(self._file.fileno(), self._end)
                raise

    def close(self) -> None:
        """Closes the file."""
        with contextlib.suppress(OSError):  # nothing is buffered
            self._file.close()

    def _open(self):
        self._path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(_target(self._path), os.O_RDWR | os.O_CREAT, 0o666)
        return os.fdopen(descriptor, "r+b", buffering=0)

    def _find_again(self) -> None:
        """Opens the file again if it was deleted or replaced by another one."""
        try:
            if os.path.samestat(self._path.stat(), os.fstat(self._file.fileno())):
                return
        except FileNotFoundError:
            logging.warning("%s was deleted while it is written: written again", self._path)
            self._file.seek(0)
            write_file(self._path, self._file.read())
        self._file.close()
        self._file = self._open()


def _write_all(descriptor: int, content: bytes) -> None:
    """Writes bytes without a buffer; a disk that gets full may take a part of them first."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _target(path: Path) -> Path:
    """Returns the file that a path leads to, through links; refuses devices and pipes."""
    target = Path(os.path.realpath(path))
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if not stat.S_ISREG(target.stat().st_mode) and not os.path.isdir(target):
            raise OSError("not a regular file")
    return target


def _named(path: Path, name: str) -> str:
    return f"{name}={path}" if name else str(path)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error).partition("\n")[0] or repr(error)


def shown(name: str | Path) -> str:
    """Returns a name with escapes in place of bytes that are no text, line ends and the like."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(name))
