"""The task of semantic segmentation."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from tokenvit_jax.data import IGNORED, Examples, to_array, with_channels
from tokenvit_jax.metrics.confusion import ConfusionMeter
from tokenvit_jax.tasks.segmentation.examples import ImageBuffer, SegmentationExamples
from tokenvit_jax.tasks.segmentation.inference import (
    class_shares,
    compare_with_labels,
    largest_labels,
    predict_logits,
)
from tokenvit_jax.tasks.segmentation.losses import pixel_cross_entropy
from tokenvit_jax.tasks.segmentation.model import check_head, head_class, make_segmenter
from tokenvit_jax.tasks.segmentation.settings import (
    ENTRIES,
    NEEDS,
    eval_size,
    window_size,
    windows,
)
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
    by_class,
    describe_shares,
    middle_window,
)


class Segmentation(Task):
    """One label per pixel: cross-entropy of the labelled pixels, mIoU at the labels' size.

    Training batches hold "image" (B, H, W, C) uint8 and "label" (B, H, W) uint8. Evaluation
    batches hold the image at the top left of a buffer (B, H, W, C) and its "image_size" (B, 2),
    the label map in a buffer (B, h, w) and its "label_size" (B, 2).
    """

    reads = frozenset({"image", "label_map"})
    entries = ENTRIES
    needs = NEEDS

    @staticmethod
    def overridable(config: ConfigDict) -> dict[str, Any]:
        return Task.overridable(config) | {"head_overrides": head_class(config.head)}

    def check(self) -> None:
        check_head(self.config)
        windows(self.config, eval_size(self.config))

    def examples(self, *, train: bool) -> Examples:
        return SegmentationExamples(self.config, train=train)

    def make_model(self) -> nn.Module:
        return make_segmenter(self.config, self.info.num_classes, self.axis_name)

    def prepare(self, batch: Batch, rng: jax.Array) -> Inputs:
        del rng
        return {"image": self.normalize(batch["image"]), "label": batch["label"]}

    def loss(
        self, model: nn.Module, params: Any, model_state: Any, inputs: Inputs, rngs: Rngs
    ) -> tuple[jax.Array, Aux]:
        images, labels = inputs["image"], inputs["label"]
        logits, model_state = apply_in_training(
            model, params, model_state, images, rngs, method="coarse_logits"
        )
        to_pixels = functools.partial(model.to_pixels, size=images.shape[1:3])
        loss = pixel_cross_entropy(logits.main, labels, to_pixels)
        if logits.auxiliary is None:
            return loss, Aux(model_state, {})
        auxiliary = pixel_cross_entropy(logits.auxiliary, labels, to_pixels)
        metrics = {"loss/main": loss, "loss/auxiliary": auxiliary}
        return loss + self.config.auxiliary_weight * auxiliary, Aux(model_state, metrics)

    def evaluate(self, model: nn.Module, variables: Any, batch: Batch) -> Outcome:
        images, sizes = self.normalize(batch["image"]), batch["image_size"]
        logits = predict_logits(model, self.config, variables, images, sizes)
        # Records that fill up a batch are ignored like pixels outside an image.
        labels = jnp.where(batch["mask"][:, None, None] > 0, batch["label"], IGNORED)
        return Outcome(compare_with_labels(logits, sizes, labels, batch["label_size"]))

    def meter(self) -> ConfusionMeter:
        return ConfusionMeter(self.info.num_classes)

    def score(self, metrics: dict[str, float]) -> float:
        return metrics["eval/miou"]

    @property
    def view_size(self) -> tuple[int, int]:
        return window_size(self.config)

    def outputs(self, model: nn.Module, variables: Any, images: jax.Array) -> dict[str, jax.Array]:
        logits = model.apply(variables, images, train=False)
        return {"labels": jnp.argmax(logits, -1).astype(jnp.uint8), "logits": logits}

    def predictor(self, model: nn.Module, variables: Any) -> Predictor:
        from tokenvit_jax.tasks.segmentation import pictures  # matplotlib: drawing only

        names, buffer = self.class_names(), ImageBuffer(self.config)

        @jax.jit
        def apply(variables, images, sizes):
            return predict_logits(model, self.config, variables, self.normalize(images), sizes)[0]

        @jax.jit
        def cluster(variables, images):
            return pictures.superpixels_of(model, variables, self.normalize(images))

        def predict(image):
            image = with_channels(image, self.config.in_channels)
            pixels, size = buffer(image)
            logits = apply(variables, pixels[None], size[None])
            labels = np.asarray(largest_labels(logits, size, image.size[::-1]))
            window = middle_window(pixels, size, self.view_size)
            found = dict(class_shares(labels))
            shares = [(names[label], share) for label, share in found.items()]
            values = [found.get(label, 0.0) for label in range(len(names))]
            row = {"shares": by_class(names, values)}
            superpixels = functools.partial(cluster, variables, window[None])
            shown = window[: size[0], : size[1]]  # without padding
            draw = functools.partial(
                pictures.draw, to_array(image), labels, names, shown, self.view_size, superpixels
            )
            return Prediction({"labels": labels}, row, describe_shares(shares), draw)

        return predict
