"""The allocator is configured on a CPU with glibc and nowhere else."""

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import subprocess
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


@contextlib.contextmanager
def jax_platforms(value):
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", value)
    try:
        yield
    finally:
        jax.config.update("jax_platforms", before)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_glibc_takes_the_settings(monkeypatch):
    mallopt = ctypes.CDLL(None).mallopt
    noted = []
    library = SimpleNamespace(mallopt=lambda *args: noted.append((*args, mallopt(*args))))
    pretend(monkeypatch, "linux", "cpu", lambda name: library)
    keep_pages()
    # M_ARENA_MAX, M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h; 1 is success.
    assert noted == [(-8, 1, 1), (-4, 0, 1), (-1, -1, 1)]


def test_arenas_of_a_host_that_may_have_an_accelerator(monkeypatch):
    noted = []
    library = SimpleNamespace(mallopt=lambda *args: noted.append(args))
    pretend(monkeypatch, "linux", "gpu", lambda name: library)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [group])
    with jax_platforms(None):
        keep_pages()
    with jax_platforms("cuda,cpu"):
        keep_pages()
    assert not noted


ARENAS = """
import ctypes, sys
from tokenvit_jax.memory import keep_pages
keep_pages()
import jax, jax.numpy as jnp
x = jnp.ones((1000, 1000))
jax.jit(lambda x: (x @ x) @ jnp.sin(x @ x))(x).block_until_ready()
libc = ctypes.CDLL(None)
libc.fopen.restype = ctypes.c_void_p
file = ctypes.c_void_p(libc.fopen(sys.argv[1].encode(), b"w"))
libc.malloc_info(0, file)
libc.fclose(file)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_threads_share_one_arena(tmp_path):
    file = tmp_path / "malloc.xml"
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", ARENAS, str(file)], check=True, env=environment)
    assert file.read_text().count("<heap ") == 1


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
    noted = []
    library = SimpleNamespace(mallopt=lambda *args: noted.append(args))
    pretend(monkeypatch, system, backend, lambda name: library)
    with jax_platforms("cuda,cpu" if backend == "gpu" else "cpu"):
        keep_pages()
    assert not noted


def test_returns_on_this_platform():
    keep_pages()
    release_pages()
