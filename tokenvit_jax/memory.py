"""Memory of the process."""

import ctypes
import sys

import jax

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_pages() -> None:
    """Lets the process keep freed memory for its next allocation, where computing is on a CPU.

    XLA allocates the temporaries of every call anew. By default glibc gives large ones back to the
    kernel, which then has to clear every page of the next ones: in the training step of a backbone
    that can take as long as the computation. Does nothing without glibc, or on an accelerator.
    """
    if sys.platform != "linux" or jax.default_backend() != "cpu":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)  # large blocks come from the heap too
        mallopt(_M_TRIM_THRESHOLD, -1)  # and the heap never shrinks
