"""Time and memory of models and operators on this machine.

    python -m tokenvit_jax.benchmark --model=dgt_t --image_size=224 --batch_size=8 --mode=train
    python -m tokenvit_jax.benchmark --op=group_attention --out=curve.png

A training step is forward, backward and plain gradient descent in one compiled call that reuses
the memory of its parameters. An operator is timed beside its obvious alternatives, which take
turns in one run. Times are medians; compilation and warm-up are apart. JAX, Flax and NumPy are all
that is needed.

Temporary memory is what XLA plans; what a library that it calls allocates is not in it. On CPU,
glibc gives large temporaries back to the kernel after every call and pays for their pages anew,
which can cost more than the computation. MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000
in the environment keeps them.
"""

import importlib.metadata
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from tokenvit_jax import cli
from tokenvit_jax.benchmark_cases import CASES, Case, normal
from tokenvit_jax.errors import UserError
from tokenvit_jax.layers import advance_centroids
from tokenvit_jax.models import create_model
from tokenvit_jax.summary import parse_image_size

FLAGS = flags.FlagValues()
flags.DEFINE_string("model", None, "name of a model", flag_values=FLAGS)
flags.DEFINE_string("image_size", None, "pixels: 224 (default) or HEIGHTxWIDTH", flag_values=FLAGS)
flags.DEFINE_enum(
    "op",
    None,
    ["group_attention", "depthwise_conv", "dot_product_attention"],
    "a single operator, at the shapes of the models, instead of a model",
    flag_values=FLAGS,
)
flags.DEFINE_integer(
    "batch_size",
    None,
    "images; default: 8, with --op=group_attention 1",
    lower_bound=1,
    flag_values=FLAGS,
)
flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "of the computation", flag_values=FLAGS
)
flags.DEFINE_enum(
    "mode",
    None,
    ["forward", "train"],
    "train: with the backward pass; default: forward, with --op both",
    flag_values=FLAGS,
)
flags.DEFINE_enum("format", "table", ["table", "json"], "of the output", flag_values=FLAGS)
flags.DEFINE_string(
    "out", None, "with --op=group_attention: a picture of the cost over L", flag_values=FLAGS
)

MIB = 2**20
# Measured at most this often, at least MIN_CALLS times, and else for a time given in seconds.
MAX_CALLS = 50
MIN_CALLS = 2


class Program(NamedTuple):
    """A compiled function, the seconds that tracing and compiling took, and its temporary bytes."""

    call: Callable[..., Any]
    trace_seconds: float
    compile_seconds: float
    temp_bytes: int


def main(flag_values: flags.FlagValues) -> None:
    """Prints what was measured."""
    if (flag_values.model is None) == (flag_values.op is None):
        raise UserError("one of --model=NAME and --op=NAME is needed")
    if flag_values.op and flag_values.image_size:
        raise UserError("--image_size goes with --model; operators have shapes of their own")
    if flag_values.out and flag_values.op != "group_attention":
        raise UserError("--out goes with --op=group_attention")
    dtype = jnp.dtype(flag_values.dtype)
    if flag_values.op:
        modes = [flag_values.mode] if flag_values.mode else ["forward", "train"]
        cases = CASES[flag_values.op](flag_values.batch_size, dtype)
        rows = [benchmark_case(case, mode) for case in cases for mode in modes]
    else:
        image_size = parse_image_size(flag_values.image_size or "224")
        batch_size, mode = flag_values.batch_size or 8, flag_values.mode or "forward"
        rows = [benchmark_model(flag_values.model, image_size, batch_size, dtype, mode)]
    if flag_values.format == "json":
        print(json.dumps({"environment": environment(), "results": rows}, indent=2))
    else:
        print(", ".join(f"{key} {value}" for key, value in environment().items()))
        print(format_table(rows))
    if flag_values.out:
        plot_cost(rows).savefig(flag_values.out, dpi=150)


# ------------------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------------------


def compile_program(fn: Callable, *args: Any, donate_argnums: tuple[int, ...] = ()) -> Program:
    """Compiles a function for given arguments and takes the time of both phases."""
    start = time.perf_counter()
    lowered = jax.jit(fn, donate_argnums=donate_argnums).trace(*args).lower()
    traced = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    temp_bytes = compiled.memory_analysis().temp_size_in_bytes
    return Program(compiled, traced - start, end - traced, temp_bytes)


def time_in_turns(calls: dict[str, Callable[[], Any]], *, seconds: float) -> dict[str, list[float]]:
    """Times functions that take turns, so that what else the machine does hits all alike.

    Args:
        calls: name -> function that returns arrays; warmed up first.
        seconds: to spend on each, about.

    Returns:
        name -> seconds of each call.
    """
    planned = {}
    for name, call in calls.items():
        duration = _duration(call)
        if duration < seconds:  # the first call was slower than the others: memory is new
            duration = _duration(call)
        planned[name] = min(max(round(seconds / duration), MIN_CALLS), MAX_CALLS)
    rounds = max(planned.values())
    times = {name: [] for name in calls}
    for i in range(rounds):
        for name, call in calls.items():
            # The calls of a slow function are spread evenly over the rounds.
            if (i + 1) * planned[name] // rounds > i * planned[name] // rounds:
                times[name].append(_duration(call))
    return times


def environment() -> dict[str, Any]:
    """Returns the versions and the device that a measurement holds for."""
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


def _duration(call):
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def _timing(program, times):
    """The numbers of one program as they are printed; no times if it was not run."""
    return {
        "median_ms": 1e3 * statistics.median(times) if times else None,
        "min_ms": 1e3 * min(times) if times else None,
        "calls": len(times),
        "temp_mib": program.temp_bytes / MIB,
        "trace_seconds": program.trace_seconds,
        "compile_seconds": program.compile_seconds,
    }


def _fits_memory(num_bytes):
    stats = jax.devices()[0].memory_stats()
    if stats:
        return num_bytes < stats["bytes_limit"] - stats["bytes_in_use"]
    # On CPU an allocation that is too large kills the process instead of raising.
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        return num_bytes < os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return True


# ------------------------------------------------------------------------------------------------
# Models
# ------------------------------------------------------------------------------------------------


def benchmark_model(
    name: str, image_size: tuple[int, int], batch_size: int, dtype: jnp.dtype, mode: str
) -> dict[str, Any]:
    """Measures the forward pass or the training step of a model with 1000 classes.

    Args:
        name: one of :func:`tokenvit_jax.list_models`.
        image_size: height and width, pixels.
        batch_size: images.
        dtype: of the computation.
        mode: "forward" | "train".

    Returns:
        The settings, times, images per second and temporary memory.

    Raises:
        UserError: an unknown model, or an image too small for it.
    """
    model = create_model(name, dtype=dtype)
    images = normal(0, (batch_size, *image_size, 3))
    labels = jnp.asarray(np.random.default_rng(1).integers(1000, size=batch_size))
    variables = jax.jit(lambda x: model.init(jax.random.key(0), x, train=False))(images[:1])
    if mode == "forward":
        program = compile_program(lambda v, x: model.apply(v, x, train=False), variables, images)
        call = lambda: program.call(variables, images)  # noqa: E731
    else:
        program = compile_program(
            train_step_of(model), variables, images, labels, donate_argnums=(0,)
        )

        def call():
            nonlocal variables  # the old ones are donated
            variables, loss = program.call(variables, images, labels)
            return variables, loss

    timing = _timing(program, time_in_turns({name: call}, seconds=10)[name])
    return {
        "model": name,
        "image_size": f"{image_size[0]}x{image_size[1]}",
        "batch_size": batch_size,
        "dtype": dtype.name,
        "mode": mode,
        "images_per_second": 1e3 * batch_size / timing["median_ms"],
        **timing,
    }


def train_step_of(model) -> Callable[..., tuple[dict, jax.Array]]:
    """Returns ``step(variables, images, labels) -> variables, loss`` with gradient descent."""

    def step(variables, images, labels):
        state = {key: value for key, value in variables.items() if key != "params"}

        def loss_fn(params):
            logits, new_state = model.apply(
                {"params": params, **state},
                images,
                train=True,
                rngs={"dropout": jax.random.key(0), "routing": jax.random.key(1)},
                mutable=list(state),
            )
            log_probs = jax.nn.log_softmax(logits)
            return -jnp.take_along_axis(log_probs, labels[:, None], 1).mean(), new_state

        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, state), grads = grad_fn(variables["params"])
        params = jax.tree.map(lambda p, g: p - 1e-3 * g, variables["params"], grads)
        if "centroids" in state:
            state = {**state, "centroids": advance_centroids(state["centroids"], 0.9)}
        return {"params": params, **state}, loss

    return step


# ------------------------------------------------------------------------------------------------
# Operators
# ------------------------------------------------------------------------------------------------


def benchmark_case(case: Case, mode: str, *, seconds: float = 2.0) -> dict[str, Any]:
    """Measures all contenders of a case in turns.

    Args:
        case: operator, shape and contenders.
        mode: "forward", or "train": forward and backward.
        seconds: to spend on each contender, about.

    Returns:
        The shape, the numbers of each contender, and "speedup": the time of the obvious
        alternative over ours, None where it does not fit into memory and was only compiled.
    """
    inputs = case.inputs
    if mode == "train":
        inputs = (normal(9, inputs[0].shape, inputs[0].dtype), *inputs)
    programs = {}
    for name, fn in case.contenders.items():
        fn = fn if mode == "forward" else _forward_backward(fn, case.num_differentiated)
        programs[name] = compile_program(fn, *inputs)
    calls = {
        name: lambda program=program: program.call(*inputs)
        for name, program in programs.items()
        if _fits_memory(program.temp_bytes)
    }
    times = time_in_turns(calls, seconds=seconds)
    timings = {name: _timing(programs[name], times.get(name, [])) for name in programs}
    alternative, *_, ours = (timing["median_ms"] for timing in timings.values())
    speedup = alternative / ours if alternative and ours else None
    return {**case.shape, "mode": mode, "speedup": speedup, "contenders": timings}


def _forward_backward(fn, num_differentiated):
    def run(d_output, *inputs):
        differentiated, rest = inputs[:num_differentiated], inputs[num_differentiated:]
        output, pull = jax.vjp(lambda *xs: fn(*xs, *rest), *differentiated)
        return output, pull(d_output)

    return run


# ------------------------------------------------------------------------------------------------
# Output
# ------------------------------------------------------------------------------------------------


def format_table(rows: list[dict[str, Any]]) -> str:
    """Lines up rows of equal keys; of contenders it shows median milliseconds and MiB."""
    flat = []
    for row in rows:
        cells = {key: value for key, value in row.items() if key != "contenders"}
        contenders = row.get("contenders", {})
        cells |= {f"{name} ms": timing["median_ms"] for name, timing in contenders.items()}
        cells |= {f"{name} MiB": timing["temp_mib"] for name, timing in contenders.items()}
        flat.append({key: _format(value) for key, value in cells.items()})
    widths = {key: max(len(key), *(len(cells[key]) for cells in flat)) for key in flat[0]}
    lines = [flat[0].keys(), *(cells.values() for cells in flat)]
    return "\n".join(
        "  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths.values(), strict=True))
        for line in lines
    )


def _format(value):
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if value < 100 else f"{value:.0f}"
    return str(value)


def plot_cost(rows: list[dict[str, Any]]):
    """Draws time over sequence length, and the speed-up beside what Eq. 7 promises.

    Args:
        rows: results of :func:`group_attention_cases`.

    Returns:
        matplotlib Figure.
    """
    from matplotlib.figure import Figure  # only this function needs it

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    time_axis, speedup_axis = figure.subplots(1, 2)
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    for mode in modes:
        of_mode = [row for row in rows if row["mode"] == mode]
        _plot_mode(time_axis, speedup_axis, of_mode, mode, named=mode == modes[-1])
    eq7 = sorted({(row["length"], row["eq7"]) for row in rows})
    speedup_axis.plot(*zip(*eq7, strict=True), "k:", label="operations, Eq. 7")
    speedup_axis.axhline(1, color="0.8", linewidth=1, zorder=0)
    time_axis.set(ylabel="ms per head", title="Time (dashed: forward only)")
    speedup_axis.set(ylabel="times faster than plain einsum", title="Speed-up")
    lengths = [length for length, _ in eq7]
    for axis in (time_axis, speedup_axis):
        axis.set(xscale="log", yscale="log", xlabel="tokens L")
        axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=9)
    return figure


def _plot_mode(time_axis, speedup_axis, rows, mode, *, named):
    lengths = [row["length"] for row in rows]
    line, text = {"forward": ("--", "forward"), "train": ("-", "forward + backward")}[mode]
    style = {"linestyle": line, "marker": "o", "markersize": 4}
    for color, name, label in (
        ("0.5", "einsum", "dense, plain einsum"),
        ("C0", "heads_first", "dense, heads first"),
        ("C3", "group", "dynamic groups"),
    ):
        medians = [row["contenders"][name]["median_ms"] or math.nan for row in rows]
        per_head = [ms / row["heads"] for ms, row in zip(medians, rows, strict=True)]
        time_axis.plot(lengths, per_head, color=color, label=label if named else None, **style)
    speedups = [row["speedup"] or math.nan for row in rows]
    speedup_axis.plot(lengths, speedups, color="C3", label=f"measured, {text}", **style)


if __name__ == "__main__":
    cli.run(main, FLAGS)
