"""The task of semantic segmentation."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from ml_collections import ConfigDict

from tokenvit_jax.data import IGNORED, Examples, to_array, with_channels
from tokenvit_jax.errors import UserError
from tokenvit_jax.metrics.confusion import ConfusionMeter
from tokenvit_jax.tasks.grouping import group_by_size
from tokenvit_jax.tasks.label_maps import label_map_prediction
from tokenvit_jax.tasks.segmentation.examples import (
    ImageViews,
    SegmentationExamples,
    image_key,
    size_key,
)
from tokenvit_jax.tasks.segmentation.inference import (
    compare_views,
    compare_with_labels,
    largest_labels,
    predict_logits,
    predict_views,
)
from tokenvit_jax.tasks.segmentation.losses import pixel_cross_entropy
from tokenvit_jax.tasks.segmentation.model import check_head, head_class, make_segmenter
from tokenvit_jax.tasks.segmentation.settings import (
    ENTRIES,
    NEEDS,
    WHOLE,
    check_scales,
    eval_size,
    is_whole,
    one_view,
    window_size,
    windows,
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
    middle_window,
)


class Segmentation(Task):
    """One label per pixel: cross-entropy of the labelled pixels, mIoU at the labels' size.

    Training batches hold "image" (B, H, W, C) uint8 and "label" (B, H, W) uint8. Evaluation
    batches hold the image at the top left of a buffer (B, H, W, C) and its "image_size" (B, 2),
    the label map in a buffer (B, h, w) and its "label_size" (B, 2); for other scales than 1, see
    :class:`SegmentationExamples`.
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
        check_scales(self.config)

    def check_devices(self, devices: int) -> None:
        del devices
        if is_whole(self.config) and jax.process_count() > 1:
            raise UserError(
                f"config.inference.window={WHOLE} is not valid for training in "
                f"{jax.process_count()} processes, whose images have different sizes; valid: the "
                f"sides of a window; evaluate takes {WHOLE} after the training"
            )

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
        def labels():  # records that fill up a batch are ignored like pixels outside an image
            return jnp.where(batch["mask"][:, None, None] > 0, batch["label"], IGNORED)

        if one_view(self.config):
            images, sizes = self.normalize(batch["image"]), batch["image_size"]
            logits = predict_logits(model, self.config, variables, images, sizes)
            return Outcome(compare_with_labels(logits, sizes, labels(), batch["label_size"]))

        def compare(record):
            views, label, label_size = record
            return compare_views(self._views(model, variables, views), label, label_size)

        views = [(batch[image_key(s)], batch[size_key(s)]) for s in self.config.inference.scales]
        # One image after another: the logits of all its views are large.
        sums = lax.map(compare, (views, labels(), batch["label_size"]))
        return Outcome(jax.tree.map(lambda x: x.sum(0), sums))

    def grouped(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        if not is_whole(self.config):
            return batches
        # Sizes at all scales follow from those at scale 1, and scales may lack 1.
        scales = dict.fromkeys((1.0, *self.config.inference.scales))
        return group_by_size(batches, [*map(image_key, scales)])

    def _views(self, model, variables, views):
        """Returns the views of one image from its (pixels, size) at each of the scales."""
        images = [self.normalize(pixels[None])[0] for pixels, _ in views]
        return predict_views(model, self.config, variables, images, [size for _, size in views])

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

        self.check()
        names, views_of = self.class_names(), ImageViews(self.config)
        whole = is_whole(self.config)

        @jax.jit
        def apply(variables, views):
            return self._views(model, variables, views)

        @jax.jit
        def cluster(variables, images):
            return pictures.superpixels_of(model, variables, self.normalize(images))

        def predict(image):
            image = with_channels(image, self.config.in_channels)
            views = views_of(image)
            if whole:  # a program for each size
                views = {s: (x, np.array(x.shape[:2], np.int32)) for s, x in views.items()}
            else:
                views = {s: views_of.in_buffer(s, x) for s, x in views.items()}
            logits = apply(variables, [views[s] for s in self.config.inference.scales])
            labels = np.asarray(largest_labels(logits, image.size[::-1]))
            pixels, size = views[1.0]
            view_size = pixels.shape[:2] if whole else self.view_size
            window = middle_window(pixels, size, view_size)
            superpixels = functools.partial(cluster, variables, window[None])
            shown = window[: size[0], : size[1]]  # without padding
            draw = functools.partial(
                pictures.draw, to_array(image), labels, names, shown, view_size, superpixels
            )
            return label_map_prediction(labels, names, draw)

        return predict
