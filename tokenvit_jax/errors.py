"""The one exception type whose message a command prints as a line of its own."""


class UserError(ValueError):
    """A mistake of the caller: names the value found and what would be valid."""
