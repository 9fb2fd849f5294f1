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
from tokenvit_jax.pictures.draw import color_labels, distinct_colors, show_image
from tokenvit_jax.tasks.segmentation.inference import class_shares
from tokenvit_jax.tasks.task import Picture


def superpixels_of(model: nn.Module, variables: Any, images: jax.Array) -> Any:
    """Returns the superpixels of images (B, H, W, 3), normalised; None: nothing is clustered."""
    return tokens.superpixels(backbone_of(model), backbone_variables(model, variables), images)


def draw(
    image: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    window: np.ndarray,
    superpixels: Callable[[], Any],
    caption: str,
) -> dict[str, Picture]:
    """Returns the pictures of one image by name.

    Args:
      image: (H, W, 3) uint8.
      labels: (H, W) uint8.
      names: names of the classes.
      window: (S, S, 3) uint8, the part of the resized image whose superpixels are shown.
      superpixels: function that returns the superpixels of the window, or None.
      caption: name of the image.

    Returns:
      "segmentation" and "labels", and "superpixels" if the model clusters its tokens.
    """
    drawn = {
        "segmentation": plot_segmentation(image, labels, names),
        "labels": label_image(labels, len(names)),
    }
    clustering = jax.device_get(superpixels())
    if clustering is not None:
        drawn["superpixels"] = tokens.plot_superpixels(window, clustering, caption)
    return drawn


def plot_segmentation(image: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> Figure:
    """Draws an image, its label map over it, and the fraction of the pixels of each class.

    Args:
      image: (H, W, 3) uint8.
      labels: (H, W) int.
      names: names of all classes.
    """
    shares = class_shares(labels)
    columns = -(-len(shares) // 14)  # 14 names fit below each other
    panel = 3.2 * image.shape[1] / image.shape[0]
    size = (2 * panel + 0.2 + 1.9 * columns, 3.2)
    figure = Figure(figsize=size, layout="constrained")
    widths = (panel, panel, 1.9 * columns)
    image_axis, label_axis, legend_axis = figure.subplots(1, 3, width_ratios=widths)
    show_image(image_axis, image)
    show_image(label_axis, color_labels(image, labels, len(names)))
    colors = distinct_colors(len(names)) / 255
    legend_axis.axis("off")
    legend_axis.legend(
        handles=[
            Patch(color=colors[label], label=f"{names[label]}: {share:.1%}")
            for label, share in shares
        ],
        loc="center left", ncols=columns, fontsize=8, frameon=False,
    )  # fmt: skip
    return figure


def label_image(labels: np.ndarray, num_classes: int) -> Image.Image:
    """Returns a label map (H, W) as a palette image whose pixels are the labels."""
    image = Image.fromarray(labels.astype(np.uint8))
    image.putpalette(distinct_colors(num_classes).tobytes())
    return image
