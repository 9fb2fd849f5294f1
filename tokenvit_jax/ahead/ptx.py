"""Counts the instructions that a thread of a GPU's kernel executes, from its assembly (PTX).

PTX is close to what runs: in the longest loops of twelve kernels of DGT-T's training step, the
counts were .91 to 1.01 of the number of instructions of the machine code for an H200, and those of
float32 arithmetic and of special functions .92 to 1; in two reductions of XLA, .81 and .87 of all
instructions counted. Where the assembler expands an instruction (exponentials, divisions), the
expansion counts; moves and reads of parameters do not count, because most of them vanish, and
neither do repeated instructions.

Of two branches, the longer one counts. A loop counts as often as the values that its counter takes,
which are computed for the first thread; a loop whose end depends on data counts once.
"""

import functools
import re
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from typing import NamedTuple

from tokenvit_jax.ahead.control_flow import Graph, Statement, longest_path
from tokenvit_jax.ahead.repeats import repeated
from tokenvit_jax.ahead.rounds import Counters

PIPES = ("issue", "float", "logic", "special", "conversion", "memory")
_ENTRY = re.compile(r"^\.visible \.entry (\w+)\(.*?^\{$(.*?)^\}$", re.DOTALL | re.MULTILINE)
_STATEMENT = re.compile(r"(?:@(!?%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)

# What the assembler makes of an instruction: pipe -> instructions there, in all "issue". The first
# pattern that fits decides.
_FREE = {}
_EXPANSIONS = tuple(
    (re.compile(pattern), pipes)
    for pattern, pipes in (
        # Copies between registers, constants, addresses of parameters, widened integers.
        (r"mov\b|cvta|ld\.param|griddepcontrol|ret|exit|bra\.uni|cvt\.[us](16|32|64)\.[us]\d+$",
         _FREE),
        (r"(abs|neg)\.", _FREE),  # a flag of the instruction that reads the result
        # Without ftz, arguments that are nearly 0 are scaled: a comparison and two products.
        (r"(ex2|lg2|rcp|rsqrt|sqrt|tanh|sin|cos)\.approx\.ftz", {"special": 1}),
        (r"(ex2|lg2|rcp|rsqrt|sqrt)\.approx", {"special": 1, "float": 2, "logic": 1}),
        (r"(tanh|sin|cos)\.approx", {"special": 1, "float": 1}),
        (r"div\.(full|approx)", {"float": 1}),  # and _RECIPROCAL
        (r"(div|sqrt|rcp)\.r[nzmp]", {"special": 1, "float": 8, "logic": 2}),
        (r"(add|sub|mul|fma|mad)(\.\w+)*\.(f16|f32|bf16)(x2)?$", {"float": 1}),
        (r"cvt\.sat\.f32\.f32", {"float": 1}),
        (r"cvt\.f32\.bf16", {"logic": 1.5}),  # three for two values of a register
        (r"cvt\.", {"conversion": 1}),
        (r"(setp|selp|set|min|max|and|or|xor|not|lop3|shr|shf|bf[ei]|prmt|copysign)\b",
         {"logic": 1}),
        (r"redux", {"memory": 2}),
        (r"(shfl|ldmatrix|stmatrix|atom|red|ld|st|cp\.async\.c[ag])\b", {"memory": 1}),
        (r"", {"issue": 1}),  # integers, addresses, barriers, branches, products
    )
)  # fmt: skip
# What a block computes of a divisor, once for all divisions by it.
_RECIPROCAL = {"special": 1, "float": 3, "logic": 2, "issue": 6}
_WIDTH = re.compile(r"(?:\.v(\d))?\.[bsuf](\d+)$")
_PRODUCT = re.compile(r"(wg)?mma\.\S*?m(\d+)n(\d+)k(\d+)\.\S*?\.(bf16|f16|tf32)\b")


class Counts(NamedTuple):
    """What a thread of a kernel executes.

    Attributes:
      pipes: one of PIPES -> number of instructions; "issue" has all of them. "memory" counts words
        of 4 bytes, also those of shared memory and of exchanges between threads.
      products: precision, as in the files of devices -> operations of a warp in matrix products.
      unknown_loops: loops whose number of rounds is not known; they count once.
    """

    pipes: Mapping[str, float]
    products: Mapping[str, float]
    unknown_loops: int


def read_kernels(text: str) -> dict[str, Counts]:
    """Returns the counts of every kernel in a file of PTX, by name."""
    return {found[1]: _count(found[2]) for found in _ENTRY.finditer(text)}


def _count(body: str) -> Counts:
    statements, labels = _statements(body)
    graph = Graph.of(statements, labels)
    counters = Counters(statements, graph)
    times, unknown = [1.0] * len(graph.blocks), 0
    for loop in graph.loops():
        rounds = counters.rounds(loop)
        unknown += rounds is None
        for block in loop.blocks:
            times[block] *= rounds or 1
    literals = {
        one.operands.partition(",")[0]
        for one in statements
        if one.opcode == "mov.b32" and re.search(r", 0f\w+$", one.operands)
    }
    costs = [
        _costs(statements[block.start : block.stop], literals, scale)
        for block, scale in zip(graph.blocks, times, strict=True)
    ]
    whole: Counter[str] = Counter()
    for block in longest_path(graph, [cost["issue"] for cost in costs]):
        whole.update(costs[block])
    pipes = {name: whole[name] for name in PIPES}
    products = {name: whole[name] for name in ("bfloat16", "default") if whole[name]}
    return Counts(pipes, products, unknown)


def _statements(body: str) -> tuple[list[Statement], dict[str, int]]:
    """Returns the instructions, and the numbers of those that follow the labels."""
    statements: list[Statement] = []
    labels: dict[str, int] = {}
    for line in body.splitlines():
        line = line.partition("//")[0].strip()
        if label := re.match(r"(\$\w+):", line):
            labels[label[1]] = len(statements)
            continue
        for part in line.split(";"):
            found = _STATEMENT.fullmatch(part.strip(" \t{}"))
            if found:
                statements.append(Statement(found[1] or "", found[2], found[3].strip()))
    return statements, labels


def _costs(statements: Sequence[Statement], literals: Container[str], times: float) -> Counter[str]:
    """Returns the instructions of a block by pipe, and the operations of products by precision.

    Args:
      statements: the block.
      literals: registers with constants; their reciprocals are constants, too.
      times: number of its runs.
    """
    costs: Counter[str] = Counter()
    divisors: set[str] = set()
    again = repeated(statements)
    for number, statement in enumerate(statements):
        opcode = statement.opcode
        if number in again:
            continue
        if opcode == "bra" and not statement.guard:
            continue  # blocks are placed one after the other
        for name, count in _expansion(opcode).items():
            costs[name] += count * times
        if opcode.startswith(("div.full", "div.approx")):
            divisors.add(statement.operands.rpartition(" ")[2])
        if found := _PRODUCT.match(opcode):
            operations = 2 * int(found[2]) * int(found[3]) * int(found[4])
            precision = "default" if found[5] == "tf32" else "bfloat16"
            costs[precision] += operations / (4 if found[1] else 1) * times  # wgmma: of four warps
    for divisor in divisors:
        if divisor not in literals and not divisor.startswith("0f"):
            costs.update({name: count * times for name, count in _RECIPROCAL.items()})
    return costs


@functools.cache
def _expansion(opcode: str) -> dict[str, float]:
    """Returns what the assembler makes of an instruction, by pipe."""
    pipes = next(pipes for pattern, pipes in _EXPANSIONS if pattern.match(opcode))
    if "memory" in pipes:
        width = _WIDTH.search(opcode)
        words = int(width[1] or 1) * int(width[2]) / 32 if width else 1
        if opcode.startswith(("ldmatrix", "stmatrix")):
            words = int(re.search(r"\.x(\d)", opcode)[1])
        return {"issue": 1, "memory": pipes["memory"] * max(1, words)}
    return pipes | {"issue": sum(pipes.values())} if pipes else pipes
