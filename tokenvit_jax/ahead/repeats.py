"""Instructions of a kernel's assembly that compute again what a register already has.

Compilers write the same arithmetic once for every arrangement of a matrix in registers; the
assembler computes it once, if the arrangements are equal.
"""

import re
from collections.abc import Sequence

from tokenvit_jax.ahead.control_flow import Statement

# Instructions whose results depend on their operands alone, and reads of global memory, which also
# depend on what was written there.
_PURE = re.compile(
    r"(mov|add|sub|mul|mad|fma|min|max|abs|neg|and|or|xor|not|lop3|sh[lrf]|setp|selp|set|prmt|cvt|"
    r"ex2|lg2|rcp|rsqrt|sqrt|div|tanh|sin|cos|copysign|bfe|bfi|ld\.global)\b"
)
_WRITE = re.compile(r"(st\.global|atom|red|membar)\b")
_RESULT = re.compile(r"\{[^}]*\}|[^,]*")
_REGISTER = re.compile(r"%[a-z]+\d+")


def repeated(statements: Sequence[Statement]) -> set[int]:
    """Returns the numbers of the repeated instructions in a block of statements.

    Args:
      statements: the block; they run one after the other.
    """
    values: dict[str, str] = {}  # register -> its value; at first, the register's own name
    known: dict[tuple[str, ...], str] = {}  # instruction, values, and which result -> its value
    found, writes = set(), 0

    def of_values(text):
        return _REGISTER.sub(lambda register: values.get(register[0], register[0]), text)

    for number, (guard, opcode, operands) in enumerate(statements):
        result = _RESULT.match(operands)[0]
        writes += bool(_WRITE.match(opcode))
        # What a guard leaves as it was depends on the old value, too.
        before = of_values(guard + result) if guard else ""
        key = opcode, before, of_values(operands[len(result) :])
        if opcode.startswith("ld."):
            key += (str(writes),)
        pure, registers = _PURE.match(opcode), _REGISTER.findall(result)
        results = [(*key, str(place)) for place in range(len(registers))]
        if pure and results and all(one in known for one in results):
            found.add(number)
        for register, one in zip(registers, results, strict=True):
            new = f"#{number}.{one[-1]}"
            values[register] = known.setdefault(one, new) if pure else new
    return found
