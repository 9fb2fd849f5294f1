"""Counts the cores that a process may use, which other processes of its host may use, too."""

import math
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_QUOTA_FILE = Path("/sys/fs/cgroup/cpu.max")  # of this container: microseconds per period
_BOOT_FILE = Path("/proc/sys/kernel/random/boot_id")  # the same in all containers of a machine


class Cores(NamedTuple):
    """What limits the CPU time of a process.

    Attributes:
      host: what tells its machine from others.
      numbers: the cores that it may use.
      quota: CPU time that its container may use, in cores.
      container: what tells its container from others of the machine.
    """

    host: str
    numbers: frozenset[int]
    quota: float = math.inf
    container: str = ""


def own_cores() -> Cores:
    """Returns what limits this process."""
    if hasattr(os, "sched_getaffinity"):  # on Linux
        numbers = os.sched_getaffinity(0)
    else:
        numbers = range(os.cpu_count() or 1)
    name = socket.gethostname()
    return Cores(_boot() or name, frozenset(numbers), _quota(), name)


def share_of_cores(own: Cores, everyone: Sequence[Cores]) -> int:
    """Returns the number of cores for one process, at least 1.

    A core counts in part if several processes of the host may use it: eight processes on 64 cores
    get 8 each, whether or not a scheduler has given each of them its own 8.

    Args:
      own: limits of the process.
      everyone: limits of all processes of the run, with its own.
    """
    here = [other for other in everyone if other.host == own.host]
    shares = [1 / sum(core in other.numbers for other in here) for core in own.numbers]
    quota = own.quota / sum(other.container == own.container for other in here)
    # Sums such as 8 times 1/8 may be just below a whole number.
    return max(1, math.floor(min(sum(shares), quota) + 1e-6))


def _boot() -> str:
    """Returns the number of this start of the machine; "" where it has none."""
    try:
        return _BOOT_FILE.read_text().strip()
    except OSError:  # no Linux
        return ""


def _quota() -> float:
    try:
        time, period = _QUOTA_FILE.read_text().split()
    except (OSError, ValueError):  # no Linux, or no container
        return math.inf
    return math.inf if time == "max" else int(time) / int(period)
