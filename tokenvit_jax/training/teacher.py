"""Labels of the cells of an image from a trained model.

Source: Jiang et al., "All Tokens Matter", section "Token Labeling"; there the labels are computed
once, here as the student is trained, of the same augmented images.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from tokenvit_jax.data import dataset_info
from tokenvit_jax.data.token_labels import grid_size
from tokenvit_jax.errors import UserError
from tokenvit_jax.tasks import classification
from tokenvit_jax.training.checkpoint import load_variables
from tokenvit_jax.training.parallel import Parallel
from tokenvit_jax.training.step import normalize
from tokenvit_jax.training.workdir import read_config


class Teacher(NamedTuple):
    """A trained model that labels the cells of images.

    Attributes:
      config: of its run.
      num_classes: number of classes.
      variables: of its checkpoint, numpy arrays.
      label: `label(variables, images)`, from (B, H, W, 3) uint8 to class probabilities
        (B, h, w, num_classes) float32 at every place of its last map.
    """

    config: ConfigDict
    num_classes: int
    variables: dict[str, Any]
    label: Callable[[dict[str, Any], jax.Array], jax.Array]


def load_teacher(workdir: Path, checkpoint: str) -> Teacher:
    """Loads the model of a run.

    Args:
      workdir: folder of the run.
      checkpoint: "last", "best" (highest eval/accuracy) or a step.

    Raises:
      UserError: there is no such run or checkpoint, it cannot be read, or its model has no logits
        of single cells.
    """
    config = read_config(workdir)
    num_classes = dataset_info(config.dataset).num_classes
    model = classification.make_model(config, num_classes)
    if not hasattr(model, "dense_logits"):
        raise UserError(
            f"--workdir={workdir} is a run of {config.model}, which classifies no single cells; "
            "valid: a hierarchical model"
        )
    variables = load_variables(model, config.image_size, workdir, checkpoint).variables

    def label(variables, images):
        images = normalize(images, config.data.normalization)
        logits = model.apply(variables, images, method="dense_logits")
        return jax.nn.softmax(logits.astype(jnp.float32))

    return Teacher(config, num_classes, variables, label)


def labelled_batches(
    config: ConfigDict, num_classes: int, parallel: Parallel
) -> Callable[[dict[str, np.ndarray]], dict[str, jax.Array]]:
    """Returns what moves a training batch to the devices: with a teacher, labels included.

    Args:
      config: reads `token_labels`.
      num_classes: of the student.
      parallel: how the batch lies on the devices.

    Returns:
      `parallel.put_batch` if there is no teacher, else a function that adds to its batch
      "token_labels", float32 class probabilities on the student's grid.

    Raises:
      UserError: the teacher cannot be loaded, or has other classes.
    """
    if not (config.token_labels.weight and config.token_labels.teacher):
        return parallel.put_batch
    workdir = config.token_labels.teacher
    try:
        teacher = load_teacher(Path(workdir).expanduser(), config.token_labels.teacher_checkpoint)
    except UserError as error:
        raise UserError(f"config.token_labels.teacher={workdir}: {error}") from error
    if teacher.num_classes != num_classes:
        raise UserError(
            f"config.token_labels.teacher={workdir} has {teacher.num_classes} classes "
            f"({teacher.config.dataset}), the student has {num_classes} ({config.dataset})"
        )

    def label(variables, images):
        return resize_labels(teacher.label(variables, images), *map(grid_size, images.shape[1:3]))

    label = parallel.batch_step(label)
    variables = parallel.put_variables(teacher.variables)

    def put_batch(batch):
        batch = parallel.put_batch(batch)
        return {**batch, "token_labels": label(variables, batch["image"])}

    return put_batch


def resize_labels(labels: jax.Array, height: int, width: int) -> jax.Array:
    """Returns maps of labels (B, h, w, K) on another grid, bilinear: (B, height, width, K)."""
    shape = (len(labels), height, width, labels.shape[-1])
    return jax.image.resize(labels, shape, "bilinear")
