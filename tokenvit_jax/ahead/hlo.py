"""Reads the text of a compiled program (HLO): its kernels, their bytes and operations, collectives.

Bytes are those of whole operands and results, also where a kernel reads a part of an operand or
reads it several times. Operations are those of products and convolutions, 2 per multiply-add; those
inside kernels of our own are known where their launches are.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

from tokenvit_jax.ahead import products
from tokenvit_jax.ahead.hlo_text import (
    LINE,
    Instruction,
    main_memory_bytes,
    moved_bytes,
    num_values,
    shape_bytes,
)
from tokenvit_jax.ahead.instructions import Launch

_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
# A TPU copies weights and maps to the memory on the chip while it computes.
ASYNCHRONOUS_COPIES = ("copy-start", "slice-start")
# Kernels of a program, besides collectives. Others are a part of a fusion, or move nothing.
_KERNELS = frozenset((
    "fusion", "custom-call", "sort", "reduce", "scatter", "convolution", "dot", "copy", "transpose",
    "concatenate", "gather", "dynamic-slice", "dynamic-update-slice", "reduce-window", "broadcast",
    "iota", "select-and-scatter", "rng-bit-generator", "pad", "slice", *ASYNCHRONOUS_COPIES,
))  # fmt: skip
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_ELEMENTWISE = ("add", "convert", "divide", "multiply", "negate", "subtract")
_TRANSPARENT = ("get-tuple-element", "bitcast", "copy", "tuple", "convert", "concatenate")


class Kernel(NamedTuple):
    """A kernel of a compiled program.

    Attributes:
      times: number of its runs in a call.
      opcode: its kind.
      bytes: read and written by a run.
      work: its products.
      origin: see :class:`Instruction`.
      name: name of its instruction.
      launches: what a run launches; empty: a library's kernel, or its instructions are not known.
    """

    times: int
    opcode: str
    bytes: int
    work: tuple[products.Work, ...]
    origin: str
    name: str
    launches: tuple[Launch, ...] = ()


class Message(NamedTuple):
    """An array, or several, that a collective moves.

    Attributes:
      bytes: size on one device; of a gather, the size of the result.
      origin: where the model computes it.
    """

    bytes: int
    origin: str


class Collective(NamedTuple):
    """An exchange of arrays between devices.

    Attributes:
      times: number of its runs in a call.
      kind: such as "all-reduce".
      messages: the arrays that travel together.
    """

    times: int
    kind: str
    messages: tuple[Message, ...]

    @property
    def bytes(self) -> int:
        """Bytes of a run on one device."""
        return sum(message.bytes for message in self.messages)


class Program(NamedTuple):
    """The kernels and collectives of a call.

    Attributes:
      kernels: the kernels.
      collectives: the collectives.
      unknown_loops: number of loops whose number of rounds is not known, also inside kernels; they
        count once.
    """

    kernels: list[Kernel]
    collectives: list[Collective]
    unknown_loops: int


def read_program(
    text: str, launches: Mapping[str, tuple[Launch, ...]] = MappingProxyType({})
) -> Program:
    """Reads a compiled program.

    Args:
      text: result of `jax.stages.Compiled.as_text`.
      launches: result of `instructions.read_launches`.
    """
    return _Reader(text, launches).read()


class _Reader:
    """Walks through the instructions that a call runs."""

    def __init__(self, text: str, launches: Mapping[str, tuple[Launch, ...]]):
        self._launches = launches
        self._computations: dict[str, dict[str, Instruction]] = {}
        self._entry = ""
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if not line.startswith(" "):
                head = _HEAD.match(line)
                if head:
                    current = self._computations[head[2]] = {}
                    self._entry = head[2] if head[1] else self._entry
            elif found := LINE.match(line):
                current[found[1]] = Instruction(*found.groups())
        self._unknown_loops = 0

    def read(self) -> Program:
        kernels, collectives = [], []
        for times, computation, instruction in self._walk(self._entry, 1):
            kind = instruction.opcode.removesuffix("-start")
            if kind in _COLLECTIVES:
                messages = tuple(self._messages(computation, instruction))
                collectives.append(Collective(times, kind, messages))
            elif instruction.opcode in _KERNELS:
                kernels.append(self._kernel(times, computation, instruction))
        inside = sum(one.counts.unknown_loops for kernel in kernels for one in kernel.launches)
        return Program(kernels, collectives, self._unknown_loops + inside)

    def _walk(self, name: str, times: int) -> Iterator[tuple[int, dict, Instruction]]:
        """Yields how often an instruction runs, its computation, and the instruction."""
        computation = self._computations.get(name, {})
        for instruction in computation.values():
            opcode, rest = instruction.opcode, instruction.rest
            if opcode == "while":
                rounds = self._rounds(rest)
                self._unknown_loops += rounds is None
                body = re.search(r"body=%?([\w.\-]+)", rest)[1]
                yield from self._walk(body, times * (1 if rounds is None else rounds))
            elif opcode == "conditional":  # the first branch: where the predicate is false
                branches = re.search(r"(?:branch_computations=\{|false_computation=)(.*)", rest)[1]
                yield from self._walk(re.match(r"%?([\w.\-]+)", branches)[1], times)
            elif opcode in ("call", "async-start"):
                called = re.search(r"(?:to_apply|calls)=%?([\w.\-]+)", rest)
                if called:
                    yield from self._walk(called[1], times)
            else:
                yield times, computation, instruction

    def _rounds(self, rest: str) -> int | None:
        """Returns the number of rounds of a loop; None: it depends on data."""
        known = re.search(r"known_trip_count[^0-9]*(\d+)", rest)
        if known:
            return int(known[1])
        # A TPU's compiler does not say it; counters begin at 0 and end before a constant.
        condition = self._computations[re.search(r"condition=%?([\w.\-]+)", rest)[1]]
        *_, root = condition.values()
        bound = condition.get(root.operands[-1]) if root.operands else None
        counts = root.opcode == "compare" and "direction=LT" in root.rest
        if counts and bound is not None and bound.opcode == "constant":
            return int(bound.rest.split(")")[0])
        return None

    def _kernel(self, times, computation, instruction):
        shape = instruction.shape
        if instruction.target.startswith("__cu"):  # a library's result is first; then its workspace
            shape = re.sub(r"\b[su]8\[\d+\]", "", shape)
        size = main_memory_bytes(shape) + sum(self._read_bytes(computation, instruction))
        if instruction.opcode in ASYNCHRONOUS_COPIES:
            size = moved_bytes(shape)
        launches = self._launches.get(instruction.name, ())
        return Kernel(
            times,
            instruction.opcode,
            size,
            (*self._work(computation, instruction), *products.of_launches(launches)),
            self._origin(computation, instruction),
            instruction.name,
            launches,
        )

    def _read_bytes(self, computation, instruction) -> Iterator[int]:
        """Yields the bytes read of each array: of one that a fusion only slices, its slices."""
        called = re.search(r"calls=%?([\w.\-]+)", instruction.rest)
        inner = self._computations.get(called[1], {}) if called else {}
        names = {x.rest.split(")")[0]: name for name, x in inner.items() if x.opcode == "parameter"}
        readers = defaultdict(list)
        for one in inner.values():
            for operand in one.operands:
                readers[operand].append(one)
        for number, operand in enumerate(instruction.operands):
            if operand not in computation or operand in instruction.operands[:number]:
                continue
            shape = computation[operand].shape
            slices = _slices(readers, names.get(str(number)))
            if slices is None:
                yield main_memory_bytes(shape)
            else:
                values = sum(num_values(x.shape) for x in slices.values())
                size = num_values(shape)
                yield main_memory_bytes(shape) * min(values, size) // size

    def _origin(self, computation, instruction) -> str:
        """Returns the origin of a kernel; without one, that of its last step or of an operand."""
        if instruction.origin:
            return instruction.origin
        called = re.search(r"calls=%?([\w.\-]+)", instruction.rest)
        inner = self._computations.get(called[1], {}) if called else {}
        operands = [computation[x] for x in instruction.operands if x in computation]
        candidates = [*reversed(inner.values()), *operands]
        return next((one.origin for one in candidates if one.origin), "")

    def _work(self, computation, instruction) -> Iterator[products.Work]:
        """Yields the products of a kernel, also those inside a fusion."""
        operands = [computation[x].shape for x in instruction.operands if x in computation]
        if instruction.opcode == "fusion":
            called = re.search(r"calls=%?([\w.\-]+)", instruction.rest)
            inner = self._computations.get(called[1], {}) if called else {}
            for one in inner.values():
                yield from self._work(inner, one)
        else:
            yield from products.of_instruction(instruction, operands)

    def _messages(self, computation, instruction) -> Iterator[Message]:
        growth = self._growth(computation, instruction)
        operands = instruction.operands
        messages = [one for name in operands for one in self._sources(computation, name)]
        for message in messages:
            # What adds a single array is its purpose; joined messages have those of their arrays.
            origins = (instruction.origin, message.origin)
            origin = next(filter(None, origins if len(messages) == 1 else reversed(origins)), "")
            yield Message(message.bytes * growth, origin)

    def _growth(self, computation, instruction) -> int:
        """Returns how often a gather's operands fit into its results; 1 for other collectives."""
        if not instruction.opcode.startswith("all-gather"):
            return 1
        operands = [computation[x].shape for x in instruction.operands if x in computation]
        given, results = sum(map(shape_bytes, operands)), shape_bytes(instruction.shape)
        if instruction.opcode == "all-gather-start":  # returns the operands, too
            results -= given
        return results // given if given else 1

    def _sources(self, computation, name: str) -> Iterator[Message]:
        """Yields the arrays with an origin of which an operand of a collective consists."""
        found = computation.get(name)
        if found is None:
            return
        joins = found.opcode in _TRANSPARENT or "concatenate" in found.name
        if found.origin or not joins or not found.operands:
            yield Message(shape_bytes(found.shape), found.origin)
        elif found.opcode == "get-tuple-element":
            yield Message(
                shape_bytes(found.shape),
                next((x.origin for x in self._sources(computation, found.operands[0])), ""),
            )
        else:
            for operand in found.operands:
                yield from self._sources(computation, operand)


def _slices(
    readers: Mapping[str, list[Instruction]], name: str | None
) -> dict[str, Instruction] | None:
    """Returns the slices of an array that a fusion reads; None: it reads all.

    A slice of an elementwise function, or of another shape, needs no more of its argument.
    """
    found: dict[str, Instruction] = {}
    if not readers.get(name):
        return None
    for reader in readers[name]:
        if reader.opcode == "slice":
            found[re.search(r"slice=\{([^}]*)\}", reader.rest)[1]] = reader
        elif reader.opcode == "dynamic-slice":
            found[reader.name] = reader
        else:
            passes = reader.opcode in (*_ELEMENTWISE, "bitcast")
            within = _slices(readers, reader.name) if passes else None
            if within is None:
                return None
            found |= within
    return found
