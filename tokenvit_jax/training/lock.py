"""The lock that keeps a second training out of a workdir."""

import contextlib
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import jax

from tokenvit_jax.errors import UserError
from tokenvit_jax.training import processes

LOCK_FILE = "lock"


@contextlib.contextmanager
def workdir_lock(workdir: Path) -> Iterator[None]:
    """Holds a workdir for one training; every process of the training enters this context.

    The main process locks the file `WORKDIR/lock` with `flock`. The kernel removes the lock when
    the process ends, however it ends; the file stays and means nothing by itself.

    On a network file system this goes as far as the file system does. NFS version 4, Lustre
    mounted with `flock`, GPFS and CephFS lock for all machines; when a machine dies, the server
    frees its locks after a lease (NFS 4: about 90 seconds). NFS version 3 needs its lock service,
    and keeps the locks of a machine that dies until it starts again. Mounted with `nolock`,
    `local_lock` or `localflock`, it locks only against processes of the same machine. A file system
    without locks gives a warning, and training goes on. Whoever deletes the file while training
    runs takes the lock away, too.

    Args:
      workdir: folder of the run, created if necessary.

    Raises:
      UserError: another training holds the workdir, the file cannot be written, or the processes
        do not share the folder.
    """
    path, file, refusal = workdir / LOCK_FILE, None, None
    if jax.process_index() == 0:
        try:
            file = _lock(path)
        except UserError as error:
            refusal = error
    if processes.from_main_process(refusal is not None) and refusal is None:
        refusal = UserError(f"the main process could not lock --workdir={workdir}; it says why")
    try:
        with contextlib.suppress(OSError):  # asks the server, if a client has kept "no such folder"
            workdir.mkdir(parents=True, exist_ok=True)
        if refusal is None and not processes.is_shared(workdir):
            refusal = UserError(
                f"--workdir={workdir} is not one folder for all processes; valid: a folder on a "
                "file system that all of them share"
            )
        if refusal is not None:
            raise refusal
        yield
    finally:
        if file is not None:
            os.close(file)


def _lock(path: Path) -> int | None:
    """Returns the locked file; None if the file system has no locks."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            if not _locked(file, path):
                return None
            if os.path.exists(path) and os.path.samestat(os.fstat(file), os.stat(path)):
                break
            os.close(file)  # deleted since it was opened: the next training would not see it
        os.ftruncate(file, 0)
        os.write(file, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode())
    except OSError as error:
        raise UserError(
            f"--workdir={path.parent} cannot be written: {path}: {error.strerror or error}"
        ) from error
    return file


def _locked(file: int, path: Path) -> bool:
    """Locks an open file, or closes it; returns whether the file system has locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError as error:
        holder = _holder(file)
        os.close(file)
        raise UserError(
            f"another training{holder} runs in --workdir={path.parent}; wait until it ends, or use "
            "another --workdir"
        ) from error
    except OSError as error:
        os.close(file)
        logging.warning(
            "%s cannot be locked (%s): nothing keeps a second training out of this folder",
            path,
            error.strerror,
        )
        return False


def _holder(file: int) -> str:
    """Returns the process that holds the lock, as far as it is known, for a message."""
    try:
        holder = json.loads(os.pread(file, 1000, 0))
        return f" (process {int(holder['pid'])} on {holder['host']})"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
