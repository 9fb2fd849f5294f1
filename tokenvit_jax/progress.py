"""Shows how far a command is: a bar on a terminal, a line from time to time elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from operator import length_hint
from typing import TypeVar

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

EVERY_SECONDS = 30.0  # between two lines where there is no terminal

Item = TypeVar("Item")


def progress(items: Iterable[Item], what: str, unit: str, total: int = 0) -> Iterator[Item]:
    """Yields the items and shows on stderr how many are done.

    Args:
      items: anything to iterate over.
      what: what is done, such as "evaluating".
      unit: what an item is, such as "batch".
      total: number of items; 0: ``len(items)``, or unknown.
    """
    total = total or length_hint(items) or None
    if on_terminal():
        with logging_redirect_tqdm():
            yield from tqdm(items, what, total, leave=False, unit=unit)
        return
    shown = time.monotonic()
    for count, item in enumerate(items, start=1):
        yield item
        if time.monotonic() - shown >= EVERY_SECONDS:
            shown = time.monotonic()
            of_total = "" if total is None else f" of {total}"
            print(f"{what}: {unit} {count}{of_total}", file=sys.stderr, flush=True)


def on_terminal() -> bool:
    """Returns whether there is a terminal for bars."""
    return sys.stderr is not None and sys.stderr.isatty()


def note(text: str) -> None:
    """Prints a line on stdout at once, above the bars if there are any."""
    tqdm.write(text)
    sys.stdout.flush()
