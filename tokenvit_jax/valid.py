"""Rules for the values of settings: each rule accepts some values and describes them in messages.

A rule stands beside the setting that it is for: `Entry.valid` of an entry of a configuration,
`valid` of the settings of a model.
"""

import math
import numbers
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from tokenvit_jax.errors import UserError

LONGEST = 200  # characters of a value in a message


class Rule(Protocol):
    """Accepts some values; its text describes them, such as "whole numbers from 1"."""

    def accepts(self, value: Any) -> bool:
        """Returns whether a value is valid; never raises."""


class Number(NamedTuple):
    """Finite numbers in an interval. Boolean values are no numbers.

    Attributes:
      low: lowest number.
      high: highest number; None: any.
      above: whether `low` itself is excluded.
      below: whether `high` itself is excluded.
      whole: whether only integers are valid.
    """

    low: float | None = None
    high: float | None = None
    above: bool = False
    below: bool = False
    whole: bool = False

    def accepts(self, value: Any) -> bool:
        kind = numbers.Integral if self.whole else numbers.Real
        if not isinstance(value, kind) or isinstance(value, bool):
            return False
        # Integers and fractions are finite, and perhaps too large for `math`.
        if not isinstance(value, numbers.Rational) and not math.isfinite(value):
            return False
        if self.low is not None and not (value > self.low if self.above else value >= self.low):
            return False
        return self.high is None or (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        kind = "whole numbers" if self.whole else "numbers"
        first, last = "above" if self.above else "from", "to below" if self.below else "to"
        low = "" if self.low is None else f" {first} {_text(self.low)}"
        high = "" if self.high is None else f" {last} {_text(self.high)}"
        return f"{kind}{low}{high}" if low or high else f"finite {kind}"


def _text(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


class OneOf(NamedTuple):
    """Some values; equality is not enough: True is not 1."""

    values: Sequence[Any]

    def accepts(self, value: Any) -> bool:
        return any(type(value) is type(one) and value == one for one in self.values)

    def __str__(self) -> str:
        return ", ".join(map(str, self.values))


class ZeroOr(NamedTuple):
    """0, which turns something off, or the numbers of a rule.

    Attributes:
      rule: the rule; its lowest number is above 0.
    """

    rule: Number

    def accepts(self, value: Any) -> bool:
        return Number(0, 0, whole=self.rule.whole).accepts(value) or self.rule.accepts(value)

    def __str__(self) -> str:
        return f"0, or {self.rule}"


class Flag(NamedTuple):
    """True or False."""

    def accepts(self, value: Any) -> bool:
        return isinstance(value, bool)

    def __str__(self) -> str:
        return "True, False"


class Text(NamedTuple):
    """A text without a null character, such as a name or a path; not only blanks.

    Attributes:
      empty: whether the empty text is valid.
    """

    empty: bool = True

    def accepts(self, value: Any) -> bool:
        if not isinstance(value, str) or "\0" in value:
            return False
        return bool(value.strip()) or (self.empty and not value)

    def __str__(self) -> str:
        return "a text, or '' for none" if self.empty else "a text that is not empty"


class Form(NamedTuple):
    """A text of some form.

    Attributes:
      pattern: regular expression for the whole text.
      meaning: describes the form.
    """

    pattern: str
    meaning: str

    def accepts(self, value: Any) -> bool:
        return isinstance(value, str) and re.fullmatch(self.pattern, value) is not None

    def __str__(self) -> str:
        return self.meaning


class Group(NamedTuple):
    """Values by name, in a dictionary or a `ConfigDict`; a dot would end a name."""

    def accepts(self, value: Any) -> bool:
        if not _is_mapping(value):
            return False
        names = all(isinstance(name, str) and "." not in name for name in value)
        return names and all(map(self.accepts, filter(_is_mapping, value.values())))

    def __str__(self) -> str:
        return "values by name"


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping) or type(value).__name__ == "ConfigDict"  # which is none


class Several(NamedTuple):
    """A tuple or list of values that a rule accepts.

    Attributes:
      rule: rule for every value.
      length: number of values; None: any.
      ascending: whether no value may be below the one before it.
      empty: whether no value at all is valid, if any number of values is.
    """

    rule: Rule
    length: int | None = None
    ascending: bool = False
    empty: bool = True

    def accepts(self, value: Any) -> bool:
        if not isinstance(value, tuple | list) or self.length not in (None, len(value)):
            return False
        if not all(map(self.rule.accepts, value)) or not (value or self.empty):
            return False
        return not self.ascending or list(value) == sorted(value)

    def __str__(self) -> str:
        some = "" if self.empty else "one or more "
        length = some if self.length is None else f"{self.length} "
        return f"{length}{'ascending ' if self.ascending else ''}values, each: {self.rule}"


class Size(NamedTuple):
    """One value for both directions, or (height, width).

    Attributes:
      rule: rule for every value.
    """

    rule: Rule

    def accepts(self, value: Any) -> bool:
        return self.rule.accepts(value) or Several(self.rule, 2).accepts(value)

    def __str__(self) -> str:
        return f"{self.rule}; one number, or (height, width)"


class Either(NamedTuple):
    """Values that one of several rules accepts."""

    rules: Sequence[Rule]

    def accepts(self, value: Any) -> bool:
        return any(rule.accepts(value) for rule in self.rules)

    def __str__(self) -> str:
        return "; or ".join(map(str, self.rules))


def whole(low: int | None = None, high: int | None = None) -> Number:
    """Returns the rule for the integers from `low` to `high`, both included."""
    return Number(low, high, whole=True)


def shown(value: Any) -> str:
    """Returns the representation of any value as one line that is not too long."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # the value's own method, or an integer with thousands of digits
        return f"<{type(value).__name__}>"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def check(name: str, value: Any, rule: Rule) -> None:
    """Raises UserError unless a rule accepts a value.

    Args:
      name: name of the setting as the user writes it, such as "config.batch_size".
      value: its value.
      rule: describes the valid values.
    """
    if not rule.accepts(value):
        raise UserError(f"{name}={shown(value)} is not valid; valid: {rule}")


def check_all(prefix: str, values: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    """Raises UserError for the first value that its rule does not accept.

    Args:
      prefix: precedes the names in messages, such as "expedite.".
      values: value of every setting that has a rule.
      rules: rules by setting.
    """
    for name, rule in rules.items():
        check(f"{prefix}{name}", values[name], rule)
