"""Connects the processes of a run, tells which one writes, and notices requests to stop."""

import contextlib
import logging
import os
import re
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from tokenvit_jax import slurm, stopping
from tokenvit_jax.errors import UserError

CONNECT_TIMEOUT_SECONDS = 120  # to wait for the process that coordinates the others
SHARED_SECONDS = 5  # to wait for a file of another process


def connect(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the processes of a run; call it before anything else touches a device.

    Without arguments, the processes of TPU pods and SLURM jobs are found automatically; elsewhere
    there is one process. A process has all devices of its host, or one of them if SLURM starts
    several tasks on each host; `JAX_LOCAL_DEVICE_IDS` changes this.

    Args:
      coordinator: "host:port" of process 0.
      num_processes: number of processes.
      process_id: number of this process, from 0.

    Raises:
      UserError: some arguments are missing or wrong, the coordinator cannot be reached, or the
        processes of a TPU pod cannot be found.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if len(missing) == len(given):
        if slurm.num_tasks() > 1:
            _join_tasks()
        elif os.environ.get("TPU_ML_PLATFORM") == "JAX":  # set by `import jax` beside a TPU
            _join_pod()
        return
    if missing:
        raise UserError(f"several processes also need {' and '.join(missing)}")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id={process_id} is not valid; with --num_processes={num_processes} it is "
            f"0 to {num_processes - 1}"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--coordinator={coordinator!r} is not valid; it has the form host:port")
    if process_id:
        # jax itself would abort the process with a stack trace.
        _wait_for(host, int(port))
    # jax would otherwise look for a cluster all the same, and leave this process one device.
    alone = slurm.num_tasks() == 1 or _one_task_per_host()
    jax.distributed.initialize(
        coordinator, num_processes, process_id,
        cluster_detection_method="deactivate" if alone else None,
    )  # fmt: skip


def _one_task_per_host() -> bool:
    """Returns whether SLURM started one task on every host, such as 1(x4)."""
    return (
        re.fullmatch(r"1(\(x\d+\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")) is not None
    )


def _join_tasks() -> None:
    names = [f"jax_{platform}_visible_devices" for platform in ("cuda", "rocm")]
    before = {name: jax.config.values[name] for name in names}
    jax.distributed.initialize()
    if _one_task_per_host() and not os.environ.get("JAX_LOCAL_DEVICE_IDS"):
        for name, visible in before.items():  # jax has left one device to each task
            jax.config.update(name, visible)


def _join_pod() -> None:
    try:
        jax.distributed.initialize()
    except ValueError as error:  # nothing names any hosts: this is the only one
        logging.info("one process: jax finds no other hosts of a TPU (%s)", error)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"jax cannot find the hosts of this TPU ({error}); pass --coordinator, "
            "--num_processes and --process_id"
        ) from error


def _wait_for(host: str, port: int) -> None:
    deadline = time.monotonic() + CONNECT_TIMEOUT_SECONDS
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"--coordinator={host}:{port} cannot be reached for {CONNECT_TIMEOUT_SECONDS} "
                    f"seconds ({error}); process 0 must be running there"
                ) from error
        time.sleep(0.5)


class StopRequest:
    """Notices requests to stop, SIGTERM and SIGINT, in its context.

    In a program that watches the signals (:mod:`tokenvit_jax.stopping`), this only asks it.
    Elsewhere, such as in a notebook, it handles the signals itself: afterwards they have their
    former effect again, and so has a second signal. Python allows handlers in the main thread only;
    in another thread nothing is noticed.
    """

    def __init__(self):
        self._several = jax.process_count() > 1
        self._received = False
        self._polls = 0
        self._former = {}  # signal -> handler

    def __enter__(self) -> "StopRequest":
        # With several processes, jax handles SIGTERM itself and tells the other processes.
        if stopping.watching():
            if self._several:
                stopping.forward()
            else:  # a library of devices, which are there by now, may have handlers of its own
                stopping.watch_again()
        elif threading.current_thread() is threading.main_thread():
            handlers = {signal.SIGTERM: self._receive, signal.SIGINT: self._receive}
            if self._several:
                handlers = {signal.SIGINT: lambda *_: os.kill(os.getpid(), signal.SIGTERM)}
            self._former = {number: signal.signal(number, new) for number, new in handlers.items()}
        return self

    def __exit__(self, *_: Any) -> None:
        self._restore()

    def received(self) -> bool:
        """Returns whether to stop; every process must call this equally often."""
        if not self._several:
            self._received = self._received or stopping.requested()
        elif not self._received:
            self._polls += 1
            self._received = multihost_utils.reached_preemption_sync_point(self._polls)
            if self._received and stopping.watching():
                stopping.agreed()  # a second signal ends this process at once
        return self._received

    def _receive(self, signum: int, _frame: Any) -> None:
        logging.warning("%s: stopping after this step", signal.Signals(signum).name)
        self._received = True
        self._restore()  # a second one stops at once

    def _restore(self) -> None:
        while self._former:
            signal.signal(*self._former.popitem())


def check_alone(command: str) -> None:
    """Raises UserError for a command that cannot divide its work if there are several processes.

    Args:
      command: its name, for the message.
    """
    slurm.check_one_task(command)
    count = jax.process_count()
    if count > 1:
        raise UserError(
            f"{command} works in one process, and here are {count}; valid: a machine whose devices "
            "belong to one process, or JAX_PLATFORMS=cpu"
        )


def is_main_process() -> bool:
    """Returns whether this is the process that writes logs."""
    return jax.process_index() == 0


def on_main_process(action: Callable[[], None]) -> None:
    """Runs an action on the main process while the others wait.

    Raises:
      UserError: in the other processes, if the action raised an error in the main one.
    """
    error = None
    if is_main_process():
        try:
            action()
        except Exception as raised:  # the others wait for an answer
            error = raised
    failed = from_main_process(error is not None)
    if error is not None:
        raise error
    if failed:
        raise UserError("the main process failed; it says why")


def from_main_process(value: bool) -> bool:
    """Returns the value of the main process, in every process."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.array(value)))


def everywhere(fine: bool) -> bool:
    """Returns whether all processes are fine."""
    if jax.process_count() == 1:
        return fine
    return bool(np.all(multihost_utils.process_allgather(np.array(fine))))


def is_shared(folder: Path) -> bool:
    """Returns whether all processes see the same folder, by a file that the main one writes.

    A network file system may show it late: the others look for SHARED_SECONDS.
    """
    if jax.process_count() == 1:
        return True
    numbers = multihost_utils.broadcast_one_to_all(
        np.array([secrets.randbits(31) for _ in range(2)], np.int32)
    )
    mark = folder / ".shared-{:08x}{:08x}".format(*map(int, numbers))
    try:
        on_main_process(lambda: mark.write_text(""))
    except (OSError, UserError):  # the main process cannot write it; all are here
        return False
    try:
        return everywhere(_appears(mark))
    finally:
        if is_main_process():
            with contextlib.suppress(OSError):
                mark.unlink()


def _appears(file: Path) -> bool:
    deadline = time.monotonic() + SHARED_SECONDS
    while True:
        with contextlib.suppress(OSError):  # such as a folder that may not be read
            if file.exists():
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
