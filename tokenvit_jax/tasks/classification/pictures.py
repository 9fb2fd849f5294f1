"""Pictures of a classifier: the most probable classes, and what the model did with its tokens."""

from typing import Any

import flax.linen as nn
import jax
import numpy as np
from matplotlib.figure import Figure

from tokenvit_jax import pictures
from tokenvit_jax.tasks.task import NUM_NAMED


def noted_by(
    model: nn.Module, variables: Any, images: jax.Array, intermediates: dict[str, Any]
) -> dict[str, Any]:
    """Returns what the pictures of tokens show, as arrays that lead with B.

    Args:
      model: classifier.
      variables: its variables.
      images: (B, H, W, 3), normalised.
      intermediates: the model's collection "intermediates" for these images.

    Returns:
      The intermediates, and where the model clusters its tokens by `expedite` "superpixels".
    """
    found = pictures.superpixels(model, variables, images)
    return intermediates if found is None else {**intermediates, "superpixels": found}


def draw(
    pixels: np.ndarray, classes: list[tuple[str, float]], noted: dict[str, Any], caption: str
) -> dict[str, Figure]:
    """Returns the pictures of one image by kind.

    Args:
      pixels: (S, S, 3) uint8, as the model saw it.
      classes: (name, probability) pairs, the most probable first.
      noted: of :func:`noted_by`, for this image.
      caption: names the image.

    Returns:
      "classes", and "groups", "clusters" or "superpixels" where the model has them.
    """
    figures = {"classes": pictures.plot_classes(pixels, classes[:NUM_NAMED])}
    return figures | draw_tokens(pixels, jax.device_get(noted), caption)


def draw_tokens(pixels: np.ndarray, noted: dict[str, Any], caption: str) -> dict[str, Figure]:
    """Returns the pictures of what a model did with the tokens of an image; see :func:`draw`."""
    figures, size = {}, pixels.shape[:2]
    routing = pictures.finest_routing(noted, size)
    if routing is not None:
        figures["groups"] = pictures.plot_groups(pixels[None], routing, [caption])
    clusterings = pictures.stage_clusterings(noted, size)
    if clusterings:
        figures["clusters"] = pictures.plot_clusters(pixels, clusterings, caption)
    if "superpixels" in noted:
        figures["superpixels"] = pictures.plot_superpixels(pixels, noted["superpixels"], caption)
    return figures
