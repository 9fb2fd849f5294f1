"""Basic blocks of a kernel's assembly, its loops, and the longest way through it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple


class Statement(NamedTuple):
    """An instruction of PTX.

    Attributes:
      guard: predicate without which it does nothing, such as "%p1" or "!%p1"; empty: there is none.
      opcode: such as "add.s32".
      operands: their text, separated by commas; the result is first.
    """

    guard: str
    opcode: str
    operands: str


class Block(NamedTuple):
    """Statements that run one after the other.

    Attributes:
      start: number of the first statement.
      stop: number of the statement after the last one.
      taken: block after a branch at the end; None: there is none.
      following: block after the end if nothing branches; None: it always branches, or returns.
    """

    start: int
    stop: int
    taken: int | None
    following: int | None

    @property
    def successors(self) -> list[int]:
        """Blocks that may run next."""
        return [one for one in (self.following, self.taken) if one is not None]


class Loop(NamedTuple):
    """A natural loop.

    Attributes:
      header: block through which it is entered.
      latches: blocks that go back to the header.
      blocks: all of its blocks.
    """

    header: int
    latches: frozenset[int]
    blocks: frozenset[int]


class Graph(NamedTuple):
    """The blocks of a kernel; the first one is its entry."""

    blocks: list[Block]

    @classmethod
    def of(cls, statements: Sequence[Statement], labels: Mapping[str, int]) -> "Graph":
        """Returns the graph of a kernel.

        Args:
          statements: its instructions.
          labels: label -> number of the statement that follows it.
        """
        ends = [i + 1 for i, one in enumerate(statements) if _ends(one)]
        starts = sorted({0, *labels.values(), *ends} - {len(statements)})
        numbers = {start: number for number, start in enumerate(starts)}
        blocks = []
        for start, stop in zip(starts, [*starts[1:], len(statements)], strict=True):
            last = statements[stop - 1] if stop else Statement("", "ret", "")
            branches = last.opcode.startswith("bra")
            taken = numbers.get(labels.get(last.operands)) if branches else None
            falls = bool(last.guard) or not _ends(last)
            blocks.append(Block(start, stop, taken, numbers.get(stop) if falls else None))
        return cls(blocks)

    def loops(self) -> list[Loop]:
        """Returns the natural loops, one for each header."""
        dominators = self._dominators()
        latches: dict[int, set[int]] = {}
        for number, block in enumerate(self.blocks):
            for target in block.successors:
                if dominators[number] >> target & 1:
                    latches.setdefault(target, set()).add(number)
        before = self._predecessors()
        found = []
        for header, ends in latches.items():
            inside, waiting = {header}, list(ends)
            while waiting:
                number = waiting.pop()
                if number not in inside:
                    inside.add(number)
                    waiting += before[number]
            found.append(Loop(header, frozenset(ends), frozenset(inside)))
        return found

    def exits(self, loop: Loop) -> Iterator[tuple[int, int]]:
        """Yields the blocks that may leave a loop, and where each goes."""
        for number in sorted(loop.blocks):
            for target in self.blocks[number].successors:
                if target not in loop.blocks:
                    yield number, target

    def order(self) -> list[int]:
        """Returns the blocks that can be reached, each before those that follow it."""
        return postorder([block.successors for block in self.blocks])[::-1]

    def _predecessors(self) -> list[list[int]]:
        before: list[list[int]] = [[] for _ in self.blocks]
        for number, block in enumerate(self.blocks):
            for target in block.successors:
                before[target].append(number)
        return before

    def _dominators(self) -> list[int]:
        """Returns a mask for each block: the blocks on every way to it; 0: there is no way."""
        order = self.order()
        before = self._predecessors()
        everything = (1 << len(self.blocks)) - 1
        masks = [0] * len(self.blocks)
        for number in order:
            masks[number] = everything if number else 1
        changed = True
        while changed:
            changed = False
            for number in order[1:]:
                mask = everything
                for one in before[number]:
                    mask &= masks[one] or everything
                mask |= 1 << number
                changed |= mask != masks[number]
                masks[number] = mask
        return masks


def _ends(statement: Statement) -> bool:
    return statement.opcode.split(".")[0] in ("bra", "ret", "exit")


def postorder(successors: Sequence[Sequence[int]]) -> list[int]:
    """Returns the nodes that can be reached from node 0, each after those that follow it."""
    order, seen = [], {0}
    waiting = [(0, iter(successors[0]))]
    while waiting:
        target = next((one for one in waiting[-1][1] if one not in seen), None)
        if target is None:
            order.append(waiting.pop()[0])
        else:
            seen.add(target)
            waiting.append((target, iter(successors[target])))
    return order


def longest_path(graph: Graph, costs: Sequence[float]) -> list[int]:
    """Returns the blocks of the costliest way through a kernel.

    Args:
      graph: the blocks.
      costs: cost of all runs of each block.
    """
    successors = _without_loops(graph)
    best: dict[int, float] = {}
    then: dict[int, int] = {}
    for number in postorder(successors):  # a node that is not known yet closes a cycle
        known = [one for one in successors[number] if one in best]
        if known:
            then[number] = max(known, key=best.__getitem__)
        best[number] = costs[number] + (best[then[number]] if known else 0)
    path = [0]
    while path[-1] in then:
        path.append(then[path[-1]])
    return path


def _without_loops(graph: Graph) -> list[list[int]]:
    """Returns the blocks after each block, where the end of a loop goes on to its exits."""
    loops = {loop.header: loop for loop in graph.loops()}
    successors: list[list[int]] = []
    for number, block in enumerate(graph.blocks):
        waiting, found, left = list(block.successors), [], set()
        while waiting:
            target = waiting.pop()
            loop = loops.get(target)
            if loop is None or number not in loop.blocks:
                found.append(target)
            elif target not in left:
                left.add(target)
                waiting += [out for _, out in graph.exits(loop)]
        successors.append(found)
    return successors
