"""Standard streams that may be closed, full, or of an encoding that lacks a character."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any


class Guarded:
    """A text stream whose writes never raise; what cannot be written is dropped.

    A reader that goes away (``| head``) or a full disk must not end the work whose messages the
    stream shows.

    Attributes:
      error: the first error of the stream; None: everything was written.
    """

    def __init__(self, stream: Any):
        self._stream = stream
        self._is_terminal = hasattr(stream, "isatty") and stream.isatty()
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @property
    def unread(self) -> bool:
        """Whether the reader went away: a pipe has no other end, or a terminal was closed."""
        closed = self._is_terminal and self.error is not None and self.error.errno == errno.EIO
        return closed or isinstance(self.error, BrokenPipeError)

    def write(self, text: str) -> int:
        """Writes a text unless the stream has failed."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Writes what is buffered unless the stream has failed."""
        self._try(self._stream.flush)

    def _try(self, call) -> None:
        if self.error is not None:
            return
        try:
            call()
        except OSError as error:
            self.error = error
            with contextlib.suppress(OSError):  # a stream of a test or notebook has no number
                # The interpreter flushes what is still buffered when it exits.
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


@contextlib.contextmanager
def guarded() -> Iterator[Guarded]:
    """Guards standard output and standard error in its context; yields the former."""
    before = sys.stdout, sys.stderr
    _open_closed()
    with contextlib.suppress(AttributeError):  # not a stream with an encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = output, _ = Guarded(sys.stdout), Guarded(sys.stderr)
    try:
        yield output
    finally:
        output.flush()
        sys.stdout, sys.stderr = before


def _open_closed() -> None:
    """Opens closed streams: a file of the run would get their numbers, and foreign text."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115
