"""The exception type whose message a command prints as a single line."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake of the caller; the message names the value found and what would be valid."""


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """Returns ``" (did you mean 'x'?)"`` if one of the valid names is similar, else ``""``."""
    near = difflib.get_close_matches(name, list(valid), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def blame(error: UserError, flag: str, entry: str) -> UserError:
    """Returns an error of a flag as the error of the entry that the value came from.

    Args:
      error: the error; its message may begin with the flag.
      flag: the flag with its value, such as "--workdir=runs/a".
      entry: the entry with its value, such as "config.initial.workdir=runs/a".
    """
    message = str(error)
    known = message.startswith(f"{flag} ")
    return UserError(f"{entry}{message.removeprefix(flag) if known else f': {message}'}")
