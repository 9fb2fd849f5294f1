"""Labels training images with a trained model, the teacher.

A teacher gives class probabilities to cells (token labels) or logits to whole images
(distillation); the task says which. It sees the images of the training step, after all augmentation
and mixing.

References:
  Jiang et al. 2021, "All Tokens Matter", section "Token Labeling". The paper computes the labels
  once; here they are computed during training, from the same augmented images.
  Touvron et al. 2021, "Training data-efficient image transformers & distillation through
  attention".
"""

import os
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from flax import linen as nn

from tokenvit_jax.errors import UserError, blame
from tokenvit_jax.tasks import Task, create_task
from tokenvit_jax.training.devices import Parallel
from tokenvit_jax.training.run import Run, load_run
from tokenvit_jax.training.state import step_rngs
from tokenvit_jax.training.workdir import read_config


def load_teacher(workdir: Path, checkpoint: str, misfit: Callable[[Task, nn.Module], str]) -> Run:
    """Loads a run that labels images.

    Args:
      workdir: folder of the run.
      checkpoint: "last", "best" (highest score of the task) or a step.
      misfit: function of the run's task and model: why they cannot label the images, or "".

    Raises:
      UserError: there is no such run or checkpoint, the checkpoint cannot be read, or the model
        does not give the labels.
    """
    config = read_config(workdir)
    task = create_task(config)
    if reason := misfit(task, task.make_model()):
        raise UserError(
            f"--workdir={workdir} is a run of {config.model} for {config.task}, {reason}"
        )
    return load_run(workdir, checkpoint, config=config)


def taught_batches(
    task: Task, parallel: Parallel
) -> Callable[[dict[str, np.ndarray], int], dict[str, jax.Array]]:
    """Returns a function that moves a training batch to the devices, with a teacher's labels.

    Args:
      task: task of the student; its `teacher` is the run, if there is one.
      parallel: places batches on the devices.

    Returns:
      A function of a batch and its step, from 0, which adds the entries of `task.teach`.

    Raises:
      UserError: the teacher cannot be loaded, or has other classes or channels than the student.
    """
    if task.teacher is None:
        return lambda batch, step: parallel.put_batch(batch)
    workdir, checkpoint, key = task.teacher
    path = Path(os.path.expanduser(workdir))
    try:
        teacher = load_teacher(path, checkpoint, task.misfit)
    except UserError as error:
        raise blame(error, f"--workdir={path}", f"config.{key}={workdir}") from error
    theirs, ours = teacher.task.info, task.info
    if not theirs.same_classes(ours):
        raise UserError(
            f"config.{key}={workdir} has {theirs.num_classes} classes ({theirs.name}), the student "
            f"has {ours.num_classes} ({ours.name}); valid: a teacher with the same classes"
        )
    if teacher.config.in_channels != task.config.in_channels:
        raise UserError(
            f"config.{key}={workdir} sees images with {teacher.config.in_channels} channels, the "
            f"student sees config.in_channels={task.config.in_channels}"
        )

    def teach(given, batch):
        variables, step = given
        rng, _ = step_rngs(task.config.seed, step)
        return task.teach(teacher.task, teacher.model, variables, batch, rng)

    teach = parallel.batch_step(teach)
    variables = parallel.put_variables(teacher.variables)

    def put_batch(batch, step):
        batch = parallel.put_batch(batch)
        return {**batch, **teach((variables, np.int32(step)), batch)}

    return put_batch
