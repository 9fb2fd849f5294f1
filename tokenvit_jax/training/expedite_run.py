"""Makes a trained run faster: searches a setting of Expedite for it and writes the faster run."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from tokenvit_jax.data import eval_batches, open_split
from tokenvit_jax.errors import UserError
from tokenvit_jax.expediting.candidates import list_candidates
from tokenvit_jax.expediting.search import Found, check_budget, search_budget
from tokenvit_jax.expediting.similarity import Comparison, measured
from tokenvit_jax.models.backbone import backbone_of
from tokenvit_jax.models.expedite import AUTO, Expedite
from tokenvit_jax.tasks import Task, create_task
from tokenvit_jax.tasks.task import middle_window
from tokenvit_jax.training.new_run import write_run
from tokenvit_jax.training.run import load_run
from tokenvit_jax.training.workdir import read_config

NUM_IMAGES = 8  # images on which features are compared and distances are measured


class Search(NamedTuple):
    """The result of a search on a run.

    Attributes:
      config: configuration of the run.
      variables: variables of the run's model.
      num_candidates: number of settings that could be tried.
      num_images: number of images whose features were compared.
      found: the settings that were tried, and the chosen one.
    """

    config: ConfigDict
    variables: Any
    num_candidates: int
    num_images: int
    found: Found


def search_run(
    workdir: Path,
    budget: float,
    of: str,
    *,
    images: Iterable[Image.Image] | None,
    num_images: int,
    checkpoint: str,
) -> Search:
    """Searches for the setting within a budget that changes the features of a run least.

    Args:
      workdir: folder of the run of a plain model.
      budget: fraction of the model's cost, between 0 and 1.
      of: "macs" | "latency", the cost that the budget limits.
      images: RGB images whose features are compared; None: images of the evaluation split.
      num_images: number of images of the evaluation split.
      checkpoint: "last", "best" or a step.

    Raises:
      UserError: the budget is not valid or cannot be reached, the model cannot be expedited, there
        is no such checkpoint, or the dataset is missing.
    """
    check_budget(budget)
    config = read_config(workdir)
    task = create_task(config)
    try:
        candidates = list_candidates(task.make_model(), task.view_size, task.input_shape[-1])
    except UserError as error:
        raise UserError(f"--workdir={workdir}: {error}") from error
    batch = load_images(task, images, num_images)
    run = load_run(workdir, checkpoint, config=config)
    found = search_budget(candidates, budget, of, run.model, run.variables, batch)
    return Search(config, run.variables, len(candidates), len(batch), found)


def write_expedited(out: Path, search: Search) -> None:
    """Writes a run at step 0 with the weights of the searched run and the chosen setting.

    Args:
      out: folder of the new run, without checkpoints.
      search: result of :func:`search_run`.
    """
    config = expedited_config(search.config, search.found.chosen.expedite)
    write_run(out, config, search.variables)


def with_measured_temperature(workdir: Path, checkpoint: str, config: ConfigDict) -> ConfigDict:
    """Returns a configuration whose temperature of Expedite is a number instead of "auto".

    The distances of tokens are measured on the first images of the evaluation split.

    Args:
      workdir: folder of the run whose weights are used.
      checkpoint: "last", "best" or a step.
      config: configuration of the run, with or without a setting of Expedite.

    Raises:
      UserError: the setting does not fit the model, there is no such checkpoint, or the dataset is
        missing.
    """
    task = create_task(config)
    expedite = getattr(backbone_of(task.make_model()).settings, "expedite", None)
    if not expedite or expedite.temperature != AUTO or not expedite.alpha:
        return config
    run = load_run(workdir, checkpoint, config=config)
    images = load_images(task, None, NUM_IMAGES)
    distance = Comparison(run.model, run.variables, images).distance(expedite.alpha)
    return expedited_config(config, measured(expedite, distance))


def load_images(task: Task, images: Iterable[Image.Image] | None, num_images: int) -> jax.Array:
    """Returns images (B, H, W, C), cropped and normalised as the model of a run sees them.

    Args:
      task: task of the run.
      images: RGB images; None: the first images of the evaluation split, of which a model that
        predicts in windows gets the middle window.
      num_images: number of images of the evaluation split.

    Raises:
      UserError: the dataset is missing.
    """
    if images is None:
        arrays = _eval_images(task, num_images)
    else:
        arrays = [task.view(image) for image in images]
    return task.normalize(jnp.asarray(np.stack(arrays)))


def _eval_images(task, num_images):
    config, window, images = task.config.copy_and_resolve_references(), task.view_size, []
    config.data.workers = 0
    source = open_split(config, task.info.eval_split)
    for batch in eval_batches(source, task.examples(train=False), config):
        sizes = batch.get("image_size", [batch["image"].shape[1:3]] * len(batch["image"]))
        for image, size, counts in zip(batch["image"], sizes, batch["mask"], strict=True):
            if counts:
                images.append(middle_window(image, size, window))
            if len(images) == num_images:
                return images
    return images


def expedited_config(config: ConfigDict, expedite: Expedite) -> ConfigDict:
    """Returns a copy of a configuration with a setting of Expedite."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.model_overrides.expedite = dataclasses.asdict(expedite)
    return config
