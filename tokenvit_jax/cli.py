"""What the commands share: parsing flags and configs, and one-line errors instead of tracebacks."""

import logging
import sys
from collections.abc import Callable

from absl import flags

from tokenvit_jax.errors import UserError


def run(main: Callable[[flags.FlagValues], None], flag_values: flags.FlagValues) -> None:
    """Parses the command line and calls ``main``; never returns.

    Exit status 0: done. 1: the work failed for a reason in the message (a missing file, a bad
    value). 2: a flag or a configuration key is wrong. Anything else is a bug of this package and
    keeps its traceback.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    # grain and tensorflow_datasets read absl's global flags, which nobody parses here.
    flags.FLAGS.mark_as_parsed()
    try:
        rest = flag_values(sys.argv)[1:]
        if rest:
            raise UserError(f"unexpected argument {rest[0]!r}; flags have the form --name=value")
    except (flags.Error, AttributeError, KeyError, ValueError, TypeError, OSError) as error:
        _exit(2, error)
    try:
        main(flag_values)
    except UserError as error:
        _exit(1, error)
    sys.exit(0)


def _exit(status: int, error: Exception) -> None:
    message = " ".join(str(error).split())
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)
