"""Draws the label maps of a segmentation model over the image, and its superpixels."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from tokenvit_jax.models.backbone import backbone_of, backbone_variables
from tokenvit_jax.pictures import tokens
from tokenvit_jax.pictures.draw import (
    as_rgb,
    color_labels,
    distinct_colors,
    panel_aspect,
    show_image,
    shrink,
    write_title,
)
from tokenvit_jax.tasks.segmentation.inference import class_shares
from tokenvit_jax.tasks.task import Picture


def superpixels_of(model: nn.Module, variables: Any, images: jax.Array) -> Any:
    """Returns the superpixels of images (B, H, W, C), normalised; None: nothing is clustered."""
    return tokens.superpixels(backbone_of(model), backbone_variables(model, variables), images)


def draw(
    image: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    window: np.ndarray,
    window_size: tuple[int, int],
    superpixels: Callable[[], Any],
    caption: str,
) -> dict[str, Picture]:
    """Returns the pictures of one image by name.

    Args:
      image: (H, W, C) uint8.
      labels: (H, W) uint8.
      names: names of the classes.
      window: (h, w, C) uint8, the part of the resized image whose superpixels are shown, without
        padding.
      window_size: height and width of the window with padding [pixels].
      superpixels: function that returns the superpixels of the window, or None.
      caption: name of the image.

    Returns:
      "segmentation" and "labels", and "superpixels" if the model clusters its tokens.
    """
    drawn = {
        "segmentation": plot_segmentation(as_rgb(image), labels, names, caption),
        "labels": label_image(labels, len(names)),
    }
    clustering = jax.device_get(superpixels())
    if clustering is not None:
        drawn["superpixels"] = tokens.plot_superpixels(
            as_rgb(window), clustering, caption, window_size
        )
    return drawn


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


def label_image(labels: np.ndarray, num_classes: int) -> Image.Image:
    """Returns a label map (H, W) as a palette image whose pixels are the labels."""
    image = Image.fromarray(labels.astype(np.uint8))
    image.putpalette(distinct_colors(num_classes).tobytes())
    return image
