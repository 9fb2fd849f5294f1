"""Describes a compiled step as text, Markdown or JSON."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from tokenvit_jax.ahead import costs
from tokenvit_jax.ahead.compiling import Compiled, Memory
from tokenvit_jax.ahead.fitting import CLOSE, LARGEST, MARGIN, estimated_fit, largest_estimate

FORMATS = ("table", "markdown", "json")
_LAYERS = 15  # rows of the costliest operations
_MEMORY_NAMES = {
    "parameters": "parameters",
    "optimizer": "optimizer state",
    "averages": "moving averages",
    "statistics": "statistics, centroids, counters",
    "batch": "batch",
    "temporaries": "temporaries",
    "results": "results and program",
}


class Section(NamedTuple):
    """A part of a report.

    Attributes:
      title: its heading.
      text: sentences.
      columns: heading of a table; empty: there is none.
      rows: its rows, texts.
    """

    title: str
    text: str
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()


def format_report(compiled: Compiled, form: str, largest: int | None, step: int = 1) -> str:
    """Returns the report of a compiled step.

    Args:
      compiled: the step.
      form: one of FORMATS.
      largest: largest batch per device that fits, if it was searched.
      step: batches per device are multiples of it.
    """
    if form == "json":
        return json.dumps(describe(compiled, largest, step), indent=2)
    render = _markdown if form == "markdown" else _plain
    return "\n\n".join(render(section) for section in _sections(compiled, largest, step))


def fitting_batch(compiled: Compiled, step: int) -> int:
    """Estimates the largest batch per device that fits."""
    memory, capacity = compiled.memory, int((1 - MARGIN) * compiled.target.device.memory)
    return estimated_fit(compiled.batch_per_device, memory.total, memory.state, capacity, step)


def excess(compiled: Compiled, step: int) -> str:
    """Returns by how much a step exceeds the memory of a device, and which batch does not."""
    memory, capacity = compiled.memory, compiled.target.device.memory
    batch = fitting_batch(compiled, step)
    if batch:
        # A program that the compiler gave up on has no memory plan: its size is only a bound.
        about = "about" if compiled.program else "at most about"
        fitting = f"{about} {images_text(batch)} per device would fit"
        advice = f"{fitting} (--fit finds the largest batch)"
    else:
        advice = "no batch would; shard the state with --config.mesh.fsdp"
    return (
        f"a batch of {images_text(compiled.batch_per_device)} per device does not fit into the "
        f"memory: a step needs {_gib(memory.total)} of {_gib(capacity)} GiB, "
        f"{_gib(memory.total - capacity)} GiB too much; {advice}"
    )


def images_text(number: int) -> str:
    """Returns a number of images as text."""
    return f"{number} image{'s' * (number != 1)}"


def describe(compiled: Compiled, largest: int | None, step: int) -> dict[str, Any]:
    """Returns a report as entries for JSON; bytes, seconds and operations without prefixes."""
    target, memory = compiled.target, compiled.memory
    found = {
        "target": target.name,
        "device": target.device.title,
        "devices": target.num_devices,
        "mode": compiled.mode,
        "batch_per_device": compiled.batch_per_device,
        "batch_size": compiled.batch_size,
        "fits": compiled.fits,
        "largest_batch_per_device": largest,
        "estimated_largest_batch_per_device": fitting_batch(compiled, step),
        "memory": {**memory._asdict(), "total": memory.total, "usable": target.device.memory},
        "trace_seconds": compiled.trace_seconds,
        "compile_seconds": compiled.compile_seconds,
        "processor_seconds": compiled.processor_seconds,
        "misfits": [misfit._asdict() for misfit in compiled.misfits],
    }
    if compiled.program is None:
        return found
    kernels, collectives = costs.floor_seconds(compiled)
    whole = costs.total(costs.by_part(compiled))
    return found | {
        "launches": whole.launches,
        "bytes": whole.bytes,
        "operations": whole.operations,
        "floor_seconds": kernels,
        "limits": whole.limits,
        "collective_seconds": collectives,
        "images_per_second": costs.speed(compiled)._asdict(),
        "parts": [row._asdict() for row in costs.by_part(compiled)],
        "layers": [row._asdict() for row in costs.by_layer(compiled)[:_LAYERS]],
        "collectives": [row._asdict() for row in costs.by_purpose(compiled)],
        "unknown_loops": compiled.program.unknown_loops,
        "xla": compiled.xla,
    }


# ------------------------------------------------------------------------------------------------
# Sections
# ------------------------------------------------------------------------------------------------


def _sections(compiled: Compiled, largest: int | None, step: int) -> list[Section]:
    sections = [_overview(compiled), _memory(compiled, largest, step)]
    if compiled.program is not None:
        sections += [_speed(compiled), _parts(compiled), _layers(compiled), _collectives(compiled)]
    return [*sections, _misfits(compiled)]


def _overview(compiled: Compiled) -> Section:
    target = compiled.target
    names = {"train": "Training step", "evaluate": "Evaluation step", "predict": "Prediction"}
    devices = f"{target.num_devices} x {target.device.title}"
    return Section(
        f"{names[compiled.mode]} on {target.name}",
        f"{devices}; {images_text(compiled.batch_per_device)} per device, {compiled.batch_size} in "
        f"all. Traced in {compiled.trace_seconds:.0f} s, compiled in "
        f"{compiled.compile_seconds:.0f} s ({compiled.processor_seconds:.0f} s of all processors).",
    )


def _memory(compiled: Compiled, largest: int | None, step: int) -> Section:
    memory, device = compiled.memory, compiled.target.device
    whole = device.facts["memory_gib"].value
    share = ""
    if device.usable < 1:
        share = (
            f" ({device.usable:.0%} of {whole:g}, which JAX reserves; "
            "XLA_PYTHON_CLIENT_MEM_FRACTION changes it)"
        )
    if compiled.fits:
        text = f"{_gib(memory.total)} of {_gib(device.memory)} GiB{share}. "
    else:
        text = f"DOES NOT FIT: {_gib(memory.total)} of {_gib(device.memory)} GiB{share}. "
    if largest is None:
        batch = fitting_batch(compiled, step)
        about = (
            "At least" if batch == largest_estimate(compiled.batch_per_device, step) else "About"
        )
        text += (
            f"{about} {images_text(batch)} per device would fit with {MARGIN:.0%} to spare "
            "(estimated)."
        )
    elif largest >= LARGEST // step * step:
        text += f"{largest} images per device fit; --fit tries no more."
    elif largest:
        text += (
            f"{largest} images per device are the most that fit with {MARGIN:.0%} to spare, "
            f"within {CLOSE:.0%}."
        )
    else:
        text += f"Not even {step} images per device fit."
    rows = [(_MEMORY_NAMES[name], _gib(getattr(memory, name))) for name in Memory._fields]
    return Section("Memory of a device", text, ("", "GiB"), [*rows, ("all", _gib(memory.total))])


def _speed(compiled: Compiled) -> Section:
    kernels, collectives = costs.floor_seconds(compiled)
    found, facts = costs.speed(compiled), compiled.target.device.facts
    floor = f"Floor of the kernels {_ms(kernels)} ms"
    if compiled.target.num_devices > 1:
        floor += f", of the collectives {_ms(collectives)} ms (counted in full: not overlapped)"
    if found.low is None:
        estimate = (
            f"At most {found.bound:,.0f} images per second; nothing was measured on such a device, "
            "so how near a step comes to the floor is not known."
        )
    else:
        low, high = facts["reached"].value
        estimate = (
            f"Estimated {found.low:,.0f} to {found.high:,.0f} images per second: floors were "
            f"{low:g} to {high:g} of the measured times ({facts['reached'].source})."
        )
    loops = compiled.program.unknown_loops
    counted = f" {loops} loops have an unknown number of rounds and count once." if loops else ""
    own = ""
    if compiled.xla:
        own = (
            f" By the compiler's own count, with loops once: {compiled.xla.get('flops', 0):.3g} "
            f"operations, {compiled.xla.get('bytes accessed', 0) / 1e9:.1f} GB."
        )
    return Section("Speed", f"{floor}. {estimate}{counted}{own}")


def _parts(compiled: Compiled) -> Section:
    facts = compiled.target.device.facts
    bandwidth, launch = facts["bandwidth"], facts["launch"]
    products = compiled.target.device.products["bfloat16"]
    starts = f"a launch ({1e6 * launch.value:g} us; {launch.source}), " if launch.value else ""
    text = (
        f"A kernel takes at least {starts}its bytes at {bandwidth.value / 1e12:g} TB/s "
        f"({bandwidth.source}), its products at {products.value / 1e12:g} TFLOP/s in bfloat16 "
        f"({products.source}){_instructions(compiled)}, whichever is longest; the last column says "
        "which it is for most of the time."
    )
    rows = costs.by_part(compiled)
    cells = [_cost_cells(row) for row in [*rows, costs.total(rows)]]
    return Section("Parts", text, ("", *_COST_COLUMNS), cells)


def _instructions(compiled: Compiled) -> str:
    """Returns the sentence about the instructions of kernels; empty for a TPU."""
    device = compiled.target.device
    if not device.lanes:
        return ""
    clock = device.facts["clock"]
    return (
        f", and the instructions of its threads on {device.multiprocessors} multiprocessors at "
        f"{clock.value / 1e9:g} GHz ({clock.source}), where it is no library's"
    )


def _layers(compiled: Compiled) -> Section:
    rows = [row for row in costs.by_layer(compiled)[:_LAYERS] if row.seconds]
    columns = ("layer and operation", *_COST_COLUMNS)
    return Section("Costliest operations", "", columns, [_cost_cells(row) for row in rows])


_COST_COLUMNS = ("launches", "GB", "TFLOP", "floor ms", "bound by")


def _cost_cells(row: costs.Cost) -> tuple[str, ...]:
    gigabytes, operations = _short(row.bytes / 1e9), f"{row.operations / 1e12:.3f}"
    limit = row.limit if row.seconds else ""
    return row.name, f"{row.launches:,}", gigabytes, operations, _ms(row.seconds), limit


def _collectives(compiled: Compiled) -> Section:
    rows = costs.by_purpose(compiled)
    if not rows:
        return Section("Collectives", "None.")
    cells = [(row.name, row.kind, f"{row.count:,}", f"{row.bytes / 1e6:.3f}") for row in rows]
    sums = sum(row.count for row in rows), sum(row.bytes for row in rows)
    cells.append(("all", "", f"{sums[0]:,}", f"{sums[1] / 1e6:.3f}"))
    text = "A collective that serves several purposes counts for its first one."
    return Section("Collectives", text, ("", "kind", "number", "MB"), cells)


def _misfits(compiled: Compiled) -> Section:
    if not compiled.misfits:
        return Section("Kernels that cannot take their arguments", "None.")
    cells = [
        (misfit.operator, misfit.reason, " ".join(map(str, misfit.shapes[:3])))
        for misfit in compiled.misfits
    ]
    text = "The default form runs in their place."
    columns = ("operator", "reason", "first shapes")
    return Section("Kernels that cannot take their arguments", text, columns, cells)


def _gib(size: float) -> str:
    return _short(size / 2**30)


def _ms(seconds: float) -> str:
    return _short(1e3 * seconds)


def _short(number: float) -> str:
    return f"{number:.2f}" if number >= 0.1 or not number else f"{number:.2g}"


# ------------------------------------------------------------------------------------------------
# Formats
# ------------------------------------------------------------------------------------------------


def _markdown(section: Section) -> str:
    lines = [f"## {section.title}", *(["", section.text] if section.text else [])]
    if section.columns:
        table = [section.columns, ["---"] * len(section.columns), *section.rows]
        lines += ["", *(f"| {' | '.join(row)} |" for row in table)]
    return "\n".join(lines)


def _plain(section: Section) -> str:
    lines = [section.title, *([f"  {section.text}"] if section.text else [])]
    if section.columns:
        table = [section.columns, *section.rows]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        # Texts are aligned to the left, numbers to the right.
        aligned = ["<" if _is_text(column) else ">" for column in zip(*section.rows, strict=True)]
        for row in table:
            cells = zip(row, aligned, widths, strict=True)
            lines.append("  " + "  ".join(f"{cell:{side}{width}}" for cell, side, width in cells))
    return "\n".join(line.rstrip() for line in lines)


def _is_text(cells: Sequence[str]) -> bool:
    return not all(cell.replace(",", "").replace(".", "").isdigit() for cell in cells if cell)
