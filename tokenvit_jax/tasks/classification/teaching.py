"""Labels that a trained classifier gives to training images."""

import os

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from tokenvit_jax.data.token_labels import grid_size
from tokenvit_jax.tasks.task import Task, Teacher

NO_CLASSIFIER = "which gives images no classes; valid: a run for classification"


def teacher_of(config: ConfigDict) -> Teacher | None:
    """Returns the run that a configuration names as its teacher; None if it names none."""
    for name in ("token_labels", "distillation"):
        entries = config[name]
        if entries.weight and entries.teacher:
            workdir = os.path.expanduser(entries.teacher)
            return Teacher(workdir, entries.teacher_checkpoint, f"{name}.teacher")
    return None


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
      images: (B, H, W, C) uint8.

    Returns:
      (B, h, w, num_classes) float32.
    """
    logits = model.apply(variables, teacher.normalize(images), method="dense_logits")
    return jax.nn.softmax(logits.astype(jnp.float32))


def resize_labels(labels: jax.Array, height: int, width: int) -> jax.Array:
    """Returns label maps (B, h, w, K) resized bilinearly to the grid of the student's cells.

    Args:
      labels: class probabilities.
      height: height of the images [pixels].
      width: width of the images [pixels].
    """
    shape = (len(labels), *grid_size((height, width)), labels.shape[-1])
    return jax.image.resize(labels, shape, "bilinear")


def label_images(teacher: Task, model: nn.Module, variables: dict, images: jax.Array) -> jax.Array:
    """Returns a teacher's logits (B, num_classes) in float32.

    Args:
      teacher: task of the teacher's run.
      model: its model.
      variables: variables of the model.
      images: (B, H, W, C), from 0 to 255.
    """
    logits = model.apply(variables, teacher.normalize(images), train=False)
    return logits.astype(jnp.float32)
