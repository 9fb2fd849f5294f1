"""Labels the cells of training images with a trained model, the teacher.

References:
  Jiang et al. 2021, "All Tokens Matter", section "Token Labeling". The paper computes the labels
  once; here they are computed during training, from the same augmented images.
"""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tokenvit_jax.data.token_labels import grid_size
from tokenvit_jax.errors import UserError
from tokenvit_jax.tasks import Task, create_task
from tokenvit_jax.training.devices import Parallel
from tokenvit_jax.training.run import Run, load_run
from tokenvit_jax.training.workdir import read_config


def load_teacher(workdir: Path, checkpoint: str) -> Run:
    """Loads a run whose model classifies single cells of an image; see :func:`label_cells`.

    Args:
      workdir: folder of the run.
      checkpoint: "last", "best" (highest eval/accuracy) or a step.

    Raises:
      UserError: there is no such run or checkpoint, the checkpoint cannot be read, or the model has
        no logits for single cells.
    """
    config = read_config(workdir)
    if not hasattr(create_task(config).make_model(), "dense_logits"):
        raise UserError(
            f"--workdir={workdir} is a run of {config.model} for {config.task}, which does not "
            "classify single cells; valid: a hierarchical model for classification"
        )
    return load_run(workdir, checkpoint, config=config)


def label_cells(teacher: Run, variables: dict, images: jax.Array) -> jax.Array:
    """Returns class probabilities for every cell of a teacher's last map.

    Args:
      teacher: result of :func:`load_teacher`.
      variables: variables of the teacher, on the devices.
      images: (B, H, W, C) uint8.

    Returns:
      (B, h, w, num_classes) float32.
    """
    images = teacher.task.normalize(images)
    logits = teacher.model.apply(variables, images, method="dense_logits")
    return jax.nn.softmax(logits.astype(jnp.float32))


def labelled_batches(
    task: Task, parallel: Parallel
) -> Callable[[dict[str, np.ndarray]], dict[str, jax.Array]]:
    """Returns a function that moves a training batch to the devices, with a teacher's labels.

    Args:
      task: task of the student; its `teacher` is the run, if there is one.
      parallel: places batches on the devices.

    Returns:
      `parallel.put_batch` if there is no teacher; otherwise a function that also adds
      "token_labels" to the batch, float32 class probabilities on the student's grid.

    Raises:
      UserError: the teacher cannot be loaded, or has other classes or channels than the student.
    """
    if task.teacher is None:
        return parallel.put_batch
    workdir, checkpoint = task.teacher
    try:
        teacher = load_teacher(Path(workdir).expanduser(), checkpoint)
    except UserError as error:
        raise UserError(f"config.token_labels.teacher={workdir}: {error}") from error
    theirs, ours = teacher.task.info, task.info
    if theirs.num_classes != ours.num_classes:
        raise UserError(
            f"config.token_labels.teacher={workdir} has {theirs.num_classes} classes "
            f"({theirs.name}), the student has {ours.num_classes} ({ours.name})"
        )

    if teacher.config.in_channels != task.config.in_channels:
        raise UserError(
            f"config.token_labels.teacher={workdir} sees images with {teacher.config.in_channels} "
            f"channels, the student sees config.in_channels={task.config.in_channels}"
        )

    def label(variables, images):
        labels = label_cells(teacher, variables, images)
        return resize_labels(labels, *grid_size(images.shape[1:3]))

    label = parallel.batch_step(label)
    variables = parallel.put_variables(teacher.variables)

    def put_batch(batch):
        batch = parallel.put_batch(batch)
        return {**batch, "token_labels": label(variables, batch["image"])}

    return put_batch


def resize_labels(labels: jax.Array, height: int, width: int) -> jax.Array:
    """Returns label maps (B, h, w, K) resized bilinearly to (B, height, width, K)."""
    shape = (len(labels), height, width, labels.shape[-1])
    return jax.image.resize(labels, shape, "bilinear")
