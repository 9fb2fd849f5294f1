"""Parametrised cases of which a sample runs by default and the rest by `make test-slow`."""

from collections.abc import Collection, Iterable

import pytest


def sampled(cases: Iterable, *, keep: Collection = (0,)) -> list:
    """Returns cases for `parametrize`; those not in ``keep``, by number or themselves, are slow.

    A tuple has the values of several arguments.
    """
    found = []
    for number, case in enumerate(cases):
        values = case if type(case) is tuple else (case,)
        kept = number in keep or case in keep
        found.append(pytest.param(*values, marks=() if kept else pytest.mark.slow))
    return found
