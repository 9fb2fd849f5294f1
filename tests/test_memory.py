"""The allocator is configured on a CPU with glibc and nowhere else."""

import ctypes
import platform
import sys
from types import SimpleNamespace

import jax
import pytest

from tokenvit_jax.memory import keep_pages, release_pages


def pretend(monkeypatch, system, backend, load):
    """Pretends to run on a system and backend; ``load`` replaces the loading of C libraries."""
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(ctypes, "CDLL", load)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_glibc_takes_the_settings(monkeypatch):
    mallopt = ctypes.CDLL(None).mallopt
    noted = []
    library = SimpleNamespace(mallopt=lambda *args: noted.append((*args, mallopt(*args))))
    pretend(monkeypatch, "linux", "cpu", lambda name: library)
    keep_pages()
    # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h; 1 is success.
    assert noted == [(-4, 0, 1), (-1, -1, 1)]


def test_all_pages_are_released(monkeypatch):
    noted = []
    library = SimpleNamespace(malloc_trim=noted.append)
    pretend(monkeypatch, "linux", "gpu", lambda name: library)
    release_pages()
    assert noted == [0]


def test_a_c_library_without_these_functions(monkeypatch):
    pretend(monkeypatch, "linux", "cpu", lambda name: SimpleNamespace())
    keep_pages()
    release_pages()


@pytest.mark.parametrize(("system", "backend"), [("darwin", "cpu"), ("linux", "gpu")])
def test_does_nothing_elsewhere(monkeypatch, system, backend):
    pretend(monkeypatch, system, backend, lambda name: pytest.fail("loads the C library"))
    keep_pages()


def test_returns_on_this_platform():
    keep_pages()
    release_pages()
