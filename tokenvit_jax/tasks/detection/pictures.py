"""Draws detections over the image: masks, boxes, classes and scores."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from tokenvit_jax.pictures.draw import (
    PLAIN,
    as_rgb,
    distinct_colors,
    panel_aspect,
    show_image,
    write_title,
)
from tokenvit_jax.tasks.task import NUM_NAMED, Picture

SHOWN_SCORE = 0.3  # least score of a detection that a picture and a text show
_OPACITY = 0.5  # of a mask
_HEIGHT = 4.5  # of the picture [inches]
_LABEL = 0.035  # height of a label, as a fraction of the picture


def describe(names: Sequence[str], classes: np.ndarray, scores: np.ndarray) -> str:
    """Returns a line with the number of detections of the most frequent classes.

    Args:
      names: names of all classes.
      classes: class of every detection (n,).
      scores: their scores (n,); those below :data:`SHOWN_SCORE` are left out.
    """
    counts = Counter(names[label] for label in classes[scores >= SHOWN_SCORE])
    found = [f"{count} x {name}" for name, count in counts.most_common(NUM_NAMED)]
    more = f", {len(counts) - NUM_NAMED} more classes" if len(counts) > NUM_NAMED else ""
    return ", ".join(found) + more if found else f"nothing with a score from {SHOWN_SCORE} on"


def draw(
    image: np.ndarray, found: Mapping[str, np.ndarray], names: Sequence[str], caption: str
) -> dict[str, Picture]:
    """Returns the picture "detections" of one image.

    Args:
      image: (H, W, C) uint8.
      found: "boxes" (n, 4) [x1 y1 x2 y2, pixels], "classes" (n,), "scores" (n,), and perhaps
        "masks" (n, H, W) bool.
      names: names of all classes.
      caption: title of the picture.
    """
    image = as_rgb(image)
    width = _HEIGHT * panel_aspect(image)
    figure = Figure(figsize=(width, _HEIGHT + 0.3), layout="constrained")
    axis = figure.subplots()
    shown = np.flatnonzero(found["scores"] >= SHOWN_SCORE)
    colors = distinct_colors(len(names))
    pixels = image.astype(np.float64)
    if "masks" in found:
        for i in shown[::-1]:  # the highest score is drawn last
            mask = found["masks"][i]
            color = colors[found["classes"][i]]
            pixels[mask] = (1 - _OPACITY) * pixels[mask] + _OPACITY * color
    show_image(axis, pixels.round().astype(np.uint8))
    for i in shown[::-1]:
        label = found["classes"][i]
        text = f"{names[label]} {found['scores'][i]:.2f}"
        _draw_box(axis, found["boxes"][i], text, colors[label] / 255)
    write_title(axis, caption, width)
    return {"detections": figure}


def _draw_box(axis: Axes, box: np.ndarray, text: str, color: np.ndarray) -> None:
    left, top, right, bottom = box - 0.5  # pixels are drawn around whole numbers
    axis.add_patch(
        Rectangle((left, top), right - left, bottom - top, fill=False, color=color, lw=1.2)
    )
    low, high = sorted(axis.get_ylim())
    above = top - low >= _LABEL * (high - low)  # otherwise the label would be cut off
    dark = color @ (0.299, 0.587, 0.114) < 0.5
    label = axis.text(
        left, top, text, fontsize=6, va="bottom" if above else "top",
        color="white" if dark else "black", clip_on=True, **PLAIN,
    )  # fmt: skip
    label.set_bbox({"facecolor": color, "edgecolor": "none", "pad": 0.8})
