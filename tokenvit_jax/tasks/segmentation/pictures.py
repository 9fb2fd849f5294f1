"""Draws the label maps of a segmentation model over the image, and its superpixels."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from tokenvit_jax.models.backbone import backbone_of, backbone_variables
from tokenvit_jax.pictures import tokens
from tokenvit_jax.pictures.draw import as_rgb
from tokenvit_jax.pictures.label_maps import draw_label_map
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
    drawn = draw_label_map(image, labels, names, caption)
    clustering = jax.device_get(superpixels())
    if clustering is not None:
        drawn["superpixels"] = tokens.plot_superpixels(
            as_rgb(window), clustering, caption, window_size
        )
    return drawn
