"""A limit for the size of files, in place of a disk that is full."""

import contextlib
import resource


@contextlib.contextmanager
def largest_file(size: int):
    """Limits the size of files: the kernel takes bytes up to it, then refuses, as a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
