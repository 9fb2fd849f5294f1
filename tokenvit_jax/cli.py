"""Parses flags and configs for all commands, and prints one-line errors instead of tracebacks."""

import contextlib
import logging
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from tokenvit_jax import failures, output, streams
from tokenvit_jax.errors import UserError, did_you_mean
from tokenvit_jax.valid import Number, check

if TYPE_CHECKING:
    from ml_collections import ConfigDict
    from PIL import Image

HELP = ("--help", "-h")
DEFAULT_PATH = "true"  # value of a flag such as --report without a path
COLUMN = 44  # where the meanings begin in the text of --help


class UsageError(UserError):
    """A wrong flag or argument that parsing alone does not find: exit status 2."""


_LOG_FORMAT = "%(levelname)s: %(message)s"


def run(
    main: Callable[..., None],
    flag_values: flags.FlagValues,
    *,
    required: Sequence[str] = (),
    positional: Sequence[str] = (),
) -> None:
    """Parses the command line and calls ``main``; never returns.

    Exit status 0: done. 1: the work failed for a reason in the message (a missing file, a bad
    value, a lack of memory). 2: a flag or a configuration key is wrong. 130: interrupted. Anything
    else is a bug of this package and keeps its traceback. A reader of the output that goes away
    (``| head``) does not end the work.

    Args:
      main: the command; takes the parsed flags, then the positional arguments.
      flag_values: the flags that it defines.
      required: names of flags that must be given.
      positional: names of the arguments that have no flag; all must be given.
    """
    with streams.guarded() as stdout, interruptible():
        logging.basicConfig(level=logging.WARNING, format=_LOG_FORMAT)
        for handler in logging.root.handlers:
            if type(handler) is logging.StreamHandler:  # absl's, from the imports of a command
                handler.setFormatter(logging.Formatter(_LOG_FORMAT))
        logging.captureWarnings(True)  # progress bars make room for log messages only
        # grain and tensorflow_datasets read absl's global flags, which are not parsed here.
        flags.FLAGS.mark_as_parsed()
        os.environ.pop("MPLBACKEND", None)  # no picture needs a display, whatever it names
        try:
            main(flag_values, *_parse(flag_values, required, positional))
            stdout.flush()
        except Exception as error:
            message = failures.describe(error)
            if message is None:
                raise
            if isinstance(error, OSError) and error.errno and error.filename is None:
                message = f"{message} ({_outputs(flag_values) or 'path unknown'})"
            _exit(2 if isinstance(error, UsageError) else 1, message)
        if stdout.error is not None and not stdout.unread:
            _exit(1, f"standard output cannot be written: {stdout.error.strerror}")
        sys.exit(0)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Ends the program in one line where Ctrl-C interrupts its context, such as imports."""
    try:
        yield
    except KeyboardInterrupt:
        _exit(130, "interrupted")


def _parse(
    flag_values: flags.FlagValues, required: Sequence[str], positional: Sequence[str]
) -> list[str]:
    """Parses the command line, or prints the help; returns the positional arguments.

    Raises:
      UsageError: the command line is wrong.
    """
    arguments = [argument for argument in sys.argv if argument not in HELP]
    try:
        if len(arguments) < len(sys.argv):
            print(_help(flag_values, arguments))
            sys.exit(0)
        for argument in arguments:
            if re.match("--?(flagfile|undefok)(=|$)", argument):  # absl's own, for all programs
                raise UserError(f"unknown flag {argument}; --help lists all flags")
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
        message = _parse_message(error)
        if message is None:
            raise
        raise UsageError(message) from error
    return rest


def _outputs(flag_values: flags.FlagValues) -> str:
    """Returns the flags that name what a command writes, for errors that name no path."""
    names = ("workdir", "out", "results", "plot", "data_dir")
    given = [name for name in names if name in flag_values and flag_values[name].value is not None]
    return " ".join(f"--{name}={flag_values[name].value}" for name in given)


def config_flags(of_run: bool = False) -> flags.FlagValues:
    """Returns the flag --config=FILE.py[:ARGUMENT] with its overrides --config.key=value.

    Args:
      of_run: whether the overrides may stand without --config; see :func:`run_config`.
    """
    from tokenvit_jax import config_flag  # not every command has a config

    return config_flag.ConfigFlags(of_run)


def read_config(flag_values: flags.FlagValues) -> "ConfigDict":
    """Returns the locked `ConfigDict` of the flag --config."""
    return flag_values["config"].value


def run_config(flag_values: flags.FlagValues, own: "Callable[[], ConfigDict]") -> "ConfigDict":
    """Returns the configuration for a run: that of the flag --config, or the run's own.

    The overrides have changed it.

    Args:
      flag_values: parsed result of ``config_flags(of_run=True)``, perhaps with further flags.
      own: function that reads the run's own configuration.

    Raises:
      UsageError: an override is wrong.
    """
    if flag_values["config"].value is not None:
        return read_config(flag_values)
    config = own()
    try:
        return flag_values.changed(config)
    except UserError as error:
        raise UsageError(str(error)) from error


def define_number(
    flag_values: flags.FlagValues,
    name: str,
    default: float | None,
    meaning: str,
    valid: Number,
) -> None:
    """Defines a flag for a number.

    Args:
      flag_values: the flags that receive it.
      name: name of the flag.
      default: its default.
      meaning: its description.
      valid: rule that tells the valid numbers.
    """
    serializer = flags.ArgumentSerializer()
    flags.DEFINE(_NumberParser(name, valid), name, default, meaning, flag_values, serializer)


class _NumberParser(flags.ArgumentParser):
    """Reads the value of a flag for a number."""

    def __init__(self, name: str, valid: Number):
        self._name, self._valid = name, valid

    def parse(self, text: Any) -> float:
        try:
            value = int(text) if self._valid.whole else float(text)
        except ValueError:
            value = text  # which the rule refuses
        check(f"--{self._name}", value, self._valid)
        return value


def define_path_with_default(flag_values: flags.FlagValues, name: str, meaning: str) -> None:
    """Defines a flag --name=PATH that may stand without a path; it is then `DEFAULT_PATH`.

    Args:
      flag_values: the flags that receive it.
      name: name of the flag.
      meaning: its description.
    """
    serializer = flags.ArgumentSerializer()
    flag = flags.Flag(_PathParser(), serializer, name, None, meaning, boolean=True)
    flags.DEFINE_flag(flag, flag_values)


class _PathParser(flags.ArgumentParser):
    """Reads the value of a flag that may stand without one."""

    def parse(self, text: str) -> str | None:
        return None if text == "false" else text  # --noNAME


def picture_path(
    flag_values: flags.FlagValues, name: str, inputs: Sequence[Path] = ()
) -> Path | None:
    """Returns the path of a flag for a picture; None if it is not given.

    Call this before the work: a picture that cannot be written would lose its result.

    Args:
      flag_values: parsed flags.
      name: name of the flag.
      inputs: files that the picture must not replace.

    Raises:
      UserError: the picture cannot be written there, or not in this format.
    """
    if flag_values[name].value is None:
        return None
    from matplotlib.backend_bases import FigureCanvasBase  # a machine may lack it: see `benchmark`

    path, formats = Path(flag_values[name].value), FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise UserError(f"--{name}={path} is not valid; valid suffixes: .{', .'.join(formats)}")
    output.check_file(path, f"--{name}", inputs)
    return path


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
    """Expands "~" to the home folder, and refuses values that no flag can mean.

    These are empty values, which unset variables leave, flags in the place of values, and homes of
    unknown users. This covers all flags that name files: no other flag has values that begin with
    "~".
    """
    for name in flag_values:
        flag = flag_values[name]
        if name.split(".")[0] == "config":  # an empty entry of a configuration has a meaning
            continue
        given = flag.value if isinstance(flag.value, list) else [flag.value]
        if flag.present and (not given or "" in given):
            raise UserError(f"--{name}= is empty; {flag.help}")
        texts = [_expanded(name, text) if isinstance(text, str) else text for text in given]
        flag.value = texts if isinstance(flag.value, list) else texts[0]


def _expanded(name: str, text: str) -> str:
    """Returns the value of a flag with the home folder in place of "~"."""
    if text.startswith("--"):
        raise UserError(f"--{name} has no value but a flag, {text}; valid: --{name}=VALUE")
    if "\0" in text:
        raise UserError(f"--{name}={text!r} is not valid; valid: a text without null characters")
    path = os.path.expanduser(text)
    if path.startswith("~"):
        user = path.split("/")[0]
        raise UserError(f"--{name}={text} is not valid: {user} is no home folder; valid: ./{user}")
    return path


def _parse_message(error: Exception) -> str | None:
    """Returns the message for an error of the command line; None for a bug of this package."""
    if isinstance(error, flags.Error) and isinstance(error.__context__, UserError):
        error = error.__context__
    if isinstance(error, flags.Error):
        return _in_own_words(str(error))
    config = " ".join(argument for argument in sys.argv if argument.startswith("--config"))
    if isinstance(error, UserError | OSError) or not config:
        return failures.describe(error)
    return f"{config}: {type(error).__name__}: {error}"


def _in_own_words(message: str) -> str:
    """Returns absl's message about the value of a flag like other messages."""
    if found := re.fullmatch(r"flag (--.*?)=(.*): value should be one of <(.*)>", message, re.S):
        flag, value, names = found.groups()
        valid = names.split("|")
        return f"{flag}={value} is not valid{did_you_mean(value, valid)}; valid: {', '.join(valid)}"
    if found := re.match(r"flag (--.*?=.*): \('Non-boolean argument", message, re.S):
        return f"{found[1]} is not valid; valid: true, false"
    return message


def _exit(status: int, message: str) -> None:
    print(f"error: {failures.one_line(message)}", file=sys.stderr)
    sys.exit(status)
