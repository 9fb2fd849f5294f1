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


def times_of_parts(compiled: jax.stages.Compiled, run: Callable[[], Any]) -> dict[str, float]:
    """Returns the time of the operations of each of PARTS, and of UNKNOWN on a GPU [ms].

    Args:
      compiled: the compiled program.
      run: calls it once.
    """
    on_gpu = jax.default_backend() == "gpu"
    found = re.findall(r'%?([\w.\-]+) = .*?op_name="([^"]+)"', compiled.as_text())
    origins = dict(found) | {_plain(operation): origin for operation, origin in found}
    jax.block_until_ready(run())
    times = Counter()
    for operation, nanoseconds in trace(run):
        origin = origins.get(operation, origins.get(_plain(operation)))
        if origin is None and re.match(r"(transpose_)?copy|Mem", operation):
            origin = ""
        if origin is not None:
            times[part_of(origin)] += nanoseconds
        elif on_gpu:
            times[UNKNOWN] += nanoseconds
    return {part: times[part] / 1e6 for part in (*PARTS, UNKNOWN)}


def trace(run: Callable[[], Any]) -> list[tuple[str, int]]:
    """Returns the duration [ns] of every operation of one run, by its name in the program.

    On a GPU, an event is a kernel: its statistic "hlo_op" names the operation, and the kernel of a
    fusion bears the fusion's name.

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
            (
                dict(event.stats).get("hlo_op", event.name) if on_gpu else event.name,
                event.duration_ns,
            )
            for plane in data.planes
            for line in plane.lines
            if not on_gpu or line.name.startswith("Stream")
            for event in line.events
        ]


def _plain(operation):
    """Returns the name of the kernel of an operation."""
    return re.sub(r"[.\-]", "_", operation)
