"""Keeps a compiler's complaints about its own slowness off standard error."""

import contextlib
import os
import re
import threading
from collections.abc import Iterator

# XLA prints a frame of stars around "Very slow compile? If you want to file a bug, ..." after two
# minutes, and no setting turns it off.
_ALARM = re.compile(rb"slow_operation_alarm\.cc|^\*{20,}$|^\[Compiling module|^\s*$")


@contextlib.contextmanager
def without_alarms() -> Iterator[None]:
    """Drops the alarms that the process writes on standard error within the context."""
    try:
        former = os.dup(2)
    except OSError:  # there is no standard error
        yield
        return
    reader, writer = os.pipe()
    os.dup2(writer, 2)
    os.close(writer)
    thread = threading.Thread(target=_pass_on, args=(reader, former), daemon=True)
    thread.start()
    try:
        yield
    finally:
        os.dup2(former, 2)  # closes the last writer
        thread.join()
        os.close(former)


def _pass_on(reader: int, writer: int) -> None:
    with os.fdopen(reader, "rb") as lines:
        for line in lines:
            if not _ALARM.search(line.rstrip(b"\n")):
                with contextlib.suppress(OSError):
                    os.write(writer, line)
