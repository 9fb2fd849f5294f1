"""Estimates the time of a compiled program, part by part and layer by layer.

A kernel takes at least the time of a launch, of moving its bytes, of its products, and of the
instructions of its threads: the longest of the four. The sum over all kernels is the floor of a
step. The instructions are known of all kernels of a GPU's program but those of libraries.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

from tokenvit_jax.ahead.compiling import Compiled
from tokenvit_jax.ahead.hlo import ASYNCHRONOUS_COPIES, Collective, Kernel, Message
from tokenvit_jax.ahead.instructions import WARP, Launch
from tokenvit_jax.ahead.targets import Device, Target
from tokenvit_jax.measure.parts import layer_of, module_path, part_of

# Not "/cond/branch_0_fun": a choice between platforms has this name, and nothing in it depends on a
# predicate once it is lowered.
_PREDICATE = re.compile(r"/while/cond(/|$)|/reduce_(or|and)$")


class Cost(NamedTuple):
    """Cost of some kernels in one call.

    Attributes:
      name: what they have in common.
      launches: their number, without copies that a TPU makes beside them.
      bytes: read and written.
      operations: of products, 2 per multiply-add.
      seconds: floor of their time.
      limits: name of what bounds a kernel, "launch", "bytes", "products" or "instructions" -> floor
        of the kernels that it bounds [s].
    """

    name: str
    launches: int
    bytes: int
    operations: float
    seconds: float
    limits: dict[str, float]

    @property
    def limit(self) -> str:
        """What bounds the kernels for most of the time."""
        return max(self.limits, key=self.limits.__getitem__, default="")


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
    return kernel.times * max(bounds(kernel, target.device).values())


def bounds(kernel: Kernel, device: Device) -> dict[str, float]:
    """Returns the times that a run of a kernel cannot be faster than, by their reasons [s]."""
    facts, products = device.facts, device.products
    return {
        "launch": facts["launch"].value,
        "bytes": kernel.bytes / facts["bandwidth"].value,
        "products": sum(work.operations / products[work.precision].value for work in kernel.work),
        "instructions": sum(_instruction_seconds(launch, device) for launch in kernel.launches),
    }


def _instruction_seconds(launch: Launch, device: Device) -> float:
    """Returns the least time of the instructions of a launch [s].

    It is the time of the multiprocessor with the most blocks, in its busiest pipe.
    """
    warps = -(-launch.blocks // device.multiprocessors) * launch.warps
    cycles = max(
        count * WARP / device.lanes[pipe].value for pipe, count in launch.counts.pipes.items()
    )
    return warps * cycles / device.facts["clock"].value


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
    found: dict[str, list[Cost]] = defaultdict(list)
    for kernel in compiled.program.kernels:
        found[key(kernel)].append(_cost(kernel, compiled.target))
    rows = [total(costs, name) for name, costs in found.items()]
    return sorted(rows, key=lambda row: -row.seconds)


def _cost(kernel: Kernel, target: Target) -> Cost:
    """Returns the cost of all runs of a kernel."""
    times, limits = kernel.times, bounds(kernel, target.device)
    limit = max(limits, key=limits.__getitem__)
    operations = times * sum(work.operations for work in kernel.work)
    seconds = times * limits[limit]
    beside = target.device.platform == "tpu" and kernel.opcode in ASYNCHRONOUS_COPIES
    launches = 0 if beside else times
    return Cost("", launches, times * kernel.bytes, operations, seconds, {limit: seconds})


def total(rows: Iterable[Cost], name: str = "all") -> Cost:
    """Returns the sum of costs."""
    rows = list(rows)
    limits: Counter[str] = Counter()
    for row in rows:
        limits.update(row.limits)
    return Cost(name, *(sum(row[i] for row in rows) for i in range(1, 5)), dict(limits))


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
