"""Lines and shapes in the text of a compiled program (HLO)."""

import math
import re
from typing import NamedTuple

LINE = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
# Type, sizes and layout of an array.
ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_ORIGIN = re.compile(r'op_name="([^"]*)"')
_BYTES = {"bf16": 2, "pred": 1, "token": 0}  # the name of any other type ends with its bits


class Instruction(NamedTuple):
    """A line of a program.

    Attributes:
      name: its name.
      shape: text of the types and shapes of the results.
      opcode: what it does.
      rest: operands, attributes and metadata.
    """

    name: str
    shape: str
    opcode: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Names of the operands."""
        return re.findall(r"%([\w.\-]+)", self.rest.split("), ")[0])

    @property
    def origin(self) -> str:
        """Where the model computes it: names of modules, operators and transformations."""
        found = _ORIGIN.search(self.rest)
        return found[1] if found else ""

    @property
    def target(self) -> str:
        """Name of the function that a custom call calls."""
        found = re.search(r'custom_call_target="([^"]*)"', self.rest)
        return found[1] if found else ""


def shape_bytes(shape: str) -> int:
    """Returns the bytes of a shape, or of all shapes of a tuple."""
    return sum(map(_array_bytes, ARRAY.findall(shape)))


def main_memory_bytes(shape: str) -> int:
    """Returns the bytes of a shape, or of all shapes of a tuple, in the main memory of a device."""
    return sum(_array_bytes(array) for array in ARRAY.findall(shape) if _is_in_main_memory(array))


def moved_bytes(shape: str) -> int:
    """Returns the bytes that a copy, or a copy of a slice, moves from and to the main memory.

    Args:
      shape: shape of its results: the copy and its source, in any order, and others.
    """
    ends = ARRAY.findall(shape)[:2]
    return min(map(_array_bytes, ends)) * sum(map(_is_in_main_memory, ends))


def num_values(shape: str) -> int:
    """Returns the number of values of a shape, or of all shapes of a tuple."""
    return sum(math.prod(sizes(text)) for _, text, _ in ARRAY.findall(shape))


def sizes(text: str) -> list[int]:
    """Returns the numbers of a list such as "3,8"."""
    return [int(size) for size in text.split(",") if size]


def _is_in_main_memory(array: tuple[str, str, str]) -> bool:
    *_, layout = array
    return not re.search(r"S\([1-9]\)", layout)  # a TPU's memory on the chip


def _array_bytes(array: tuple[str, str, str]) -> int:
    kind, text, _ = array
    bits = re.fullmatch(r"[a-z]+(\d+)\w*", kind)
    size = _BYTES[kind] if kind in _BYTES else int(bits[1]) / 8 if bits else 0
    return int(size * math.prod(sizes(text)))
