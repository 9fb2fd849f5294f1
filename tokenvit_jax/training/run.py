"""Loads a trained model with its configuration, task and variables: `load_run`."""

import dataclasses
import functools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict
from PIL import Image

from tokenvit_jax.data import from_array, read_image, to_rgb
from tokenvit_jax.errors import UserError
from tokenvit_jax.models.backbone import backbone_of, backbone_variables
from tokenvit_jax.tasks import Task, create_task
from tokenvit_jax.training.checkpoint import load_variables
from tokenvit_jax.training.compiled import keep_compiled
from tokenvit_jax.training.exporting import write_export
from tokenvit_jax.training.workdir import read_config

ImageLike = str | Path | Image.Image | np.ndarray
Batch = ImageLike | Iterable[ImageLike] | jax.Array


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
          images: paths, PIL images or uint8 arrays (H, W, C) with 1, 3 or 4 channels, or a single
            one of these.

        Returns:
          Classification: "probabilities" (num_classes,) in the order of :attr:`class_names`, or
          "features" (C,) if the model has no classes. Segmentation: "labels" (H, W) uint8.
          Depth: "depth" (H, W) float32 [metres]. Detection: "boxes" (n, 4) float32 [x1 y1 x2 y2,
          pixels], "classes" (n,) int32, "scores" (n,) float32 and, with Mask R-CNN and HTC, "masks"
          (n, H, W) bool. Pose: "keypoints" (n, K, 3) float32, x, y [pixels] and score, "boxes" and
          "scores", with n = 1.

        Raises:
          UserError: a file cannot be read, or an array has another shape or type.
        """
        return [self.predictor(self.read(image)).arrays for image in _listed(images)]

    def preprocess(self, images: ImageLike | Iterable[ImageLike]) -> jax.Array:
        """Returns images as the model takes them, (B, H, W, C) float32, normalised.

        A classifier sees the centre crop of its evaluation. A segmentation model sees the centre of
        the image in its window; :meth:`predict` shows it all windows. A detector sees the whole
        image at the top left of its canvas, and a pose model the crop around the image.

        Args:
          images: as in :meth:`predict`.

        Raises:
          UserError: as in :meth:`predict`, or there are no images.
        """
        views = [self.task.view(self.read(image)) for image in _listed(images)]
        if not views:
            raise UserError("images is empty; valid: at least one image")
        return self.task.normalize(jnp.asarray(np.stack(views)))

    def features(self, images: Batch) -> list[jax.Array]:
        """Returns the maps of the backbone, (B, h, w, C) each, the finest first.

        A depth model gives the maps of the stem and the patches that its decoder reads.

        Args:
          images: images as in :meth:`preprocess`, which this method applies to them, or a batch of
            any size from 32 x 32: (B, H, W, C) with C = `config.in_channels`, either uint8, or
            float and normalised.

        Raises:
          UserError: a file cannot be read, or an array has another shape or type.
        """
        return self._features(self._device_variables, self._batch(images))

    def pooled(self, images: Batch) -> jax.Array:
        """Returns one vector per image (B, C) in float32, for retrieval or a linear probe.

        A classifier gives the features that its last layer reads. Any other model gives the mean
        over the positions of its last map.

        Args:
          images: as in :meth:`features`.

        Raises:
          UserError: as in :meth:`features`.
        """
        return self._pooled(self._device_variables, self._batch(images))

    def attention(self, images: Batch) -> jax.Array | list[jax.Array]:
        """Returns the attention of all blocks of a plain host, ViT or DeiT.

        `tokenvit_jax.ops.attention_rollout` combines the blocks.

        Args:
          images: as in :meth:`features`.

        Returns:
          (B, blocks, heads, T, T) float32; rows are queries and sum to 1. The tokens in front of
          the patches come first (the class token), then the patches row by row. If the model
          clusters or reduces its patches, blocks have different numbers of tokens, and the result
          is a list with (B, heads, T, T) for each block.

        Raises:
          UserError: as in :meth:`features`, or the backbone is hierarchical.
        """
        blocks = self._attention(self._device_variables, self._batch(images))
        same = len({block.shape for block in blocks}) == 1
        return jnp.stack(blocks, 1) if same else blocks

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the probabilities and labels."""
        return tuple(self.task.class_names())

    def read(self, image: ImageLike) -> Image.Image:
        """Returns an image from a path, a PIL image or a uint8 array (H, W, C).

        Raises:
          UserError: the file cannot be read, or the array has another shape or type.
        """
        return _as_image(image)

    def _batch(self, images):
        """Returns normalised images (B, H, W, C); see :meth:`features`."""
        if not isinstance(images, np.ndarray | jax.Array) or images.ndim == 3:
            return self.preprocess(images)
        channels, normalised = self.task.input_shape[-1], jnp.issubdtype(images.dtype, jnp.floating)
        if (
            images.ndim != 4
            or not images.size
            or images.shape[-1] != channels
            or not (normalised or images.dtype == np.uint8)
        ):
            raise UserError(
                f"images are {images.dtype}{images.shape}; valid: uint8, or normalised floats, "
                f"(batch, height, width, {channels})"
            )
        images = jnp.asarray(images)
        return images if normalised else self.task.normalize(images)

    def export(self, out: str | Path) -> None:
        """Writes the model as a folder that runs without this package, see `docs/export.md`.

        Args:
          out: the new folder: the model for any number of images, its weights, and a description.

        Raises:
          UserError: something exists at the path, or it cannot be written.
        """
        write_export(
            Path(os.path.expanduser(out)), self.task, self.model, self.variables, self.step
        )

    @functools.cached_property
    def predictor(self):
        """Maps an image to its `tasks.Prediction`: arrays, text and pictures."""
        return self.task.predictor(self.model, self._device_variables)

    @functools.cached_property
    def _device_variables(self):
        return jax.device_put(self.variables)

    @functools.cached_property
    def _features(self):
        return jax.jit(lambda *args: self.model.apply(*args, method="maps"))

    @functools.cached_property
    def _pooled(self):
        @jax.jit
        def pooled(*args):
            if backbone_of(self.model) is self.model:
                return self.model.apply(*args, method="pooled")
            # Without a classifier, a backbone lacks the layers in front of it, too.
            maps = self.model.apply(*args, method="maps")
            return maps[-1].mean((1, 2)).astype(jnp.float32)

        return pooled

    @functools.cached_property
    def _attention(self):
        backbone = backbone_of(self.model)

        @jax.jit
        def attention(variables, images):
            return backbone.attention(backbone_variables(self.model, variables), images)

        return attention


def load_run(
    workdir: str | Path,
    checkpoint: str | int = "last",
    *,
    config: ConfigDict | None = None,
    axis_name: str | None = None,
) -> Run:
    """Loads a checkpoint of a run with its configuration, task and model.

    Programs that are compiled afterwards are kept on disk, as in training
    (`config.compilation_cache`).

    Args:
      workdir: folder of a training run, or of a run that `convert` or `expedite` wrote.
      checkpoint: "last", "best" (highest score of the task) or a step.
      config: configuration that replaces the run's own; None: the run's own.
      axis_name: axis of `jax.pmap` over which a batch will be split; None under `jax.jit`.

    Raises:
      UserError: there is no such run or checkpoint, the checkpoint cannot be read, or it does not
        fit the configuration.
    """
    workdir = Path(os.path.expanduser(workdir))
    config = read_config(workdir) if config is None else config
    keep_compiled(config)
    task = create_task(config, axis_name)
    model = task.make_model()
    found = load_variables(model, task.input_shape, workdir, str(checkpoint))
    return Run(config, task, model, found.variables, found.step)


def _listed(images: ImageLike | Iterable[ImageLike]) -> Iterable[ImageLike]:
    """Returns several images, also of a single one."""
    if isinstance(images, jax.Array):
        images = np.asarray(images)
    if isinstance(images, ImageLike) and getattr(images, "ndim", 3) in (2, 3):
        return [images]
    if not isinstance(images, Iterable):
        raise UserError(
            f"images is {images!r}; valid: a path, a PIL image, a uint8 array (height, width, "
            "channels), or several of these"
        )
    return images


def _as_image(image: ImageLike) -> Image.Image:
    if isinstance(image, str | Path):
        return read_image(Path(os.path.expanduser(image)))
    return to_rgb(image) if isinstance(image, Image.Image) else from_array(np.asarray(image))
