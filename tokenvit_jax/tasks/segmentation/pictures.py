"""Pictures of a segmentation model: label maps over the image, and superpixels."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from tokenvit_jax import pictures
from tokenvit_jax.models.backbone import backbone_of, backbone_variables
from tokenvit_jax.tasks.task import Picture


def superpixels_of(model: nn.Module, variables: Any, images: jax.Array) -> Any:
    """Returns the superpixels of images (B, H, W, 3), normalised; None: nothing is clustered."""
    return pictures.superpixels(backbone_of(model), backbone_variables(model, variables), images)


def draw(
    image: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    window: np.ndarray,
    superpixels: Callable[[], Any],
    caption: str,
) -> dict[str, Picture]:
    """Returns the pictures of one image by kind.

    Args:
      image: (H, W, 3) uint8.
      labels: (H, W) uint8.
      names: names of the classes.
      window: (S, S, 3) uint8, the part of the resized image whose superpixels are shown.
      superpixels: returns the superpixels of the window, or None.
      caption: names the image.

    Returns:
      "segmentation" and "labels", and "superpixels" where the model clusters its tokens.
    """
    drawn = {
        "segmentation": pictures.plot_segmentation(image, labels, names),
        "labels": pictures.label_image(labels, len(names)),
    }
    clustering = jax.device_get(superpixels())
    if clustering is not None:
        drawn["superpixels"] = pictures.plot_superpixels(window, clustering, caption)
    return drawn
