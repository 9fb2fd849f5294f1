"""Parses flags and configs for all commands, and prints one-line errors instead of tracebacks."""

import logging
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from tokenvit_jax.errors import UserError

if TYPE_CHECKING:
    from ml_collections import ConfigDict
    from PIL import Image

HELP = ("--help", "-h")
COLUMN = 44  # where the meanings begin in the text of --help


def run(
    main: Callable[..., None],
    flag_values: flags.FlagValues,
    *,
    required: Sequence[str] = (),
    positional: Sequence[str] = (),
) -> None:
    """Parses the command line and calls ``main``; never returns.

    Exit status 0: done. 1: the work failed for a reason in the message (a missing file, a bad
    value). 2: a flag or a configuration key is wrong. Anything else is a bug of this package and
    keeps its traceback.

    Args:
      main: the command; takes the parsed flags, then the positional arguments.
      flag_values: the flags that it defines.
      required: names of flags that must be given.
      positional: names of the arguments that have no flag; all must be given.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.captureWarnings(True)  # progress bars make room for log messages only
    # grain and tensorflow_datasets read absl's global flags, which are not parsed here.
    flags.FLAGS.mark_as_parsed()
    arguments = [argument for argument in sys.argv if argument not in HELP]
    try:
        if len(arguments) < len(sys.argv):
            print(_help(flag_values, arguments))
            sys.exit(0)
        rest = flag_values(arguments)[1:]
        if len(rest) > len(positional):
            unexpected = rest[len(positional)]
            raise UserError(f"unexpected argument {unexpected!r}; flags have the form --name=value")
        if len(rest) < len(positional):
            raise UserError(f"argument {positional[len(rest)]} is missing")
        for name in required:
            if flag_values[name].value is None:
                raise UserError(f"--{name} is missing; {flag_values[name].help}")
        _check_texts(flag_values)
    except Exception as error:  # a configuration file is the user's code, which may raise any error
        _exit(2, _parse_message(error))
    try:
        main(flag_values, *rest)
    except (UserError, OSError) as error:
        _exit(1, str(error))
    except KeyboardInterrupt:
        _exit(130, "interrupted")
    sys.exit(0)


def config_flags() -> flags.FlagValues:
    """Returns the flag --config=FILE.py[:ARGUMENT] with its overrides --config.key=value."""
    from tokenvit_jax import config_flag  # not every command has a config

    return config_flag.ConfigFlags()


def read_config(flag_values: flags.FlagValues) -> "ConfigDict":
    """Returns the locked `ConfigDict` of the flag --config."""
    return flag_values["config"].value


def picture_path(flag_values: flags.FlagValues, name: str) -> Path | None:
    """Returns the path of a flag for a picture, and makes its folder; None if it is not given.

    Call this before the work: a picture that cannot be written would lose its result.

    Args:
      flag_values: parsed flags.
      name: name of the flag.

    Raises:
      UserError: the picture cannot be written there, or not in this format.
    """
    if flag_values[name].value is None:
        return None
    from matplotlib.backend_bases import FigureCanvasBase  # a machine may lack it: see `benchmark`

    path, formats = Path(flag_values[name].value), FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise UserError(f"--{name}={path} is not valid; valid suffixes: .{', .'.join(formats)}")
    if path.is_dir():
        raise UserError(f"--{name}={path} is a folder; valid: a file")
    _make_folder(path.parent, f"--{name}={path}")
    if path.exists() and not os.access(path, os.W_OK):
        raise UserError(f"--{name}={path} cannot be written: no permission")
    return path


def output_folder(flag_values: flags.FlagValues, name: str) -> Path | None:
    """Returns the path of a flag for a folder, and makes it; None if it is not given.

    Call this before the work, as :func:`picture_path`.

    Args:
      flag_values: parsed flags.
      name: name of the flag.

    Raises:
      UserError: the folder cannot be made or written.
    """
    if flag_values[name].value is None:
        return None
    path = Path(flag_values[name].value)
    _make_folder(path, f"--{name}={path}")
    return path


def _make_folder(path: Path, flag: str) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag} cannot be written: {error}") from error
    if not os.access(path, os.W_OK):
        raise UserError(f"{flag} cannot be written: no permission")


def define_images(flag_values: flags.FlagValues, meaning: str) -> None:
    """Defines the flag --images, whose value :func:`image_files` reads.

    Args:
      flag_values: the flags that receive it.
      meaning: what the command does with the images.
    """
    flags.DEFINE_multi_string(
        "images",
        None,
        f"{meaning}: files, folders or quoted patterns, separated by commas",
        flag_values=flag_values,
    )


def image_files(names: Sequence[str]) -> list[Path]:
    """Returns the image files that the flag --images names.

    Raises:
      UserError: the flag names no file, a file does not exist, or a folder or pattern holds no
        image.
    """
    from tokenvit_jax.data.image_files import find_images  # few commands read images

    try:
        files = find_images(names)
    except UserError as error:
        raise UserError(f"--images: {error}") from error
    if not files:
        raise UserError("--images names no file")
    return files


def read_images(files: Sequence[Path]) -> "Iterator[Image.Image]":
    """Yields the images of :func:`image_files`, one at a time.

    Raises:
      UserError: a file cannot be read or is not an image.
    """
    from tokenvit_jax.data import read_image

    try:
        yield from map(read_image, files)
    except UserError as error:
        raise UserError(f"--images: {error}") from error


def _help(flag_values: flags.FlagValues, arguments: Sequence[str]) -> str:
    """Returns the description of a command, its flags and the entries of its configuration."""
    lines = [sys.modules["__main__"].__doc__ or ""]
    names = sorted(set(flag_values) - {"flagfile", "undefok"})
    lines += ["Flags:", ""] if names else []
    for name in names:
        flag = flag_values[name]
        default = "" if flag.default in (None, []) else f"={flag.default_as_str.strip(chr(39))}"
        lines.append(_line(f"--{name}{default}", flag.help))
    if "config" in flag_values:
        from tokenvit_jax import config_keys

        flag_values(arguments)
        config = flag_values["config"].value
        more = "; with --config=..., --help lists those of that configuration" * (config is None)
        lines += ["", f"Entries of the configuration, changed by --config.KEY=VALUE{more}:", ""]
        entries = config_keys.list_entries(config)
        lines += [_line(f"{key}={value!r}", meaning) for key, value, meaning in entries]
    return "\n".join(lines)


def _line(start: str, meaning: str) -> str:
    """Returns a name and its wrapped meaning, in two columns."""
    first, *others = textwrap.wrap(meaning, 100 - COLUMN) or [""]
    below = "\n" + " " * COLUMN
    start = f"  {start}"
    start = start.ljust(COLUMN) if len(start) < COLUMN - 1 else start + below
    return start + below.join([first, *others])


def _check_texts(flag_values: flags.FlagValues) -> None:
    """Expands "~" to the home folder, and refuses empty values, which unset variables leave.

    This covers all flags that name files: no other flag has values that begin with "~".
    """
    for name in flag_values:
        flag = flag_values[name]
        if name.split(".")[0] == "config":  # an empty entry of a configuration has a meaning
            continue
        texts = flag.value if isinstance(flag.value, list) else [flag.value]
        texts = [os.path.expanduser(text) if isinstance(text, str) else text for text in texts]
        if flag.present and (not texts or "" in texts):
            raise UserError(f"--{name}= is empty; {flag.help}")
        flag.value = texts if isinstance(flag.value, list) else texts[0]


def _parse_message(error: Exception) -> str:
    if isinstance(error, flags.Error) and isinstance(error.__context__, UserError):
        error = error.__context__
    known = isinstance(error, UserError | flags.Error | OSError)
    return str(error) if known else f"--config: {type(error).__name__}: {error}"


def _exit(status: int, message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)
