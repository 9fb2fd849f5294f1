"""The exception type whose message a command prints as a single line."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake of the caller; the message names the value found and what would be valid."""


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """Returns ``" (did you mean 'x'?)"`` if one of the valid names is similar, else ``""``."""
    near = difflib.get_close_matches(name, list(valid), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
