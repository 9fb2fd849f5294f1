"""Makes the models of dense tasks ready for `measure.models`, with a batch and the loss."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from tokenvit_jax.measure.models import Kind, Subject, Work
from tokenvit_jax.measure.torchvision_peers import OBJECTS, random_objects, torchvision_work
from tokenvit_jax.measure.transformers_peers import SEGMENTS, striped_segments, transformers_work
from tokenvit_jax.tasks import Task, create_task
from tokenvit_jax.training.step import add_sown


def task_kind(recipe: Callable[[str], ConfigDict], package: str = "transformers") -> Kind:
    """Returns how the models of a dense task and their peers are timed.

    The training step has the loss of the recipe; the batch is prepared before it.

    Args:
      recipe: configuration from the name of a model.
      package: Python package of the peers, "transformers" or "torchvision".
    """
    peers = {"transformers": transformers_work, "torchvision": torchvision_work}
    return Kind(functools.partial(_subject, recipe), peers[package], package)


def _subject(recipe, name, dtype, **overrides: Any):
    config = recipe(name)
    config.dtype = dtype.name
    config.model_overrides.update(overrides)
    model = create_task(config).make_model()
    return Subject(model, functools.partial(_work, config, model))


def _work(config, model, image_size, batch_size):
    config.image_size = image_size
    task = create_task(config)
    batch = random_batch(task, batch_size)
    inputs = jax.jit(task.prepare)(batch, jax.random.key(0))
    rngs = {name: jax.random.key(1) for name in ("batch", "dropout", "routing", "sample")}

    def loss(params, state, images, targets):
        inputs = {"image": images, **targets}
        loss, aux = add_sown(*task.loss(model, params, state, inputs, rngs))
        return loss, (aux.metrics, aux.model_state)

    return Work(inputs.pop("image"), inputs, loss)


def random_batch(task: Task, batch_size: int) -> dict[str, jax.Array]:
    """Returns a training batch of random numbers.

    Images are drawn from 0 to 255, other whole numbers below the number of classes, and floats,
    such as depths [m], from 1 to 2. Of the places for objects or segments, the first ones are
    taken, and their images fill the canvas.

    Args:
      task: gives names, shapes and types.
      batch_size: number of images.
    """
    draw = np.random.default_rng(1)

    def array(name, shape, dtype):
        shape = (batch_size, *shape)
        if not np.issubdtype(dtype, np.integer):
            return draw.uniform(1, 2, shape).astype(dtype)
        return draw.integers(
            256 if name == "image" else task.info.num_classes, size=shape, dtype=dtype
        )

    specs = task.examples(train=True).specs
    batch = {name: array(name, *spec) for name, spec in specs.items()}
    if "boxes" in batch:
        size = batch["image"].shape[1:3]
        batch["index"] = np.arange(batch_size, dtype=np.int32)
        batch["image_size"][:] = size
        batch["boxes"][:, :OBJECTS] = random_objects(batch_size, size)
        batch["classes"][:, OBJECTS:] = -1
        batch["objects_left_out"][:] = 0
        if "masks" in batch:
            batch["masks"][:] = 255  # all of the box
    if "segments" in batch:
        batch["index"] = np.arange(batch_size, dtype=np.int32)
        batch["segments"][:] = striped_segments(batch["image"].shape[1:3])
        batch["classes"][:, SEGMENTS:] = -1
        batch["segments_left_out"][:] = 0
    return {name: jnp.asarray(x) for name, x in batch.items()}
