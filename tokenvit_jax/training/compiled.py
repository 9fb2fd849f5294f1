"""Keeps compiled programs on disk, so that a resumed run and other commands start in seconds.

jax writes the entries of its compilation cache in place: a full disk or a kill leaves a cut entry,
which jax cannot read and never replaces. :func:`keep_compiled` deletes such entries, and the least
recently used ones of a folder that has grown too large.
"""

import contextlib
import hashlib
import logging
import os
import platform
import re
import socket
import zlib
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from tokenvit_jax.training import processes

OFF = "off"
MAX_BYTES = 5 * 2**30  # of a folder when a process starts
_ENTRIES = "*-cache"  # jax's names
_CHECKED = "checked"  # file whose time says which entries were whole
_ZLIB = b"\x78"  # first byte of what zlib wrote; with zstandard installed, jax uses that

_decided = False


def keep_compiled(config: ConfigDict) -> None:
    """Makes jax keep the programs that it compiles, and use those of earlier processes.

    The first call in a process decides. Without an entry of the configuration, it changes nothing
    if jax already has a folder (``JAX_COMPILATION_CACHE_DIR``). A folder that cannot be written
    gives a warning, and nothing is kept. Of several processes only the first one writes. So they
    need a shared folder: where it is not, nothing is kept. On GPUs, a process that has its program
    would otherwise leave the others waiting for their share of its autotuning.

    Args:
      config: reads `compilation_cache`.
    """
    global _decided
    if _decided:
        return
    _decided = True
    name = config.compilation_cache
    if name == OFF:
        _keep_nothing()
        return
    given = "" if name else jax.config.jax_compilation_cache_dir or ""
    if given and jax.process_count() == 1:
        return
    elsewhere = "://" in given  # in a store that all machines see
    if processes.everywhere(elsewhere):
        return
    folder, reason = name or given or "the user's cache folder", None
    try:
        if elsewhere:
            raise OSError("other processes have another folder")
        folder = Path(given) if given else _folder(name)
        folder.mkdir(parents=True, exist_ok=True)
        if not given and processes.is_main_process():
            delete_damaged(folder)
            delete_oldest(folder, MAX_BYTES)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        reason = getattr(error, "strerror", None) or error
    if not processes.everywhere(reason is None):
        reason = reason or "another process cannot use its own"
    elif not processes.is_shared(folder):
        reason = "it is not one folder for all processes, or the main one cannot write there"
    if reason:
        _keep_nothing()
        logging.warning(
            "compiled programs are not kept in %s: %s (config.compilation_cache=%s)",
            folder, reason, name,
        )  # fmt: skip
        return
    compilation_cache.reset_cache()  # jax may have opened another folder
    compilation_cache.set_cache_dir(str(folder))


def _keep_nothing() -> None:
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # jax looks at the setting before its first program only


def _folder(name: str) -> Path:
    """Returns the folder of this kind of machine: programs for a CPU may not run on another one."""
    if name:
        folder = Path(name).expanduser()
    else:
        caches = os.environ.get("XDG_CACHE_HOME")
        folder = (Path(caches) if caches else Path.home() / ".cache") / "tokenvit_jax"
    backend = jax.default_backend()
    return folder / (f"cpu-{_cpu_digest()}" if backend == "cpu" else backend)


def _cpu_digest() -> str:
    """Returns a digest of the instructions that this CPU has."""
    try:
        found = re.search(r"(?m)^(flags|Features)\s*:.*$", Path("/proc/cpuinfo").read_text())
    except OSError:  # not Linux
        found = None
    text = found[0] if found else platform.processor()
    return hashlib.sha256(f"{platform.machine()} {text}".encode()).hexdigest()[:8]


def delete_damaged(folder: Path) -> None:
    """Deletes entries that were not written to their end; reads those since the last call only.

    Entries that cannot be read or deleted, such as those of other users of the folder, stay.

    Args:
      folder: folder of jax's compilation cache, which must be writable.

    Raises:
      OSError: the folder cannot be read or written.
    """
    checked = folder / _CHECKED
    last = checked.stat().st_mtime_ns if checked.exists() else 0
    # Containers on several machines may all have the same process number.
    now = folder / f"{_CHECKED}-{socket.gethostname()}-{os.getpid()}"
    try:
        now.touch()  # the clock of the folder's file system, before anything is read
        for entry in folder.glob(_ENTRIES):
            try:
                if entry.stat().st_mtime_ns >= last and not _is_whole(entry):
                    entry.unlink()
                    logging.warning("%s was not written to its end: deleted", entry)
            except (FileNotFoundError, PermissionError, IsADirectoryError):
                continue  # another process deleted it, or it is not ours
        now.replace(checked)
    finally:
        now.unlink(missing_ok=True)


def _is_whole(entry: Path) -> bool:
    """Returns whether an entry can be decompressed; True where zlib does not tell."""
    with entry.open("rb") as file:
        part = file.read(2**20)
        if part and not part.startswith(_ZLIB):
            return True
        decompressor = zlib.decompressobj()
        try:
            while part:
                while part:  # at most 16 MiB at once
                    decompressor.decompress(part, 2**24)
                    part = decompressor.unconsumed_tail
                part = file.read(2**20)
        except zlib.error:
            return False
    return decompressor.eof


def delete_oldest(folder: Path, max_bytes: int) -> None:
    """Deletes the least recently used entries until the others have at most so many bytes.

    Args:
      folder: folder of jax's compilation cache.
      max_bytes: size that stays [bytes].

    Raises:
      OSError: the folder cannot be read or written.
    """
    entries = []
    for entry in folder.glob(_ENTRIES):
        try:
            stat = entry.stat()
        except FileNotFoundError:  # another process deleted it
            continue
        entries.append((max(stat.st_atime_ns, stat.st_mtime_ns), stat.st_size, entry))
    size = sum(size for _, size, _ in entries)
    for _, bytes_of_entry, entry in sorted(entries):
        if size <= max_bytes:
            break
        # One that cannot be deleted counts no more: others are not deleted in its place.
        with contextlib.suppress(PermissionError, IsADirectoryError):
            entry.unlink(missing_ok=True)
        size -= bytes_of_entry
