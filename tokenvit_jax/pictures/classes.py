"""Pictures of a classification."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from tokenvit_jax.pictures.draw import COLORS, show_image


def plot_classes(image: np.ndarray, classes: Sequence[tuple[str, float]]) -> Figure:
    """Draws an image and bars of its most probable classes.

    Args:
      image: (H, W, 3) uint8.
      classes: (name, probability) pairs, the most probable first.
    """
    figure = Figure(figsize=(6.4, 2.6), layout="constrained")
    image_axis, bar_axis = figure.subplots(1, 2, width_ratios=(1, 1.5))
    show_image(image_axis, image)
    names, probabilities = zip(*classes, strict=True)
    places = range(len(names), 0, -1)
    colors = [COLORS[1], *("0.75" for _ in names[1:])]
    bars = bar_axis.barh(places, probabilities, height=0.7, color=colors)
    bar_axis.bar_label(bars, [f"{p:.1%}" for p in probabilities], padding=3, fontsize=9)
    bar_axis.set_yticks(places, names)
    bar_axis.tick_params(axis="y", length=0)
    bar_axis.set(xlim=(0, 1.15), xticks=())
    bar_axis.spines[["top", "right", "bottom"]].set_visible(False)
    return figure
