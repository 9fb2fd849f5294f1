"""Parametrised cases of which a sample runs by default and the rest by `make test-slow`."""

from collections.abc import Collection, Iterable, Iterator

import pytest


def sampled(cases: Iterable, *, keep: Collection = (0,)) -> Iterator:
    """Yields cases for `parametrize`; those not in ``keep``, by number or themselves, are slow.

    A tuple has the values of several arguments.
    """
    for number, case in enumerate(cases):
        values = case if type(case) is tuple else (case,)
        kept = number in keep or case in keep
        yield pytest.param(*values, marks=() if kept else pytest.mark.slow)
