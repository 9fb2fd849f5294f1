"""Loads a trained model with its configuration, task and variables: `load_run`."""

import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict
from PIL import Image

from tokenvit_jax.data import read_image
from tokenvit_jax.errors import UserError
from tokenvit_jax.models.backbone import backbone_of, backbone_variables
from tokenvit_jax.tasks import Task, create_task
from tokenvit_jax.training.checkpoint import load_variables
from tokenvit_jax.training.exporting import write_export
from tokenvit_jax.training.workdir import read_config

ImageLike = str | Path | Image.Image | np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A checkpoint of a run, ready to use.

    Attributes:
      config: configuration of the run.
      task: task of the run, see `tokenvit_jax.tasks.Task`.
      model: linen module.
      variables: variables for ``model.apply``, as numpy arrays; the parameters are averaged if the
        run kept averages.
      step: training step of the checkpoint.
    """

    config: ConfigDict
    task: Task
    model: nn.Module
    variables: dict[str, Any]
    step: int

    def predict(self, images: ImageLike | Iterable[ImageLike]) -> list[dict[str, np.ndarray]]:
        """Returns the predictions for images of any size, one dictionary of arrays per image.

        Args:
          images: paths, PIL images or uint8 arrays (H, W, 3), or a single one of these.

        Returns:
          Classification: "probabilities" (num_classes,). Segmentation: "labels" (H, W) uint8.

        Raises:
          UserError: a file cannot be read, or an array has another shape or type.
        """
        if isinstance(images, ImageLike) and getattr(images, "ndim", 3) == 3:
            images = [images]
        return [self.predictor(_as_image(image)).arrays for image in images]

    def features(self, images: np.ndarray) -> list[jax.Array]:
        """Returns the maps of the backbone, (B, h, w, C) each, the finest first.

        Args:
          images: (B, H, W, 3) uint8; height and width are at least 32.

        Raises:
          UserError: the images have another shape or type.
        """
        images = np.asarray(images)
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise UserError(
                f"images are {images.dtype}{images.shape}; valid: uint8 (batch, height, width, 3)"
            )
        return self._features(self._device_variables, images)

    def export(self, out: str | Path) -> None:
        """Writes the model as a folder that runs without this package, see `docs/export.md`.

        Args:
          out: the new folder: the model for any number of images, its weights, and a description.

        Raises:
          UserError: something exists at the path, or it cannot be written.
        """
        write_export(Path(out).expanduser(), self.task, self.model, self.variables, self.step)

    @functools.cached_property
    def predictor(self):
        """Maps an RGB image to its `tasks.Prediction`: arrays, text and pictures."""
        return self.task.predictor(self.model, self._device_variables)

    @functools.cached_property
    def _device_variables(self):
        return jax.device_put(self.variables)

    @functools.cached_property
    def _features(self):
        backbone = backbone_of(self.model)

        @jax.jit
        def features(variables, images):
            variables = backbone_variables(self.model, variables)
            images = self.task.normalize(images)
            return backbone.apply(variables, images, train=False, method="features")

        return features


def load_run(
    workdir: str | Path,
    checkpoint: str | int = "last",
    *,
    config: ConfigDict | None = None,
    axis_name: str | None = None,
) -> Run:
    """Loads a checkpoint of a run with its configuration, task and model.

    Args:
      workdir: folder of a training run, or of a run that `convert` or `expedite` wrote.
      checkpoint: "last", "best" (highest score of the task) or a step.
      config: configuration that replaces the run's own; None: the run's own.
      axis_name: axis of `jax.pmap` over which a batch will be split; None under `jax.jit`.

    Raises:
      UserError: there is no such run or checkpoint, the checkpoint cannot be read, or it does not
        fit the configuration.
    """
    workdir = Path(workdir).expanduser()
    config = read_config(workdir) if config is None else config
    task = create_task(config, axis_name)
    model = task.make_model()
    found = load_variables(model, config.image_size, workdir, str(checkpoint))
    return Run(config, task, model, found.variables, found.step)


def _as_image(image: ImageLike) -> Image.Image:
    if isinstance(image, str | Path):
        return read_image(Path(image))
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    array = np.asarray(image)
    if array.ndim != 3 or array.shape[-1] != 3 or array.dtype != np.uint8:
        raise UserError(f"image is {array.dtype}{array.shape}; valid: uint8 (height, width, 3)")
    return Image.fromarray(array)
