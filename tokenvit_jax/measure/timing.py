"""Times compiled programs in turns, and describes the environment of the measurement.

Times are medians; compilation and warm-up are separate. Temporary memory is the memory that XLA
plans; allocations of the libraries that XLA calls are not included.
"""

import importlib.metadata
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from tokenvit_jax.kernels.platforms import traced_for

Name = TypeVar("Name", bound=Hashable)
Built = TypeVar("Built")

MIB = 2**20
# Bounds on the number of timed calls; between the bounds, a time budget decides.
MAX_CALLS = 50
MIN_CALLS = 3
# On an accelerator, so many calls follow one another before the host waits for the results, as the
# steps of a training do; a wait after every call would count as a part of it.
CALLS_IN_A_ROW = 10
SLOW = 0.1  # duration of a call from which on one waits for each [s]
MAX_THREADS = 6  # that compile at once


class Program(NamedTuple):
    """A compiled function and the cost of compiling it; None if the cost is unknown (timm).

    Attributes:
      call: the compiled function.
      trace_seconds: time to trace and lower it [s].
      compile_seconds: time to compile it [s].
      temp_bytes: temporary memory [bytes].
    """

    call: Callable[..., Any]
    trace_seconds: float | None
    compile_seconds: float | None
    temp_bytes: int | None


def compile_program(fn: Callable, *args: Any, donate_argnums: tuple[int, ...] = ()) -> Program:
    """Compiles a function for given arguments, and times tracing and compilation.

    Args:
      fn: function of arrays.
      *args: trees of arrays.
      donate_argnums: positions of the arguments whose memory the results may reuse.
    """
    start = time.perf_counter()
    with traced_for(jax.devices()[0]):
        lowered = jax.jit(fn, donate_argnums=donate_argnums).trace(*args).lower()
    traced = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    temp_bytes = compiled.memory_analysis().temp_size_in_bytes
    return Program(compiled, traced - start, end - traced, temp_bytes)


def build_all(
    builders: Mapping[Name, Callable[[], Built]],
    beside: Mapping[Name, Callable[[], Built]] = MappingProxyType({}),
    failed: dict[Name, Exception] | None = None,
) -> dict[Name, Built]:
    """Returns what functions build by compiling programs: on an accelerator several at once.

    On a CPU they run one after another, so that each has the whole machine.

    Args:
      builders: name -> function; they may run in other threads.
      beside: name -> function; they run in this thread, meanwhile or first.
      failed: receives the errors of what could not be built, by name, and the others are returned;
        None: the first error is raised.
    """
    built = {}

    def keep(name, build):
        try:
            built[name] = build()
        except Exception as error:
            if failed is None:
                raise
            failed[name] = error.with_traceback(None)  # whose frames hold arrays

    if jax.default_backend() == "cpu":
        for name, build in {**beside, **builders}.items():
            keep(name, build)
    else:
        with ThreadPoolExecutor(MAX_THREADS) as pool:
            waiting = {name: pool.submit(build) for name, build in builders.items()}
            for name, build in beside.items():
                keep(name, build)
            for name, result in waiting.items():
                keep(name, result.result)
    return {name: built[name] for name in (*builders, *beside) if name in built}


def time_in_turns(
    calls: Mapping[Name, Callable[[], Any]], *, seconds: float
) -> dict[Name, list[float]]:
    """Times functions that take turns, so that other load on the machine affects all alike.

    Args:
      calls: name -> function that returns arrays, or objects with `block_until_ready`; each is
        warmed up first.
      seconds: approximate time to spend on each function [s].

    Returns:
      Name -> duration of each call [s].
    """
    planned, in_a_row = {}, {}
    most = 1 if jax.default_backend() == "cpu" else CALLS_IN_A_ROW
    for name, call in calls.items():
        duration = _duration(call, 1)
        if duration < seconds:  # the first call is slower than the others: its memory is new
            duration = min(duration, _duration(call, 1))
        # A call that takes longer than SLOW waits for nothing: rows of it would only take time.
        in_a_row[name] = most if duration < SLOW else 1
        planned[name] = round(seconds / duration / in_a_row[name])
        planned[name] = min(max(planned[name], MIN_CALLS), MAX_CALLS)
    rounds = max(planned.values())
    times = {name: [] for name in calls}
    for i in range(rounds):
        for name, call in calls.items():
            # The calls of a slow function are spread evenly over the rounds.
            if (i + 1) * planned[name] // rounds > i * planned[name] // rounds:
                times[name].append(_duration(call, in_a_row[name]))
    return times


def _duration(call, in_a_row):
    start = time.perf_counter()
    for _ in range(in_a_row):
        results = call()
    jax.block_until_ready(results)
    return (time.perf_counter() - start) / in_a_row


def describe_times(program: Program, times: Sequence[float]) -> dict[str, Any]:
    """Returns the numbers to print for one program.

    Args:
      program: compiled program; its "trace_seconds", "compile_seconds" and "temp_mib" are included.
      times: durations of its calls [s]; if there are none, "median_ms" and "min_ms" are None.
    """
    return {
        "median_ms": 1e3 * statistics.median(times) if times else None,
        "min_ms": 1e3 * min(times) if times else None,
        "calls": len(times),
        "temp_mib": None if program.temp_bytes is None else program.temp_bytes / MIB,
        "trace_seconds": program.trace_seconds,
        "compile_seconds": program.compile_seconds,
    }


def fits_memory(num_bytes: int) -> bool:
    """Returns whether the device has this much free memory [bytes]; True if this is unknown."""
    stats = jax.devices()[0].memory_stats()
    if stats:
        return num_bytes < stats["bytes_limit"] - stats["bytes_in_use"]
    # On CPU, an allocation that is too large kills the process instead of raising an error.
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        return num_bytes < os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return True


def check_memory(num_bytes: int, what: str) -> None:
    """Raises MemoryError for more than all memory of the device or machine.

    On CPU, an allocation that is too large kills the process instead of raising an error.

    Args:
      num_bytes: memory that is needed [bytes].
      what: what needs it, for the message.
    """
    stats = jax.devices()[0].memory_stats()
    if stats:
        total = stats["bytes_limit"]
    elif "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return
    if num_bytes > total:
        raise MemoryError(f"{what} needs {num_bytes / 2**30:.0f} of {total / 2**30:.0f} GiB")


def environment() -> dict[str, Any]:
    """Returns the versions and the device of a measurement."""
    packages = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")}
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        **packages,
        "numpy": np.__version__,
        "backend": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "cpus": os.cpu_count(),
    }


def normal(seed: int, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Returns normal random numbers that depend on the seed only.

    Raises:
      MemoryError: they do not fit into memory.
    """
    shape_text = " x ".join(map(str, shape))
    check_memory(8 * math.prod(shape), f"an array of {shape_text} numbers, with its copy,")
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)
