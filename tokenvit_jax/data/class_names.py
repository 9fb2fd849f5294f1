"""Compares names of classes, and translates between their orders."""

from collections.abc import Sequence

_NUM_NAMED = 3


def different_names(wanted: Sequence[str], found: Sequence[str]) -> str:
    """Describes in one line how the names found differ from the ones wanted."""
    if sorted(wanted) == sorted(found):
        return "the same names in another order"
    missing, unknown = set(wanted) - set(found), set(found) - set(wanted)
    parts = [
        f"{word} {_listed(sorted(names))}"
        for word, names in (("without", missing), ("with", unknown))
        if names
    ]
    return f"{len(found)} instead of {len(wanted)} names, {', '.join(parts)}"


def labels_by_value(names: Sequence[str], classes: Sequence[str]) -> dict[int, int]:
    """Returns the label of every value of a dataset: the place of its name among the run's classes.

    Args:
      names: name of each value of the dataset, from 0.
      classes: the same names in the order of the run.
    """
    place = {name: label for label, name in enumerate(classes)}
    return {value: place[name] for value, name in enumerate(names)}


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NUM_NAMED
    return ", ".join(names[:_NUM_NAMED]) + (f" and {more} more" if more > 0 else "")
