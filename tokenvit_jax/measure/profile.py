"""Tells where a compiled program spends its time, by parts of the model.

`jax.profiler` traces one call. :mod:`tokenvit_jax.measure.parts` assigns every operation of the
compiled program to a part. XLA fuses some products of attention with the softmax, so both are one
part. On a GPU, kernels of libraries that XLA launches as part of a graph do not tell their layer.
"""

import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from tokenvit_jax.measure.parts import PARTS, part_of

UNKNOWN = "library kernels whose layer is unknown"


def times_of_parts(
    compiled: jax.stages.Compiled,
    run: Callable[[], Any],
    part_of: Callable[[str], str] = part_of,
) -> dict[str, float]:
    """Returns the time of the operations of each part, and of UNKNOWN on a GPU, longest first [ms].

    Args:
      compiled: the compiled program.
      run: calls it once.
      part_of: part of an operation from its origin, one of PARTS by default.
    """
    on_gpu = jax.default_backend() == "gpu"
    origins = origins_of_kernels(compiled.as_text())
    jax.block_until_ready(run())
    times = Counter()
    for names, nanoseconds in trace(run):
        known = (origins.get(_known(name, origins)) for name in names)
        origin = next((one for one in known if one is not None), None)
        if origin is None and any(re.match(r"(transpose_)?copy|Mem", name) for name in names):
            origin = ""
        if origin is not None:
            times[part_of(origin)] += nanoseconds
        elif on_gpu:
            times[UNKNOWN] += nanoseconds
    found = {part: time / 1e6 for part, time in times.most_common()}
    return found | {part: 0.0 for part in (*PARTS, UNKNOWN) if part not in found}


def origins_of_kernels(text: str) -> dict[str, str]:
    """Returns the origin of every operation of a program, by its name and that of its kernel.

    Args:
      text: result of `jax.stages.Compiled.as_text`.
    """
    origins, own, last, callers = {}, {}, {}, []
    computation = ""
    for line in text.splitlines():  # line by line: a program has megabytes
        if line[:1] not in (" ", "}", ""):
            computation = line.removeprefix("ENTRY ").removeprefix("%").split(" ", 1)[0]
            continue
        found = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line)
        if not found:
            continue
        operation, at = found[1], line.find('op_name="')
        if at >= 0:
            origin = line[at + 9 : line.index('"', at + 9)]
            origins[operation] = last[computation] = origin
            # A kernel that was written in Triton bears its own name, which all its calls share.
            if 'xla.gpu.triton"' in line and (name := re.search(r'\bname = "(\w+)"', line[at:])):
                own[name[1]] = origin
        elif (at := line.find("calls=%")) >= 0:
            callers.append((operation, re.match(r"[\w.\-]+", line[at + 7 :])[0]))
    # A fusion around a call of a library has no origin of its own, but what it calls has one.
    origins |= {operation: last[called] for operation, called in callers if called in last}
    return own | {_plain(operation): origin for operation, origin in origins.items()} | origins


def trace(run: Callable[[], Any]) -> list[tuple[tuple[str, ...], int]]:
    """Returns the names and the duration [ns] of every operation of one run.

    On a GPU, an event is a kernel. Its statistic "hlo_op" names the operation of the program, or,
    of a kernel that is launched as part of a graph, the graph; but the kernel of a fusion, and one
    of this package, bears the name of its operation.

    Args:
      run: calls a compiled program once.
    """
    on_gpu = jax.default_backend() == "gpu"
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (file,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
        return [
            (_names(event) if on_gpu else (event.name,), event.duration_ns)
            for plane in data.planes
            for line in plane.lines
            if not on_gpu or line.name.startswith("Stream")
            for event in line.events
        ]


def _names(event):
    """Returns the names by which the operation of a GPU's event may be known."""
    operation = dict(event.stats).get("hlo_op")
    return (event.name,) if operation is None else (operation, event.name)


def _known(name, origins):
    """Returns a name as `origins` has it.

    XLA appends "__1", "__2" to kernels of one name that differ, such as those of other shapes.
    """
    first = re.sub(r"__\d+$", "", name)
    return next((x for x in (name, _plain(name), first, _plain(first)) if x in origins), name)


def _plain(operation):
    """Returns the name of the kernel of an operation."""
    return re.sub(r"[.\-]", "_", operation)
