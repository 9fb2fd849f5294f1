"""Describes failures of the machine or its settings in one line that says what to change."""

import errno
import os
import traceback

from tokenvit_jax.errors import UserError

SMALLER = "use a smaller batch size or smaller images"
MAX_CHARACTERS = 2000  # of a message: values of flags may have any length

_HINTS = {
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine",
    errno.EAGAIN: "raise the limit of processes (ulimit -u), or use fewer workers",
    errno.ENOMEM: SMALLER,
}


def describe(error: BaseException) -> str | None:
    """Returns what failed and what to change; None for an error of this package, a bug.

    Args:
      error: exception that ended a command.
    """
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        return _of_system(error)
    if isinstance(error, MemoryError):
        return f"out of memory: {error}; {SMALLER}" if str(error) else f"out of memory; {SMALLER}"
    if isinstance(error, RecursionError):
        return f"the input is nested too deeply: {error}"
    if isinstance(error, Warning):
        kind = type(error).__name__
        return f"PYTHONWARNINGS turns a {kind} of a library into an error: {error}; valid: unset"
    if isinstance(error, ImportError):
        return _of_import(error)
    if isinstance(error, UnicodeEncodeError):
        found = error.object[error.start : error.end]
        return (
            f"{found!r} does not exist in the encoding {error.encoding} of this machine; set "
            "LC_ALL=C.UTF-8, or PYTHONUTF8=1"
        )
    if isinstance(error, RuntimeError) and "home directory" in str(error):
        return "a path begins with ~, but there is no home folder; set HOME, or write the path"
    return _of_jax(error)


def one_line(message: str) -> str:
    """Returns a message as one printable line of limited length."""
    message = " ".join(message.split())
    if len(message) > MAX_CHARACTERS:
        half = MAX_CHARACTERS // 2
        message = f"{message[:half]} ... {message[-half:]}"
    return "".join(map(_printable, message))


def _printable(character: str) -> str:
    if character.isprintable():
        return character
    if "\udc80" <= character <= "\udcff":  # a byte of a file name that is no text
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def _of_system(error: OSError) -> str:
    if error.errno is None:  # a library's own message
        return str(error) or type(error).__name__
    text, paths = error.strerror or str(error), [error.filename, error.filename2]
    paths = [os.fsdecode(path) for path in paths if isinstance(path, str | bytes | os.PathLike)]
    if paths:
        return f"{' -> '.join(paths)}: {text}"
    if error.errno == errno.ENOENT and not _has_current_folder():
        return "the current folder does not exist any more; change to another one"
    hint = _HINTS.get(error.errno)
    return f"{text}; {hint}" if hint else text


def _has_current_folder() -> bool:
    try:
        os.getcwd()
    except OSError:
        return False
    return True


def _of_import(error: ImportError) -> str | None:
    package = (error.name or "").partition(".")[0]
    if package in ("", __package__):
        return None
    if isinstance(error, ModuleNotFoundError):
        return f"the package {package} is missing: pip install {package} ({error})"
    return f"the package {package} cannot be imported: {error}"


def _of_jax(error: BaseException) -> str | None:
    kind, text = type(error).__name__, str(error)
    if kind in ("JaxRuntimeError", "XlaRuntimeError") and "RESOURCE_EXHAUSTED" in text:
        return f"out of memory: {text.splitlines()[0]}; {SMALLER}"
    frames = traceback.extract_tb(error.__traceback__)
    if frames and os.path.basename(frames[-1].filename) == "xla_bridge.py":
        platforms = os.environ.get("JAX_PLATFORMS")
        asked = f"JAX_PLATFORMS={platforms}: " if platforms else ""
        return (
            f"{asked}JAX finds no such device{': ' * bool(text)}{text}; valid: a platform that is "
            "installed, such as JAX_PLATFORMS=cpu"
        )
    return None
