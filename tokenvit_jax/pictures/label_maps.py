"""Draws label maps over the image, and writes them as images."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from tokenvit_jax.pictures.draw import (
    as_rgb,
    color_labels,
    distinct_colors,
    panel_aspect,
    show_image,
    shrink,
    write_title,
)


def class_shares(labels: np.ndarray) -> list[tuple[int, float]]:
    """Returns the labels that occur in a label map, with their shares of the pixels, largest first.

    Args:
      labels: (H, W) integers.
    """
    found, counts = np.unique(labels, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [(int(found[i]), float(counts[i] / labels.size)) for i in order]


def plot_segmentation(
    image: np.ndarray, labels: np.ndarray, names: Sequence[str], caption: str
) -> Figure:
    """Draws an image, its label map over it, and the fraction of the pixels of each class.

    Args:
      image: (H, W, 3) uint8.
      labels: (H, W) int.
      names: names of all classes.
      caption: title of the image.
    """
    shares = class_shares(labels)
    columns = -(-len(shares) // 14)  # 14 names fit below each other
    panel = 3.2 * panel_aspect(image)
    size = (2 * panel + 0.2 + 1.9 * columns, 3.4)
    figure = Figure(figsize=size, layout="constrained")
    widths = (panel, panel, 1.9 * columns)
    image_axis, label_axis, legend_axis = figure.subplots(1, 3, width_ratios=widths)
    image, labels = shrink(image), shrink(labels)
    show_image(image_axis, image)
    write_title(image_axis, caption, panel)
    show_image(label_axis, color_labels(image, labels, len(names)))
    write_title(label_axis, "prediction", panel)
    colors = distinct_colors(len(names)) / 255
    legend_axis.axis("off")
    legend = legend_axis.legend(
        handles=[Patch(color=colors[label]) for label, _ in shares],
        labels=[f"{names[label]}: {share:.1%}" for label, share in shares],
        title="share of the pixels", title_fontsize=8, alignment="left",
        loc="center left", ncols=columns, fontsize=8, frameon=False,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def draw_label_map(
    image: np.ndarray, labels: np.ndarray, names: Sequence[str], caption: str
) -> dict[str, Figure | Image.Image]:
    """Returns the pictures of a label map by name: "segmentation" and "labels".

    Args:
      image: (H, W, C) uint8.
      labels: (H, W) int.
      names: names of all classes.
      caption: name of the image.
    """
    return {
        "segmentation": plot_segmentation(as_rgb(image), labels, names, caption),
        "labels": label_image(labels, len(names)),
    }


def label_image(labels: np.ndarray, num_classes: int) -> Image.Image:
    """Returns a label map (H, W) as a palette image whose pixels are the labels."""
    image = Image.fromarray(labels.astype(np.uint8))
    image.putpalette(distinct_colors(num_classes).tobytes())
    return image
