"""Finds out how often the loops of a kernel run, by computing the values of their counters."""

import contextlib
import operator
import re
from collections import defaultdict
from collections.abc import Container, Mapping, Sequence

from tokenvit_jax.ahead.control_flow import Graph, Loop, Statement

_MOST = 2**14  # rounds; a longer loop counts as unknown
_FUNCTIONS = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "shl": operator.lshift,
    "shr": operator.rshift, "and": operator.and_, "or": operator.or_, "xor": operator.xor,
    "min": min, "max": max,
}  # fmt: skip
_COMPARISONS = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le,
    "gt": operator.gt, "ge": operator.ge,
}  # fmt: skip
# In the first thread of the first block.
_PLACE = re.compile(r"%(tid|ctaid)\.[xyz]")


class Counters:
    """Computes the values of registers of a kernel that depend on constants only."""

    def __init__(self, statements: Sequence[Statement], graph: Graph):
        """Reads the instructions of a kernel."""
        self._statements, self._graph = statements, graph
        self._starts = [block.start for block in graph.blocks for _ in range(*block[:2])]
        self._definitions: dict[str, list[int]] = defaultdict(list)
        for number, statement in enumerate(statements):
            for name in _results(statement):
                self._definitions[name].append(number)

    def rounds(self, loop: Loop) -> int | None:
        """Returns the number of rounds of a loop; None: it depends on data."""
        found = []
        for number, target in self._graph.exits(loop):
            block = self._graph.blocks[number]
            if block.taken is None or block.following is None:
                continue
            count = self._evaluations(loop, block.stop - 1, target == block.taken)
            if count is not None:  # at the end of a round, or at its beginning
                found.append(count if number in loop.latches else max(1, count - 1))
        return min(found, default=None)

    def _evaluations(self, loop: Loop, branch: int, leaving: bool) -> int | None:
        """Returns how often a branch runs until it is taken (leaving), or is not."""
        graph = self._graph
        blocks = [graph.blocks[number] for number in graph.order() if number in loop.blocks]
        places = [number for block in blocks for number in range(block.start, block.stop)]
        inside = {number: place for place, number in enumerate(places)}
        guard = self._statements[branch].guard
        values: dict[str, int] = {}
        needed: set[int] = set()
        if not self._trace(guard.lstrip("!"), inside, values, needed):
            return None
        running = sorted(needed, key=inside.__getitem__)
        before = [number for number in running if inside[number] < inside[branch]]
        after = running[len(before) :]
        with contextlib.suppress(KeyError):  # a value of the round before, in the first round
            for count in range(1, _MOST):
                for number in before:
                    self._run(number, values)
                taken = bool(values[guard.lstrip("!")]) != guard.startswith("!")
                if taken == leaving:
                    return count
                for number in after:
                    self._run(number, values)
        return None

    def _trace(
        self, name: str, inside: Container[int], values: dict[str, int], needed: set[int]
    ) -> bool:
        """Collects the instructions of a loop that compute a register, and values before it.

        Returns:
          Whether they are enough.
        """
        within = [number for number in self._definitions[name] if number in inside]
        outside = [number for number in self._definitions[name] if number not in inside]
        if len(within) > 1 or len(outside) > 1:
            return False
        if outside:
            value = self._constant(outside[0])
            if value is None:
                return False
            values[name] = value
        if not within:
            return bool(outside)
        if within[0] in needed:
            return True
        needed.add(within[0])
        statement = self._statements[within[0]]
        return _is_known(statement) and all(
            self._trace(one, inside, values, needed) for one in _registers(statement)
        )

    def _constant(self, number: int, depth: int = 0) -> int | None:
        """Returns the result of an instruction that runs once."""
        statement = self._statements[number]
        if not _is_known(statement) or depth > 20:
            return None
        values = {}
        for name in _registers(statement):
            definition = self._definition(name, number)
            value = None if definition is None else self._constant(definition, depth + 1)
            if value is None:
                return None
            values[name] = value
        self._run(number, values)
        return values[_operands(statement)[0]]

    def _definition(self, name: str, number: int) -> int | None:
        """Returns the instruction that writes what instruction ``number`` reads; None: unknown."""
        definitions = self._definitions[name]
        before = [one for one in definitions if self._starts[number] <= one < number]
        if before:  # in the same block: nothing comes between
            return before[-1]
        return definitions[0] if len(definitions) == 1 else None

    def _run(self, number: int, values: dict[str, int]) -> None:
        """Runs an instruction."""
        statement = self._statements[number]
        result, *operands = _operands(statement)
        name, *kinds = statement.opcode.split(".")
        kind = kinds[-1]  # of the operands
        read = [_typed(_value(one, values), kind) for one in operands]
        if name in ("mov", "cvt"):
            value = read[0]
        elif name == "setp":
            value = int(_COMPARISONS[kinds[0]](*read))
        else:
            value = _FUNCTIONS[name](*read)
        values[result] = value & (1 << _bits(kinds[0] if name == "cvt" else kind)) - 1


def _is_known(statement: Statement) -> bool:
    """Returns whether an instruction computes a whole number that can be computed here."""
    name, *kinds = statement.opcode.split(".")
    if statement.guard or not kinds or not re.fullmatch(r"[usb](16|32|64)|pred", kinds[-1]):
        return False
    if name == "setp" and kinds[0] not in _COMPARISONS:
        return False
    if name == "mul" and kinds[0] != "lo":
        return False
    if name not in {"mov", "cvt", "setp", *_FUNCTIONS}:
        return False
    values = _operands(statement)[1:]
    return all(one.startswith("%") or re.fullmatch(r"-?(\d+|0x[\da-fA-F]+)", one) for one in values)


def _operands(statement: Statement) -> list[str]:
    return [one.strip() for one in statement.operands.split(",")]


def _registers(statement: Statement) -> list[str]:
    """Returns the registers that an instruction reads."""
    read = _operands(statement)[1:]
    return [one for one in read if one.startswith("%") and not _PLACE.fullmatch(one)]


def _results(statement: Statement) -> list[str]:
    """Returns the registers that an instruction may write."""
    text = statement.operands
    if text.startswith("{"):
        text = text.partition("}")[0]
    elif text.startswith("%"):
        text = text.partition(",")[0]
    else:
        return []
    return re.findall(r"%\w+", text)


def _value(operand: str, values: Mapping[str, int]) -> int:
    """Returns the value of an operand; raises KeyError if a register has none."""
    if _PLACE.fullmatch(operand):
        return 0
    return values[operand] if operand.startswith("%") else int(operand, 0)


def _bits(kind: str) -> int:
    return 1 if kind == "pred" else int(kind[1:])


def _typed(value: int, kind: str) -> int:
    """Returns a value as a type reads it."""
    bits = _bits(kind)
    value &= (1 << bits) - 1
    return value - (1 << bits) if kind[0] == "s" and value >> (bits - 1) else value
