"""Estimates the time of a compiled program, part by part and layer by layer.

A kernel takes at least the time of a launch, of moving its bytes, and of its products: the largest
of the three. The sum over all kernels is the floor of a step.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

from tokenvit_jax.ahead.compiling import Compiled
from tokenvit_jax.ahead.hlo import Collective, Kernel, Message
from tokenvit_jax.ahead.targets import Target
from tokenvit_jax.measure.parts import layer_of, module_path, part_of

# Not "/cond/branch_0_fun": a choice between platforms has this name, and nothing in it depends on a
# predicate once it is lowered.
_PREDICATE = re.compile(r"/while/cond(/|$)|/reduce_(or|and)$")


class Cost(NamedTuple):
    """Cost of some kernels in one call.

    Attributes:
      name: what they have in common.
      launches: their number.
      bytes: read and written.
      operations: of products, 2 per multiply-add.
      seconds: floor of their time.
    """

    name: str
    launches: int
    bytes: int
    operations: float
    seconds: float


class Traffic(NamedTuple):
    """Collectives of one purpose in one call.

    Attributes:
      name: what is exchanged.
      kind: such as "all-reduce".
      count: number of collectives; one that serves several purposes counts for the first.
      bytes: on one device.
    """

    name: str
    kind: str
    count: int
    bytes: int


def kernel_seconds(kernel: Kernel, target: Target) -> float:
    """Returns the least time of all runs of a kernel [s]."""
    facts, products = target.device.facts, target.device.products
    products_seconds = sum(work.operations / products[work.precision].value for work in kernel.work)
    memory_seconds = kernel.bytes / facts["bandwidth"].value
    return kernel.times * max(facts["launch"].value, memory_seconds, products_seconds)


def collective_seconds(collective: Collective, target: Target) -> float:
    """Returns the least time of all runs of a collective, in a ring, not overlapped [s]."""
    facts, devices = target.device.facts, target.num_devices
    link = "interconnect" if target.in_one_host or "network" not in facts else "network"
    rounds = 2 if collective.kind == "all-reduce" else 1
    moved = rounds * collective.bytes * (devices - 1) / devices
    return collective.times * max(facts["latency"].value, moved / facts[link].value)


def by_part(compiled: Compiled) -> list[Cost]:
    """Returns the cost of every part of a step, the costliest first."""
    return _grouped(compiled, lambda kernel: part_of(kernel.origin))


def by_layer(compiled: Compiled) -> list[Cost]:
    """Returns the cost of every kind of layer and operator, the costliest first."""
    return _grouped(compiled, lambda kernel: layer_of(kernel.origin))


def _grouped(compiled: Compiled, key: Callable[[Kernel], str]) -> list[Cost]:
    found: dict[str, list[float]] = defaultdict(lambda: [0, 0, 0.0, 0.0])
    for kernel in compiled.program.kernels:
        sums = found[key(kernel)]
        sums[0] += kernel.times
        sums[1] += kernel.times * kernel.bytes
        sums[2] += kernel.times * sum(work.operations for work in kernel.work)
        sums[3] += kernel_seconds(kernel, compiled.target)
    rows = [Cost(name, *sums) for name, sums in found.items()]
    return sorted(rows, key=lambda row: -row.seconds)


def total(rows: Iterable[Cost], name: str = "all") -> Cost:
    """Returns the sum of costs."""
    rows = list(rows)
    return Cost(name, *(sum(row[i] for row in rows) for i in range(1, 5)))


# ------------------------------------------------------------------------------------------------
# Collectives
# ------------------------------------------------------------------------------------------------


def by_purpose(compiled: Compiled) -> list[Traffic]:
    """Returns what the collectives exchange, the most bytes first."""
    counts: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for collective in compiled.program.collectives:
        for i, message in enumerate(collective.messages):
            purpose = purpose_of(collective.kind, message, compiled.batch_norms)
            sums = counts[purpose, collective.kind]
            sums[0] += collective.times * (i == 0)
            sums[1] += collective.times * message.bytes
    rows = [Traffic(name, kind, *sums) for (name, kind), sums in counts.items()]
    return sorted(rows, key=lambda row: -row.bytes)


def purpose_of(kind: str, message: Message, batch_norms: frozenset[str]) -> str:
    """Returns what a message of a collective is for.

    Args:
      kind: kind of the collective.
      message: see `hlo.Message`.
      batch_norms: paths of the layers whose statistics span the global batch.
    """
    origin, path = message.origin, module_path(message.origin)
    backward = "transpose(" in origin
    if kind == "all-gather" and "jvp(" not in origin:
        return "parameters (fsdp)"
    if kind == "reduce-scatter":
        return "gradients"
    if any(path == norm or path.startswith(f"{norm}/") for norm in batch_norms):
        return "BatchNorm, backward" if backward else "BatchNorm, forward"
    if backward:
        return "gradients"
    if re.search("centroid|group_sums|attend_in_groups|after_step", origin):
        return "centroids"
    if _PREDICATE.search(origin):
        return "predicates of loops and branches"
    if path:
        return "forward pass"
    return "loss and metrics" if message.bytes <= 64 else "gradients"


def floor_seconds(compiled: Compiled) -> tuple[float, float]:
    """Returns the least time of the kernels and of the collectives of a step [s]."""
    program, target = compiled.program, compiled.target
    kernels = sum(kernel_seconds(kernel, target) for kernel in program.kernels)
    return kernels, sum(collective_seconds(one, target) for one in program.collectives)


class Speed(NamedTuple):
    """Estimated images per second of all devices.

    Attributes:
      low: if the step reaches the lowest share of its floor that was measured; None: no step was
        measured on such a device.
      high: the same with the highest share.
      bound: at the floor itself; no step can be faster.
    """

    low: float | None
    high: float | None
    bound: float


def speed(compiled: Compiled) -> Speed:
    """Estimates the images per second; collectives are not overlapped with anything."""
    kernels, collectives = floor_seconds(compiled)
    images = compiled.batch_size

    def rate(share: float) -> float:
        return images / (kernels / share + collectives)

    reached = compiled.target.device.facts.get("reached")
    if reached is None:
        return Speed(None, None, rate(1))
    low, high = reached.value
    return Speed(rate(low), rate(high), rate(1))
