"""A worker process of the data pipeline, which `tokenvit_jax.data.workers` starts.

It ends with its parent from its first moment: this module imports nothing heavy before it listens.
"""

import os
import queue
import signal
import threading
from multiprocessing.connection import Connection

from tokenvit_jax.stopping import SIGNALS


def main(handle: int) -> None:
    """Serves the parent until it ends.

    Args:
      handle: file descriptor of the connection to the parent.
    """
    # A signal to the whole process group is meant for the parent, which may still need batches. It
    # has blocked them for this process until here.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    connection, requests = Connection(handle), queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, requests), daemon=True).start()

    from tokenvit_jax.data.workers import serve  # takes seconds

    try:
        serve(requests.get, connection.send)
    except OSError:  # the parent has ended
        os._exit(0)


def _receive(connection: Connection, requests: queue.SimpleQueue) -> None:
    """Passes requests on; ends the process when the parent has ended, however it did."""
    try:
        while True:
            requests.put(connection.recv())
    except (EOFError, OSError):
        os._exit(0)
