"""Prints and draws measurements."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def format_results(rows: list[dict[str, Any]], environment: Mapping[str, Any], form: str) -> str:
    """Formats measurements and the environment that they hold for.

    Args:
      rows: result of :func:`tokenvit_jax.measure.models.benchmark_models` or
        :func:`tokenvit_jax.measure.operators.benchmark_operator`.
      environment: versions and device.
      form: "table" | "json".
    """
    if form == "json":
        return json.dumps({"environment": environment, "results": rows}, indent=2)
    found = ", ".join(f"{key} {value}" for key, value in environment.items())
    return f"{found}\n{format_table(rows)}"


def format_table(rows: list[dict[str, Any]]) -> str:
    """Formats rows as a table; contenders show median milliseconds and MiB.

    The first row names the columns; what another one lacks is "-".
    """
    flat = []
    for row in rows:
        cells = {key: value for key, value in row.items() if key != "contenders"}
        contenders = row.get("contenders", {})
        cells |= {f"{name} ms": timing["median_ms"] for name, timing in contenders.items()}
        cells |= {f"{name} MiB": timing["temp_mib"] for name, timing in contenders.items()}
        flat.append({key: format_value(value) for key, value in cells.items()})
    lines = [[*flat[0]], *([cells.get(key, "-") for key in flat[0]] for cells in flat)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def markdown_table(columns: Sequence[Any], rows: Iterable[Iterable[Any]]) -> list[str]:
    """Returns the lines of a table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return [f"| {' | '.join(map(str, line))} |" for line in lines]


def format_value(value: Any) -> str:
    """Returns a measured value with three digits, and "-" for None."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if value < 100 else f"{value:.0f}"
    return str(value)


def plot_cost(rows: list[dict[str, Any]]):
    """Draws time over sequence length, and the speed-up with the one that Eq. 7 of DGT promises.

    Args:
      rows: results of :func:`tokenvit_jax.measure.operators.group_attention_cases`.

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
