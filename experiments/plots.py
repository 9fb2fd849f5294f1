"""Draws elements that the plots of the experiments share."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tokenvit_jax.pictures.draw import COLORS

GRID = "0.92"


def color(number: int) -> str:
    """Returns the colour of a curve by its number; colours repeat."""
    return COLORS[number % len(COLORS)]


def panels(
    count: int, *, width: float, height: float, grid: bool = False, **options: Any
) -> tuple[Figure, Sequence[Axes]]:
    """Returns a figure and its panels side by side, without lines at the top and the right.

    Args:
      count: number of panels.
      width: width of the figure [inches].
      height: height of the figure [inches].
      grid: whether to draw grid lines.
      **options: arguments of `Figure.subplots`.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False, **options)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        if grid:
            axis.grid(color=GRID)
    return figure, axes


def draw_seeds(axis: Axes, groups: Sequence[Sequence[float]], colors: Sequence[str]) -> None:
    """Draws a row of points for every group, one point per seed, with a bar at the mean.

    Args:
      axis: the panel.
      groups: values over seeds; the first group is the top row.
      colors: colour of each group.
    """
    for row, (values, own) in enumerate(zip(groups, colors, strict=True)):
        axis.plot(values, [row] * len(values), "o", color=own, alpha=0.6)
        axis.plot(np.mean(values), row, "|", color="black", markersize=13)
    axis.grid(axis="x", color=GRID)
    if not axis.yaxis_inverted():  # shared axes must be inverted only once
        axis.invert_yaxis()


def name_rows(axis: Axes, names: Sequence[str]) -> None:
    """Writes the names of the rows of :func:`draw_seeds` next to a panel."""
    axis.set_yticks(range(len(names)), names, fontsize=8)


def draw_band(axis: Axes, steps: np.ndarray, values: np.ndarray, own: str, **line: Any) -> None:
    """Draws a mean curve over steps, and a band from the lowest to the highest seed.

    Args:
      axis: the panel.
      steps: (n,).
      values: (seeds, n).
      own: colour.
      **line: arguments of `Axes.plot` for the curve.
    """
    axis.plot(steps, values.mean(0), color=own, **line)
    axis.fill_between(steps, values.min(0), values.max(0), color=own, alpha=0.15, lw=0)
