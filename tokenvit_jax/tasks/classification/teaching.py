"""Labels that a trained classifier gives to training images."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from tokenvit_jax.tasks.task import Task

NO_CLASSIFIER = "which gives images no classes; valid: a run for classification"


def cell_misfit(model: nn.Module) -> str:
    """Returns why a model cannot label single cells; "" if it can."""
    if hasattr(model, "dense_logits"):
        return ""
    return "which does not classify single cells; valid: a hierarchical model for classification"


def label_cells(teacher: Task, model: nn.Module, variables: dict, images: jax.Array) -> jax.Array:
    """Returns class probabilities for every cell of a teacher's last map.

    Args:
      teacher: task of the teacher's run.
      model: its model.
      variables: variables of the model.
      images: (B, H, W, 3) uint8.

    Returns:
      (B, h, w, num_classes) float32.
    """
    logits = model.apply(variables, teacher.normalize(images), method="dense_logits")
    return jax.nn.softmax(logits.astype(jnp.float32))


def resize_labels(labels: jax.Array, height: int, width: int) -> jax.Array:
    """Returns label maps (B, h, w, K) resized bilinearly to (B, height, width, K)."""
    shape = (len(labels), height, width, labels.shape[-1])
    return jax.image.resize(labels, shape, "bilinear")
