"""Configures the memory allocator of the process."""

import ctypes
import sys

import jax

# Constants of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_pages() -> None:
    """Makes glibc keep freed memory for later allocations when JAX computes on a CPU.

    XLA allocates temporary arrays anew in every call. By default glibc returns large arrays to the
    kernel, which then has to clear every page of the next ones; in the training step of a backbone
    this can take as long as the computation. The function does nothing on an accelerator or without
    glibc.
    """
    if sys.platform != "linux" or jax.default_backend() != "cpu":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)  # large blocks also come from the heap
        mallopt(_M_TRIM_THRESHOLD, -1)  # and the heap never shrinks
