"""Draws the learning curves of a run."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from tokenvit_jax.errors import UserError
from tokenvit_jax.pictures.draw import COLORS


def plot_learning_curve(records: Sequence[Mapping[str, float]]) -> Figure:
    """Draws the logged training loss and evaluation accuracy over steps.

    Args:
      records: lines of a run's `metrics.jsonl`: "step" with "loss" or "eval/accuracy".

    Raises:
      UserError: neither "loss" nor "eval/accuracy" was logged.
    """
    curves = [
        ("training loss", COLORS[0], [(r["step"], r["loss"]) for r in records if "loss" in r]),
        (
            "evaluation accuracy, %",
            COLORS[1],
            [(r["step"], 100 * r["eval/accuracy"]) for r in records if "eval/accuracy" in r],
        ),
    ]
    curves = [curve for curve in curves if curve[2]]
    if not curves:
        raise UserError("no learning curve: neither 'loss' nor 'eval/accuracy' was logged")
    figure = Figure(figsize=(4 * len(curves), 3), layout="constrained")
    axes = figure.subplots(1, len(curves), sharex=True, squeeze=False)[0]
    for axis, (title, color, points) in zip(axes, curves, strict=True):
        axis.plot(*zip(*points, strict=True), color=color, marker="o", markersize=3)
        axis.set_title(f"{title} (last: {points[-1][1]:.3g})", fontsize=10)
        axis.set(xlabel="step", xlim=(0, None))
        axis.grid(color="0.92")
        axis.spines[["top", "right"]].set_visible(False)
    return figure
