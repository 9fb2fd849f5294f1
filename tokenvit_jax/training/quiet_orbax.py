"""Keeps orbax quiet and patient: its messages, its event loops and its counters."""

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import tensorstore

# orbax logs the errors that it raises, with tracebacks; asyncio those of its other writers.
logging.getLogger("absl").setLevel(logging.CRITICAL)
logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def brief(error: BaseException) -> str:
    """Returns the first line of the message of the first cause of an error.

    Errors of storage go on with locations in its source; those that orbax wraps around them begin
    with indices into an array.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    line = str(error).partition("\n")[0] or type(error).__name__
    return line if len(line) <= 400 else f"{line[:150]} ... {line[-250:]}"


class PatientLoop(asyncio.SelectorEventLoop):
    """An event loop that closes when everything it started has ended."""

    def __init__(self):
        try:
            super().__init__()
        except OSError:  # too many open files
            self._closed = True  # asyncio would try to close what was not opened
            raise

    def close(self) -> None:
        while not self.is_closed() and (tasks := asyncio.all_tasks(self)):
            self.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        super().close()

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        # orbax raises the first error and does not look at those of the other arrays.
        if "never retrieved" not in context["message"]:
            super().call_exception_handler(context)


class _PatientPolicy(asyncio.DefaultEventLoopPolicy):
    def new_event_loop(self) -> PatientLoop:
        return PatientLoop()


@contextlib.contextmanager
def patient_loops() -> Iterator[None]:
    """Makes orbax wait for all arrays when one of them cannot be read or written.

    Otherwise the others would go on in the background and report to a loop that is closed, which
    prints tracebacks.
    """
    former = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(_PatientPolicy())
    try:
        yield
    finally:
        asyncio.set_event_loop_policy(former)


@contextlib.contextmanager
def no_counters() -> Iterator[None]:
    """Keeps orbax from asking tensorstore for its counters, which only a log of orbax shows.

    With every answer tensorstore 0.1.86 loses memory, about 60 kB per checkpoint.
    """
    former = tensorstore.experimental_collect_matching_metrics
    tensorstore.experimental_collect_matching_metrics = lambda *_: []
    try:
        yield
    finally:
        tensorstore.experimental_collect_matching_metrics = former
