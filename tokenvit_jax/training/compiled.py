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
from typing import BinaryIO

import jax
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from tokenvit_jax.training import processes

OFF = "off"
MAX_BYTES = 5 * 2**30  # of a folder when a process starts
_ENTRIES = "*-cache"  # jax's names
_CHECKED = "checked"  # file whose time says which entries were whole
# First bytes of what zlib and zstd wrote. jax takes zstd from Python 3.14 on, and with zstandard.
_ZLIB, _ZSTD = b"\x78", b"\x28\xb5\x2f\xfd"

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
    """Returns the folder of this kind of machine: programs for a CPU may not run on another one.

    From Python 3.14 on, jax gives entries the names of earlier versions, which cannot read them.
    """
    if name:
        folder = Path(name).expanduser()
    else:
        caches = os.environ.get("XDG_CACHE_HOME")
        folder = (Path(caches) if caches else Path.home() / ".cache") / "tokenvit_jax"
    backend = jax.default_backend()
    kind = f"cpu-{_cpu_digest()}" if backend == "cpu" else backend
    return folder / (f"{kind}-zstd" if _python_has_zstd() else kind)


def _python_has_zstd() -> bool:
    try:
        import compression.zstd  # noqa: F401 -- jax's condition
    except ImportError:
        return False
    return True


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
    """Returns whether an entry was written to its end; True if its kind is not known."""
    with entry.open("rb") as file:
        begin = file.read(len(_ZSTD))
        if _ZSTD.startswith(begin):  # also an empty file
            return _is_whole_frame(file)
        if not begin.startswith(_ZLIB):
            return True
        file.seek(0)
        return _can_be_decompressed(file)


def _can_be_decompressed(file: BinaryIO) -> bool:
    """Returns whether zlib can decompress a file."""
    decompressor = zlib.decompressobj()
    try:
        while part := file.read(2**20):
            while part:  # at most 16 MiB at once
                decompressor.decompress(part, 2**24)
                part = decompressor.unconsumed_tail
    except zlib.error:
        return False
    return decompressor.eof


def _is_whole_frame(file: BinaryIO) -> bool:
    """Returns whether a file ends with its frame of zstd, whose first four bytes have been read.

    The lengths of the blocks tell (RFC 8878, section 3.1.1): Python before 3.14 has no zstd.
    """
    descriptor = int.from_bytes(file.read(1), "little")
    single_segment, checksum = descriptor >> 5 & 1, descriptor >> 2 & 1
    content_size = (single_segment, 2, 4, 8)[descriptor >> 6]
    dictionary = (0, 1, 2, 4)[descriptor & 3]
    file.seek(1 - single_segment + dictionary + content_size, os.SEEK_CUR)
    last = False
    while not last:
        head = file.read(3)
        if len(head) < 3 or not any(head):  # a crash of the machine may leave zeros
            return False
        value = int.from_bytes(head, "little")
        last, repeated, num_bytes = value & 1, value >> 1 & 3 == 1, value >> 3
        file.seek(1 if repeated else num_bytes, os.SEEK_CUR)
    return file.tell() + 4 * checksum == os.fstat(file.fileno()).st_size


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
