"""Reads how kernels are launched, and what their threads execute, from files of XLA's GPU compiler.

With the option `xla_dump_to`, XLA writes the assembly of all kernels, the list of what a program
launches ("thunk sequence": number, kernel, blocks, threads) and the instruction of the program that
each number belongs to ("thunk metadata").
"""

import math
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from tokenvit_jax.ahead.ptx import Counts, read_kernels

WARP = 32  # threads
_LAUNCH = re.compile(
    r"^\s*(\d+): k\w+ .*\] (\w+) grid: \[([\d, ]+)\] threads: \[([\d, ]+)\]", re.MULTILINE
)
_INSTRUCTION = re.compile(r'profile_annotation: "([^"]*)"\s+thunk_id: (\d+)')


class Launch(NamedTuple):
    """A launch of a kernel.

    Attributes:
      blocks: number of blocks of threads.
      threads: threads of a block.
      counts: what a thread executes.
    """

    blocks: int
    threads: int
    counts: Counts

    @property
    def warps(self) -> int:
        """Warps of a block."""
        return -(-self.threads // WARP)


def read_launches(folder: Path) -> dict[str, tuple[Launch, ...]]:
    """Returns the launches of the instructions of a program, by the names of the instructions.

    Instructions without launches of the program's own kernels are not among them, such as calls of
    libraries.

    Args:
      folder: where XLA wrote its files about the program.
    """
    kernels: dict[str, Counts] = {}
    for path in folder.glob("*.ptx"):
        kernels |= read_kernels(path.read_text())
    names = {}
    for path in folder.glob("*.thunk_metadata.txt"):
        names |= {number: name for name, number in _INSTRUCTION.findall(path.read_text())}
    found = defaultdict(list)
    for path in folder.glob("*.thunk_sequence.txt"):
        for number, kernel, *sizes in _LAUNCH.findall(path.read_text()):
            name = names.get(str(int(number)))
            if name is not None and kernel in kernels:
                blocks, threads = (math.prod(map(int, size.split(","))) for size in sizes)
                found[name].append(Launch(blocks, threads, kernels[kernel]))
    return {name: tuple(launches) for name, launches in found.items()}
