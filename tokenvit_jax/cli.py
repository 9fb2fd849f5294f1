"""Parses flags and configs for all commands, and prints one-line errors instead of tracebacks."""

import logging
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from tokenvit_jax.errors import UserError

if TYPE_CHECKING:
    from PIL import Image


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
    # grain and tensorflow_datasets read absl's global flags, which are not parsed here.
    flags.FLAGS.mark_as_parsed()
    if {"--help", "-h"} & set(sys.argv):
        print(f"{sys.modules['__main__'].__doc__}\n{flag_values.get_help()}")
        sys.exit(0)
    try:
        rest = flag_values(sys.argv)[1:]
        if len(rest) > len(positional):
            unexpected = rest[len(positional)]
            raise UserError(f"unexpected argument {unexpected!r}; flags have the form --name=value")
        if len(rest) < len(positional):
            raise UserError(f"argument {positional[len(rest)]} is missing")
        for name in required:
            if flag_values[name].value is None:
                raise UserError(f"--{name} is missing; {flag_values[name].help}")
    except Exception as error:  # a configuration file is the user's code, which may raise any error
        _exit(2, _parse_message(error))
    try:
        main(flag_values, *rest)
    except (UserError, OSError) as error:
        _exit(1, str(error))
    sys.exit(0)


def define_config(flag_values: flags.FlagValues) -> None:
    """Defines the flag --config=FILE.py[:ARGUMENT] and its overrides --config.key=value."""
    from ml_collections import config_flags  # not every command has a config

    config_flags.DEFINE_config_file(
        "config", None, "configuration: --config=FILE.py or FILE.py:ARGUMENT", flag_values
    )


def read_config(flag_values: flags.FlagValues):
    """Returns the locked `ConfigDict` of the flag --config.

    Raises:
      UserError: its file cannot be read.
    """
    from ml_collections import ConfigDict

    config = flag_values["config"].value
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config={flag_values['config'].config_filename}: no such file")
    return config


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
    """Yields the RGB images of :func:`image_files`, one at a time.

    Raises:
      UserError: a file cannot be read or is not an image.
    """
    from tokenvit_jax.data import read_image

    try:
        yield from map(read_image, files)
    except UserError as error:
        raise UserError(f"--images: {error}") from error


def _parse_message(error: Exception) -> str:
    text = str(error)
    if isinstance(error, AttributeError | KeyError | TypeError):
        # ml_collections names only the last part of a wrong key, in nested quotes.
        found = re.search(r"\w+", text)
        keys = [arg.split("=")[0] for arg in sys.argv if arg.startswith("--config.")]
        wrong = next((key for key in keys if found and found[0] in key.split(".")), None)
        hint = re.search(r'Did you mean "(\w+)"', text)
        if wrong or keys:
            key = wrong or keys[0]
            near = f"; did you mean {hint[1]!r}?" if hint else ""
            near = _tasks_with(key.removeprefix("--config.")) or near
            return f"{key} is not a key of the configuration{near}"
    if "Traceback (most recent call last)" in text:
        # ml_collections puts the traceback of a configuration file into its message.
        reason = text.rstrip().splitlines()[-1].split(": ", 1)[-1]
        text = text.split("Error whilst parsing", 1)[0] + reason
    known = isinstance(error, UserError | flags.Error | OSError)
    return text if known else f"--config: {type(error).__name__}: {text}"


def _tasks_with(key: str) -> str:
    """Names the tasks that have an entry which this configuration lacks; "" if none has."""
    from tokenvit_jax.tasks import tasks_with  # only commands with a configuration need the tasks

    found = ", ".join(tasks_with(key))
    return f"; config.{key} is an entry of the tasks: {found}" if found else ""


def _exit(status: int, message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)
