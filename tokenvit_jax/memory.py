"""Configures the memory allocator of the process."""

import ctypes
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable

import jax

# Constants of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8


def keep_pages() -> None:
    """Makes glibc keep freed memory for later allocations when JAX computes on a CPU.

    XLA allocates temporary arrays anew in every call. By default glibc returns large arrays to the
    kernel, which then has to clear every page of the next ones; in the training step of a backbone
    this can take as long as the computation. The function does nothing on an accelerator or without
    glibc.

    Call it before JAX looks for devices. The threads that JAX starts then would otherwise allocate
    from arenas of their own, which return memory whatever the settings: a training step of DGT-T
    (batch 8) had 500,000 page faults, and has none with a single arena. Where a plugin for an
    accelerator is installed, this needs `JAX_PLATFORMS=cpu`.
    """
    mallopt = _of_glibc("mallopt")
    if mallopt is not None and _only_cpu():
        mallopt(_M_ARENA_MAX, 1)  # of no effect once other threads have arenas
    if jax.default_backend() != "cpu":
        return
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)  # large blocks also come from the heap
        mallopt(_M_TRIM_THRESHOLD, -1)  # and the heap never shrinks


def release_pages() -> None:
    """Makes glibc return all freed memory to the kernel.

    Threads that write a checkpoint leave free pieces among the blocks that stay; the memory of a
    process would grow by 0.1 MB per checkpoint. Call this seldom: the next step clears its pages
    again.
    """
    malloc_trim = _of_glibc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _only_cpu() -> bool:
    """Returns whether JAX can only find CPUs, without making it look for devices."""
    platforms = jax.config.jax_platforms
    if platforms:
        return platforms == "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not plugins and not any(map(importlib.util.find_spec, ("jax_plugins", "libtpu")))


def _of_glibc(name: str) -> Callable[..., int] | None:
    """Returns a function of glibc; None on another system, or with another C library."""
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), name, None)
