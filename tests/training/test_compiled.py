"""Compiled programs are kept on disk, and damaged ones do not stay there."""

import logging
import os
import sys
import types
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import started
from jax.experimental.compilation_cache import compilation_cache

from tokenvit_jax.tasks import default_config
from tokenvit_jax.training import compiled


@pytest.fixture
def undecided(monkeypatch):
    """A process that has compiled nothing yet; yields the folders that jax is given."""
    given = []
    monkeypatch.setattr(compiled, "_decided", False)
    monkeypatch.setattr(compiled.compilation_cache, "set_cache_dir", given.append)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield given
    jax.config.update("jax_compilation_cache_dir", before)
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


def config_with(folder):
    config = default_config("classification")
    config.compilation_cache = str(folder)
    return config


# What zstandard 0.25 wrote: plain, with a checksum, without a size, and in three blocks.
ZSTD = [
    "28b52ffd20487500004070726f6772616d2001009d54b8",
    "28b52ffd24487500004070726f6772616d2001009d54b8badd6bcb",
    "28b52ffd00007500004070726f6772616d2001009d54b8",
    "28b52ffda0e19304005400001000000100fbff39c002020010005500001000780100dc131d0801",
]
ZSTD = [bytes.fromhex(digits) for digits in ZSTD]


def write_entries(folder):
    """Writes whole and damaged entries, and returns the names of the whole ones."""
    content = zlib.compress(os.urandom(100_000))
    entries = {
        "whole-cache": content, "empty-cache": b"", "cut-cache": content[:-1],
        "half-cache": content[:50_000], "changed-cache": content[:900] + b"?" + content[901:],
        "zstd-cache": ZSTD[0], "cut-zstd-cache": ZSTD[0][:-1], "other-cache": b"other",
        "note.txt": b"",
    }  # fmt: skip
    for name, text in entries.items():
        (folder / name).write_bytes(text)
    return {"whole-cache", "zstd-cache", "other-cache", "note.txt"}


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_damaged_entries_are_deleted(tmp_path, caplog):
    whole = write_entries(tmp_path)
    compiled.delete_damaged(tmp_path)
    assert names(tmp_path) == whole | {"checked"}
    assert sorted(Path(record.args[0]).name for record in caplog.records) == [
        "changed-cache", "cut-cache", "cut-zstd-cache", "empty-cache", "half-cache"
    ]  # fmt: skip


@pytest.mark.parametrize("content", ZSTD, ids=range(len(ZSTD)))
def test_every_cut_of_a_frame_of_zstd_is_found(content, tmp_path):
    """Python 3.14 writes such entries; no Python needs a package to check them."""
    entry = tmp_path / "zstd-cache"
    for size in range(len(content) + 1):
        entry.write_bytes(content[:size])
        assert compiled._is_whole(entry) == (size == len(content))


def test_zeros_in_place_of_later_blocks(tmp_path):
    """Not all was on the disk when the machine stopped."""
    entry = tmp_path / "zstd-cache"
    entry.write_bytes(ZSTD[3][:22] + bytes(10_000_000))
    assert not compiled._is_whole(entry)


def test_an_entry_that_cannot_be_read_stays(tmp_path, monkeypatch):
    """One of another user, or a folder; the others are still checked."""
    whole = write_entries(tmp_path)
    (tmp_path / "folder-cache").mkdir()
    is_whole = compiled._is_whole

    def not_ours(entry):
        if entry.name == "half-cache":
            raise PermissionError(13, "Permission denied", str(entry))
        return is_whole(entry)

    monkeypatch.setattr(compiled, "_is_whole", not_ours)
    compiled.delete_damaged(tmp_path)
    assert names(tmp_path) == whole | {"checked", "folder-cache", "half-cache"}


def test_an_error_leaves_no_file_behind(tmp_path, monkeypatch):
    write_entries(tmp_path)

    def fails(entry):
        raise OSError(5, "Input/output error", str(entry))

    monkeypatch.setattr(compiled, "_is_whole", fails)
    before = names(tmp_path)
    with pytest.raises(OSError, match="Input/output error"):
        compiled.delete_damaged(tmp_path)
    assert names(tmp_path) == before


def test_only_new_entries_are_read(tmp_path):
    compiled.delete_damaged(tmp_path)
    write_entries(tmp_path)
    old = (tmp_path / "checked").stat().st_mtime - 10
    os.utime(tmp_path / "cut-cache", (old, old))
    compiled.delete_damaged(tmp_path)
    assert {"cut-cache", "whole-cache"} < names(tmp_path)
    assert "half-cache" not in names(tmp_path)


def test_least_recently_used_entries_are_deleted(tmp_path):
    for time, name in enumerate(("b", "c", "a")):
        (tmp_path / f"{name}-cache").write_bytes(bytes(100))
        os.utime(tmp_path / f"{name}-cache", (time, time))
    compiled.delete_oldest(tmp_path, 300)
    assert len(names(tmp_path)) == 3
    compiled.delete_oldest(tmp_path, 299)
    assert names(tmp_path) == {"c-cache", "a-cache"}
    compiled.delete_oldest(tmp_path, 0)
    assert names(tmp_path) == set()


def test_folder_of_the_user(undecided, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled.keep_compiled(default_config("classification"))
    [folder] = undecided
    assert Path(folder).parent == tmp_path / "tokenvit_jax" and "checked" in names(Path(folder))
    compiled.keep_compiled(config_with(tmp_path / "other"))  # the first call decides
    assert undecided == [folder]


def test_pythons_with_and_without_zstd_have_folders_of_their_own(undecided, tmp_path, monkeypatch):
    """jax gives their entries the same names, and cannot read those of the other."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for module in (None, types.ModuleType("compression.zstd")):
        if module:
            monkeypatch.setitem(sys.modules, "compression", types.ModuleType("compression"))
        monkeypatch.setitem(sys.modules, "compression.zstd", module)
        monkeypatch.setattr(compiled, "_decided", False)
        compiled.keep_compiled(default_config("classification"))
    before, after = undecided
    assert after == f"{before}-zstd"


def test_home_folder(undecided, tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    compiled.keep_compiled(default_config("classification"))
    assert Path(undecided[0]).parent == tmp_path / ".cache" / "tokenvit_jax"


def test_entry_moves_the_folder(undecided, tmp_path):
    compiled.keep_compiled(config_with(tmp_path / "own"))
    assert Path(undecided[0]).parent == tmp_path / "own"


def test_off(undecided):
    jax.config.update("jax_compilation_cache_dir", "of the environment")
    compiled.keep_compiled(config_with("off"))
    compiled.keep_compiled(default_config("classification"))
    assert undecided == [] and not jax.config.jax_enable_compilation_cache


def test_off_after_a_first_program(tmp_path):
    """jax looks at the setting once, in front of the first program of a process."""
    env = started.environment(tmp_path)
    started.finish(started.start(["-c", FIRST_THEN_OFF], env))
    assert [name for name in names(tmp_path) if "second" in name] == []
    assert [name for name in names(tmp_path) if "first" in name]


FIRST_THEN_OFF = """
import jax
from tokenvit_jax.tasks import default_config
from tokenvit_jax.training import compiled
def first(x): return x + 1
def second(x): return x + 2
jax.jit(first).lower(1.0).compile()
config = default_config("classification")
config.compilation_cache = "off"
compiled.keep_compiled(config)
jax.jit(second).lower(1.0).compile()
"""


def test_folder_of_the_environment(undecided, tmp_path, monkeypatch):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "of jax"))
    compiled.keep_compiled(default_config("classification"))
    assert undecided == []
    monkeypatch.setattr(compiled, "_decided", False)
    compiled.keep_compiled(config_with(tmp_path / "own"))  # an entry wins
    assert Path(undecided[0]).parent == tmp_path / "own"


def test_folder_that_cannot_be_written(undecided, tmp_path, caplog):
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        compiled.keep_compiled(config_with(tmp_path / "file"))
    assert undecided == []
    [record] = caplog.records
    text = record.getMessage()
    assert text.startswith(f"compiled programs are not kept in {tmp_path}/file/cpu-")
    assert ": Not a directory (config.compilation_cache=" in text


def test_jax_recovers_from_a_cut_entry(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    try:
        compilation_cache.reset_cache()
        compilation_cache.set_cache_dir(str(tmp_path))

        def compile_once():
            jax.jit(lambda x: jnp.tanh(x) + 7).lower(jnp.ones(3)).compile()
            [entry] = tmp_path.glob("jit__lambda*-cache")
            return entry

        entry = compile_once()
        content = entry.read_bytes()
        entry.write_bytes(content[:-9])
        compiled.delete_damaged(tmp_path)
        assert compile_once() == entry and len(entry.read_bytes()) > len(content) - 9
        compiled.delete_damaged(tmp_path)
        assert entry.exists()
    finally:
        compilation_cache.set_cache_dir(before)
        compilation_cache.reset_cache()
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
