"""Notices SIGTERM, SIGINT and SIGHUP in a program, which ask it to end.

They come before a machine is taken away, from Ctrl-C, and when a terminal is closed.

Python runs its signal handlers between two instructions of the main thread, which may import,
compile or wait for minutes. A program that calls :func:`watch` first therefore has a thread that
learns of a signal at once, and ends the process unless a result would be lost.

This module imports nothing heavy: a program imports it before anything else.
"""

import atexit
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# `timeout` and cluster managers signal a process and then its group: that is one request [s].
_SAME_REQUEST = 0.1

_lock = threading.Lock()
_watching = False
_saves = True  # whether the program saves what it has done
_folders: set[str] = set()  # to remove at the end
_asked_at = None  # time of the first signal; None: there was none
_unsaved = False  # whether ending now would lose finished steps
_forwards = False  # whether another handler of SIGTERM, which tells other processes, takes over


def watch(saves: bool = True) -> None:
    """Starts to watch the signals, once; call it in the main thread.

    The first signal ends the process with status 0 if nothing would be lost; otherwise
    :func:`requested` becomes true, and the program is expected to save and end. A second signal
    ends the process at once, with the status of a shell for this signal (130 or 143). SIGHUP counts
    once, because both the terminal and its shell send it, and not at all under `nohup`.

    Args:
      saves: whether the program saves what it has done; False: already the first signal ends it
        like a second one.
    """
    global _watching, _saves
    if _watching:
        return
    _watching, _saves = True, saves
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    threading.Thread(target=_wait, args=(reader,), name="signals", daemon=True).start()
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    _install()
    # At its end Python gives signals back their default effect, while libraries still shut down.
    atexit.register(lambda: [signal.signal(number, signal.SIG_IGN) for number in SIGNALS])


def watching() -> bool:
    """Returns whether :func:`watch` was called."""
    return _watching


def watch_again() -> None:
    """Takes back signals that a library may have taken since :func:`watch`.

    Python allows that in the main thread only; in another one, nothing changes.
    """
    if threading.current_thread() is threading.main_thread():
        _install()


def forward() -> None:
    """Leaves requests to another handler of SIGTERM, which was installed after this one."""
    global _forwards
    with _lock:
        _forwards = True


def agreed() -> None:
    """Takes the signals back when the other handler has received a request, in the main thread."""
    global _asked_at
    with _lock:
        _asked_at = _asked_at or time.monotonic()
    _install()


def requested() -> bool:
    """Returns whether a signal has come."""
    return _asked_at is not None


def hold(unsaved: bool) -> None:
    """Says whether ending now would lose finished steps.

    Args:
      unsaved: True: the next signal waits until the program has saved; False: it ends the process.
    """
    global _unsaved
    with _lock:  # waits forever if the process is just ending
        _unsaved = unsaved


@contextlib.contextmanager
def temporary_folder() -> Iterator[str]:
    """Makes a folder for the context, which is also removed when a signal ends the process."""
    with tempfile.TemporaryDirectory() as folder:
        _folders.add(folder)
        try:
            yield folder
        finally:
            _folders.discard(folder)


def _install() -> None:
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # by `nohup`
            signal.signal(number, lambda *_: None)  # the thread acts


def _wait(reader: int) -> None:
    while True:
        for number in os.read(reader, 64):
            if number in SIGNALS:
                _receive(signal.Signals(number))


def _receive(number: signal.Signals) -> None:
    global _asked_at
    with _lock:
        now = time.monotonic()
        if _asked_at is not None:
            if number != signal.SIGHUP and now - _asked_at > _SAME_REQUEST:
                _say(f"{number.name}: ended at once; the last checkpoint may be incomplete")
                _end(128 + number)
            return
        _asked_at = now
        if not _saves:
            _say(f"error: {number.name}: interrupted")
            _end(128 + number)
        if _forwards:
            os.kill(os.getpid(), signal.SIGTERM)
        elif _unsaved:
            _say(f"{number.name}: stopping after this step is saved; once more: at once")
        else:
            _say(f"{number.name}: stopped; there was nothing to save")
            _end(0)


def _end(status: int) -> None:
    """Ends the process, whatever its other threads are doing."""
    for folder in tuple(_folders):
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(status)


def _say(text: str) -> None:
    """Writes a line on standard error, whatever the main thread is doing with its streams."""
    start = "\n" if sys.stderr is not None and sys.stderr.isatty() else ""  # after a progress bar
    with contextlib.suppress(OSError):  # nobody may read it
        os.write(2, f"{start}{text}\n".encode())
