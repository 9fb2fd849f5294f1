"""The task of monocular depth."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from ml_collections import ConfigDict
from PIL import Image

from tokenvit_jax.data import Examples, to_array, with_channels
from tokenvit_jax.heads import DptHead
from tokenvit_jax.metrics.depth import DepthMeter, depth_sums
from tokenvit_jax.ops.resize import resize_bicubic
from tokenvit_jax.tasks.depth import losses
from tokenvit_jax.tasks.depth.examples import DepthExamples, resize_frame
from tokenvit_jax.tasks.depth.inference import aligned, fitted_size, inverse, place
from tokenvit_jax.tasks.depth.model import check_host, make_dpt
from tokenvit_jax.tasks.depth.settings import ENTRIES, check_limits, check_sizes, eval_size
from tokenvit_jax.tasks.task import (
    Aux,
    Batch,
    Inputs,
    Outcome,
    Prediction,
    Predictor,
    Rngs,
    Task,
    apply_in_training,
)


class Depth(Task):
    """Depth of every pixel of one image, with DPT on a plain backbone.

    Training batches hold "image" (B, H, W, C) uint8 and "depth" (B, H, W) float32 [metres], 0 where
    unknown. Evaluation batches: see :class:`DepthExamples`.
    """

    reads = frozenset({"image", "depth"})
    entries = ENTRIES

    @staticmethod
    def overridable(config: ConfigDict) -> dict[str, Any]:
        return Task.overridable(config) | {"head_overrides": DptHead}

    def check(self) -> None:
        check_host(self.config)
        check_limits(self.config)
        check_sizes(self.config, self.make_model().multiple)

    def examples(self, *, train: bool) -> Examples:
        return DepthExamples(self.config, train=train)

    def make_model(self) -> nn.Module:
        return make_dpt(self.config, self.axis_name)

    def prepare(self, batch: Batch, rng: jax.Array) -> Inputs:
        del rng
        inputs = {"image": self.normalize(batch["image"]), "depth": batch["depth"]}
        if self.config.depth.loss == "ssi":
            # Divided by the pixels of all images, the loss is a mean over images, too.
            pixels = losses.count_pixels(batch["depth"]).astype(jnp.float32)
            mean = pixels.mean(0)
            mean = lax.pmean(mean, self.axis_name) if self.axis_name else mean
            inputs["pixels"] = jnp.broadcast_to(mean, pixels.shape)
        return inputs

    def loss(
        self, model: nn.Module, params: Any, model_state: Any, inputs: Inputs, rngs: Rngs
    ) -> tuple[jax.Array, Aux]:
        depth, model_state = apply_in_training(model, params, model_state, inputs["image"], rngs)
        truth = inputs["depth"]
        if self.config.depth.loss == "ssi":
            wanted = jnp.where(truth > 0, inverse(truth), 0.0)
            found = losses.scale_and_shift_invariant(inverse(depth), wanted, inputs["pixels"])
        else:
            found = losses.silog(jnp.maximum(depth, self.config.depth.limits[0]), truth)
        return found.mean(), Aux(model_state, {})

    def evaluate(self, model: nn.Module, variables: Any, batch: Batch) -> Outcome:
        found = model.apply(variables, self.normalize(batch["image"]), train=False)
        truth, limits = batch["depth"], tuple(self.config.depth.limits)
        found = jax.vmap(functools.partial(place, shape=truth.shape[1:]))(found, batch["frame"])
        if self.config.depth.align:
            found = aligned(found, truth, limits)
        return Outcome(depth_sums(found, truth, batch["mask"], limits))

    def meter(self) -> DepthMeter:
        return DepthMeter()

    def score(self, metrics: dict[str, float]) -> float:
        return -metrics["eval/abs_rel"]

    @property
    def view_size(self) -> tuple[int, int]:
        return eval_size(self.config)

    def view(self, image: Image.Image) -> np.ndarray:
        image = with_channels(image, self.config.in_channels)
        return resize_frame(image, (0, 0, *image.size), self.view_size)

    def outputs(self, model: nn.Module, variables: Any, images: jax.Array) -> dict[str, jax.Array]:
        return {"depth": model.apply(variables, images, train=False)}

    def predictor(self, model: nn.Module, variables: Any) -> Predictor:
        from tokenvit_jax.tasks.depth import pictures  # matplotlib: drawing only

        low = self.config.depth.limits[0]

        @jax.jit
        def apply(variables, images):
            return model.apply(variables, self.normalize(images), train=False)[0]

        @jax.jit
        def cluster(variables, images):
            return pictures.superpixels_of(model, variables, self.normalize(images))

        # Two programs: the large one does not depend on the size of the original image.
        @functools.partial(jax.jit, static_argnames="size")
        def resize(depth, size):
            return jnp.maximum(resize_bicubic(depth[..., None], size)[..., 0], low)

        def predict(image):
            image = with_channels(image, self.config.in_channels)
            size = image.size[::-1]
            pixels = resize_frame(
                image, (0, 0, *image.size), fitted_size(size, self.view_size, model.multiple)
            )
            depth = np.asarray(resize(apply(variables, pixels[None]), size))
            nearest, median, farthest = (float(f(depth)) for f in (np.min, np.median, np.max))
            row = {"nearest": nearest, "median": median, "farthest": farthest}
            row = {name: float(f"{value:.6g}") for name, value in row.items()}
            text = f"{nearest:.3g} to {farthest:.3g} m, median {median:.3g} m"
            superpixels = functools.partial(cluster, variables, pixels[None])
            draw = functools.partial(pictures.draw, to_array(image), depth, pixels, superpixels)
            return Prediction({"depth": depth}, row, text, draw)

        return predict
