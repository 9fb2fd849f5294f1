"""Draws the most probable classes of a classifier and how the model groups its tokens."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from matplotlib.figure import Figure

from tokenvit_jax.pictures import tokens
from tokenvit_jax.pictures.draw import COLORS, show_image
from tokenvit_jax.tasks.task import NUM_NAMED


def noted_by(
    model: nn.Module, variables: Any, images: jax.Array, intermediates: dict[str, Any]
) -> dict[str, Any]:
    """Returns the arrays that the pictures of tokens show, with a leading axis B.

    Args:
      model: classifier.
      variables: variables of the model.
      images: (B, H, W, 3), normalised.
      intermediates: the model's collection "intermediates" for these images.

    Returns:
      The intermediates; also "superpixels" if the model clusters its tokens by `expedite`.
    """
    found = tokens.superpixels(model, variables, images)
    return intermediates if found is None else {**intermediates, "superpixels": found}


def draw(
    pixels: np.ndarray, classes: Sequence[tuple[str, float]], noted: dict[str, Any], caption: str
) -> dict[str, Figure]:
    """Returns the pictures of one image by name.

    Args:
      pixels: (S, S, 3) uint8, the image as the model saw it.
      classes: (name, probability) pairs, the most probable first; empty: the model has no classes.
      noted: result of :func:`noted_by` for this image.
      caption: name of the image.

    Returns:
      "classes" if there are any, and "groups", "clusters" or "superpixels" if the model has them.
    """
    figures = {"classes": plot_classes(pixels, classes[:NUM_NAMED])} if classes else {}
    return figures | draw_tokens(pixels, jax.device_get(noted), caption)


def draw_tokens(pixels: np.ndarray, noted: dict[str, Any], caption: str) -> dict[str, Figure]:
    """Returns the pictures of the groups or clusters of an image's tokens; see :func:`draw`."""
    figures, size = {}, pixels.shape[:2]
    routing = tokens.finest_routing(noted, size)
    if routing is not None:
        figures["groups"] = tokens.plot_groups(pixels[None], routing, [caption])
    clusterings = tokens.stage_clusterings(noted, size)
    if clusterings:
        figures["clusters"] = tokens.plot_clusters(pixels, clusterings, caption)
    if "superpixels" in noted:
        figures["superpixels"] = tokens.plot_superpixels(pixels, noted["superpixels"], caption)
    return figures


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
