"""What the commands share: parsing flags and configs, and one-line errors instead of tracebacks."""

import logging
import sys
from collections.abc import Callable

from absl import flags

from tokenvit_jax.errors import UserError


def run(
    main: Callable[..., None], flag_values: flags.FlagValues, positional: tuple[str, ...] = ()
) -> None:
    """Parses the command line and calls ``main``; never returns.

    ``positional`` names the arguments that have no flag; ``main`` receives them after the flags.

    Exit status 0: done. 1: the work failed for a reason in the message (a missing file, a bad
    value). 2: a flag or a configuration key is wrong. Anything else is a bug of this package and
    keeps its traceback.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    # grain and tensorflow_datasets read absl's global flags, which nobody parses here.
    flags.FLAGS.mark_as_parsed()
    try:
        rest = flag_values(sys.argv)[1:]
        if len(rest) > len(positional):
            unexpected = rest[len(positional)]
            raise UserError(f"unexpected argument {unexpected!r}; flags have the form --name=value")
        if len(rest) < len(positional):
            raise UserError(f"argument {positional[len(rest)]} is missing")
    except (flags.Error, AttributeError, KeyError, ValueError, TypeError, OSError) as error:
        _exit(2, error)
    try:
        main(flag_values, *rest)
    except UserError as error:
        _exit(1, error)
    sys.exit(0)


def _exit(status: int, error: Exception) -> None:
    message = " ".join(str(error).split())
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)
