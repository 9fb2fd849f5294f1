"""The task of whole-body pose estimation, top-down: one person in a box at a time."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict
from PIL import Image

from tokenvit_jax.data import Examples, open_annotations, with_channels
from tokenvit_jax.data.record import Skeleton
from tokenvit_jax.ops.heatmaps import heatmap_loss, heatmap_targets, to_heatmap
from tokenvit_jax.tasks.pose.examples import PoseExamples
from tokenvit_jax.tasks.pose.inference import flip_tested, keypoints_in_images
from tokenvit_jax.tasks.pose.meters import PoseMeter
from tokenvit_jax.tasks.pose.model import head_class, make_pose_model
from tokenvit_jax.tasks.pose.predictions import predictor_of
from tokenvit_jax.tasks.pose.settings import (
    ENTRIES,
    check_size,
    heatmap_size,
    keypoint_weights,
)
from tokenvit_jax.tasks.task import (
    Aux,
    Batch,
    Inputs,
    Outcome,
    Predictor,
    Rngs,
    Task,
    apply_in_training,
)


class Pose(Task):
    """Keypoints of the person in a box, from one heat map for each.

    Batches: see :class:`PoseExamples`. The ground truth of an evaluation comes from the dataset.
    """

    reads = frozenset({"image", "person"})
    entries = ENTRIES
    has_results = True
    takes_boxes = True

    @staticmethod
    def overridable(config: ConfigDict) -> dict[str, Any]:
        return Task.overridable(config) | {"head_overrides": head_class(config.head)}

    @property
    def skeleton(self) -> Skeleton:
        """The keypoints of the dataset."""
        return self.info.skeleton

    def check(self) -> None:
        self.make_model()
        check_size(self.config)
        keypoint_weights(self.config, self.skeleton)

    def examples(self, *, train: bool) -> Examples:
        return PoseExamples(self.config, self.skeleton, train=train)

    def make_model(self) -> nn.Module:
        return make_pose_model(self.config, len(self.skeleton.names), self.axis_name)

    def prepare(self, batch: Batch, rng: jax.Array) -> Inputs:
        del rng
        return {"image": self.normalize(batch["image"]), "keypoints": batch["keypoints"]}

    def loss(
        self, model: nn.Module, params: Any, model_state: Any, inputs: Inputs, rngs: Rngs
    ) -> tuple[jax.Array, Aux]:
        heatmaps, model_state = apply_in_training(model, params, model_state, inputs["image"], rngs)
        settings, keypoints = self.config.pose, inputs["keypoints"]
        size = heatmap_size(self.input_size)
        points = to_heatmap(keypoints[..., :2], self.input_size, size, unbiased=settings.unbiased)
        targets = heatmap_targets(
            points, keypoints[..., 2] > 0, size, sigma=settings.sigma, unbiased=settings.unbiased
        )
        factors = jnp.array(keypoint_weights(self.config, self.skeleton))
        targets = targets._replace(weights=targets.weights * factors)
        return heatmap_loss(heatmaps, targets).mean(), Aux(model_state, {})

    def evaluate(self, model: nn.Module, variables: Any, batch: Batch) -> Outcome:
        keypoints = self._keypoints(model, variables, batch["image"], batch["to_image"])
        names = "index", "mask", "score", "area"
        return Outcome((), {"keypoints": keypoints, **{name: batch[name] for name in names}})

    def heatmaps(self, model: nn.Module, variables: Any, images: jax.Array) -> jax.Array:
        """Returns the heat maps of images (B, H, W, C), from 0 to 255: (B, h, w, K).

        With `inference.flip`, they are means with those of the mirrored images.
        """

        def apply(images):
            return model.apply(variables, self.normalize(images), train=False)

        if not self.config.inference.flip:
            return apply(images)
        # Mirrored, cells at multiples of the stride lie elsewhere; with unit steps they do not.
        return flip_tested(apply, images, self.skeleton, shift=not self.config.pose.unbiased)

    def _keypoints(self, model, variables, images, to_image):
        """Returns x, y [pixels of the image] and score of all keypoints (B, K, 3)."""
        return keypoints_in_images(
            self.heatmaps(model, variables, images), to_image, self.input_size,
            refinement=self.config.inference.refinement, unbiased=self.config.pose.unbiased,
        )  # fmt: skip

    def meter(self) -> PoseMeter:
        annotations = functools.partial(open_annotations, self.config, self.info.eval_split)
        return PoseMeter(annotations, self.skeleton.sigmas, self.skeleton.parts)

    def score(self, metrics: dict[str, float]) -> float:
        return metrics["eval/ap"]

    def view(self, image: Image.Image) -> np.ndarray:
        image = with_channels(image, self.config.in_channels)
        examples = self.examples(train=False)
        return examples.eval_example(image, np.array([0, 0, *image.size]))["image"]

    def outputs(self, model: nn.Module, variables: Any, images: jax.Array) -> dict[str, jax.Array]:
        return {"heatmaps": model.apply(variables, images, train=False)}

    def predictor(self, model: nn.Module, variables: Any) -> Predictor:
        return predictor_of(self, functools.partial(self._keypoints, model), variables)
