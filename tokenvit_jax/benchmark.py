"""Time and memory of models and operators on this machine.

    python -m tokenvit_jax.benchmark --model=dgt_t --image_size=224 --batch_size=8 --mode=train
    python -m tokenvit_jax.benchmark --model=dgt_t,pale_t --against=pvt_v2_b2 --mode=both
    python -m tokenvit_jax.benchmark --model=deit_s --keep=level1 --keep=level3
    python -m tokenvit_jax.benchmark --op=group_attention --out=curve.png

A training step is forward, backward and plain gradient descent in one compiled call that reuses
the memory of its parameters. Several models take turns in one run, models of timm among them
(--against). They differ in size, so they compare by images per second times the multiply-adds
(MACs) of one image, forward: what their speed would be at equal MACs. With --keep or --expedite
every model takes turns with the same model and a token reducer or clustered tokens: "speedup" is
the gain in images per second, "saved" that in MACs. An operator is timed beside its obvious
alternatives, in turns as well. Times are medians; compilation and warm-up are apart. JAX, Flax and
NumPy are all that is needed; PyTorch and timm only for --against.

Temporary memory is what XLA plans; what a library that it calls allocates is not in it. On CPU,
glibc is told to keep freed pages, as training does (see `tokenvit_jax.memory`).
"""

import importlib.metadata
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from tokenvit_jax import benchmark_timm, cli, insertion_flags
from tokenvit_jax.benchmark_cases import CASES, Case, normal
from tokenvit_jax.errors import UserError
from tokenvit_jax.layers import advance_centroids
from tokenvit_jax.memory import keep_pages
from tokenvit_jax.models import create_model, list_models
from tokenvit_jax.summary import count_macs, parse_image_size

FLAGS = flags.FlagValues()
flags.DEFINE_list("model", None, "names, separated by commas, or all", flag_values=FLAGS)
flags.DEFINE_list(
    "against",
    [],
    "names of timm's models, separated by commas, that take turns with --model",
    flag_values=FLAGS,
)
flags.DEFINE_string("image_size", None, "pixels: 224 (default) or HEIGHTxWIDTH", flag_values=FLAGS)
flags.DEFINE_enum(
    "op",
    None,
    list(CASES),
    "a single operator, at the shapes of the models, instead of a model",
    flag_values=FLAGS,
)
flags.DEFINE_integer(
    "batch_size",
    None,
    "images; default: 8; an operator can have another one",
    lower_bound=1,
    flag_values=FLAGS,
)
flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "of the computation", flag_values=FLAGS
)
flags.DEFINE_enum(
    "mode",
    None,
    ["forward", "train", "both"],
    "train: with the backward pass; default: forward, with --op both",
    flag_values=FLAGS,
)
flags.DEFINE_enum("format", "table", ["table", "json"], "of the output", flag_values=FLAGS)
flags.DEFINE_string(
    "out", None, "with --op=group_attention: a picture of the cost over L", flag_values=FLAGS
)

insertion_flags.define(FLAGS)

MIB = 2**20
# Measured at most this often, at least MIN_CALLS times, and else for a time given in seconds.
MAX_CALLS = 50
MIN_CALLS = 2


class Program(NamedTuple):
    """A compiled function, the seconds that tracing and compiling took, and its temporary bytes.

    Of a model of timm some of these are not known.
    """

    call: Callable[..., Any]
    trace_seconds: float | None
    compile_seconds: float | None
    temp_bytes: int | None


def main(flag_values: flags.FlagValues) -> None:
    """Prints what was measured."""
    _check_flags(flag_values)
    if flag_values.against:
        benchmark_timm.share_memory()
    keep_pages()
    dtype = jnp.dtype(flag_values.dtype)
    mode = flag_values.mode or ("both" if flag_values.op else "forward")
    modes = ["forward", "train"] if mode == "both" else [mode]
    if flag_values.op:
        cases = CASES[flag_values.op](flag_values.batch_size, dtype)
        rows = [
            benchmark_case(case, mode)
            for case in cases
            for mode in modes
            if mode == "forward" or case.num_differentiated
        ]
        if not rows:
            raise UserError(f"--op={flag_values.op} has no gradient; it takes --mode=forward")
    else:
        names = list_models() if flag_values.model == ["all"] else flag_values.model
        image_size = parse_image_size(flag_values.image_size or "224")
        insertions = {name: insertion_flags.insertions(flag_values, name) for name in names}
        setting = (image_size, flag_values.batch_size or 8, dtype)
        options = {"against": flag_values.against}
        if any(insertions.values()):
            options["insertions"] = insertions
        rows = [row for mode in modes for row in benchmark_models(names, *setting, mode, **options)]
    found = environment() | (benchmark_timm.environment() if flag_values.against else {})
    if flag_values.format == "json":
        print(json.dumps({"environment": found, "results": rows}, indent=2))
    else:
        print(", ".join(f"{key} {value}" for key, value in found.items()))
        print(format_table(rows))
    if flag_values.out:
        plot_cost(rows).savefig(flag_values.out, dpi=150)


def _check_flags(flag_values):
    if (flag_values.model is None) == (flag_values.op is None):
        raise UserError("one of --model=NAME and --op=NAME is needed")
    if flag_values.op and flag_values.image_size:
        raise UserError("--image_size goes with --model; operators have shapes of their own")
    if flag_values.op and flag_values.against:
        raise UserError("--against goes with --model; operators have alternatives of their own")
    for name in ("keep", "expedite"):
        if flag_values.op and flag_values[name].value:
            raise UserError(f"--{name} goes with --model; nothing is inserted into operators")
    if flag_values.out and flag_values.op != "group_attention":
        raise UserError("--out goes with --op=group_attention")


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
        if duration < seconds:  # the first call is slower than the others: memory is new
            duration = min(duration, _duration(call))
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
        "temp_mib": None if program.temp_bytes is None else program.temp_bytes / MIB,
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


def benchmark_models(
    names: Sequence[str],
    image_size: tuple[int, int],
    batch_size: int,
    dtype: jnp.dtype,
    mode: str,
    *,
    against: Sequence[str] = (),
    insertions: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> list[dict[str, Any]]:
    """Measures the forward pass or the training step of models with 1000 classes, in turns.

    Args:
        names: some of :func:`tokenvit_jax.list_models`.
        image_size: height and width, pixels.
        batch_size: images.
        dtype: of the computation.
        mode: "forward" | "train".
        against: names of timm's models.
        insertions: model -> what to call it -> overrides; each is measured beside the model.

    Returns:
        Of each model, then of timm's as "timm/NAME": the settings; billions of multiply-adds of
        one image, forward; images per second; their product, and for each NAME of timm's
        "ratio_to_NAME", this product over its own; times and temporary memory. With ``insertions``
        also "speedup", images per second over those of the model without one, "saved", the
        multiply-adds of that one over its own, and "speedup_over_saved".

    Raises:
        UserError: an unknown model, or an image too small for it; see also
            :func:`tokenvit_jax.benchmark_timm.timm_peer`.
    """
    models, plain = {}, {}
    for name in names:
        models[name] = create_model(name, dtype=dtype)
        for label, overrides in insertions.get(name, {}).items():
            models[f"{name} {label}"] = create_model(name, dtype=dtype, **overrides)
            plain[f"{name} {label}"] = name
    peers = {  # before ours, which take long to compile: what is missing shows at once
        f"timm/{name}": benchmark_timm.timm_peer(name, image_size, batch_size, dtype.name, mode)
        for name in against
    }
    contenders = {
        name: _model_program(model, image_size, batch_size, mode) for name, model in models.items()
    }
    for name, peer in peers.items():
        contenders[name] = Program(peer.call, None, peer.compile_seconds, None), peer.macs
    calls = {name: program.call for name, (program, _) in contenders.items()}
    times = time_in_turns(calls, seconds=10)
    timings = {name: _timing(contenders[name][0], times[name]) for name in contenders}
    images = {name: 1e3 * batch_size / timing["median_ms"] for name, timing in timings.items()}
    gmacs = {name: macs / 1e9 for name, (_, macs) in contenders.items()}
    rates = {name: images[name] * gmacs[name] for name in contenders}

    def gains(name):
        if not insertions:
            return {}
        without = plain.get(name, name)
        speedup, saved = images[name] / images[without], gmacs[without] / gmacs[name]
        return {"speedup": speedup, "saved": saved, "speedup_over_saved": speedup / saved}

    return [
        {
            "model": name,
            "image_size": f"{image_size[0]}x{image_size[1]}",
            "batch_size": batch_size,
            "dtype": dtype.name,
            "mode": mode,
            "gmacs": gmacs[name],
            "images_per_second": images[name],
            "gmacs_per_second": rates[name],
            **gains(name),
            **{f"ratio_to_{peer}": rates[name] / rates[f"timm/{peer}"] for peer in against},
            **timings[name],
        }
        for name in contenders
    ]


def _model_program(model, image_size, batch_size, mode):
    """Returns the program of a model, with a call without arguments, and its multiply-adds."""
    images = normal(0, (batch_size, *image_size, 3))
    labels = jnp.asarray(np.random.default_rng(1).integers(1000, size=batch_size))
    forward = lambda v, x: model.apply(v, x, train=False)  # noqa: E731
    variables = jax.jit(lambda x: model.init(jax.random.key(0), x, train=False))(images[:1])
    macs = count_macs(forward, variables, images[:1])
    if mode == "forward":
        program = compile_program(forward, variables, images)
        return program._replace(call=lambda: program.call(variables, images)), macs
    program = compile_program(train_step_of(model), variables, images, labels, donate_argnums=(0,))

    def call():
        nonlocal variables  # the old ones are donated
        variables, loss = program.call(variables, images, labels)
        return variables, loss

    return program._replace(call=call), macs


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
