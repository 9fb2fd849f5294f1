"""The task of object detection and instance segmentation."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict
from PIL import Image

from tokenvit_jax.data import (
    Examples,
    datasets_with,
    open_annotations,
    to_array,
    with_channels,
)
from tokenvit_jax.data.record import IGNORED
from tokenvit_jax.data.stuff_maps import FIELD
from tokenvit_jax.errors import UserError
from tokenvit_jax.heads import Detections, Targets
from tokenvit_jax.heads.two_stage import TwoStageHead
from tokenvit_jax.metrics.coco import CocoMeter, paste_mask
from tokenvit_jax.tasks.detection.examples import DetectionExamples
from tokenvit_jax.tasks.detection.model import HEADS, head_class, make_detector
from tokenvit_jax.tasks.detection.settings import ENTRIES, NEEDS, check_sizes, eval_canvas
from tokenvit_jax.tasks.detection.views import (
    check_views,
    eval_views,
    group_views,
    has_views,
    place_views,
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
)


class Detection(Task):
    """Boxes of objects, with RetinaNet, or boxes and masks, with Mask R-CNN and HTC.

    Batches: see :class:`DetectionExamples`. The ground truth of an evaluation comes from the
    dataset, whose masks are exact and whose crowds are ignored as COCO does.
    """

    reads = frozenset({"image", "instances"})  # HTC also "stuff_map", see `check`
    entries, needs = ENTRIES, NEEDS
    has_results = True

    @staticmethod
    def overridable(config: ConfigDict) -> dict[str, Any]:
        return Task.overridable(config) | {"head_overrides": head_class(config.head)}

    @property
    def has_masks(self) -> bool:
        """Whether the detector predicts masks."""
        return head_class(self.config.head).has_masks

    @property
    def images_per_group(self) -> int:
        return self.make_model().head.loss_group

    def check(self) -> None:
        self.make_model()
        self._check_fields()
        check_sizes(self.config)
        self._check_views()

    def _check_views(self):
        """Raises UserError if views do not fit together, or the head has none."""
        check_views(self.config)
        if has_views(self.config) and not issubclass(head_class(self.config.head), TwoStageHead):
            valid = ", ".join(name for name in HEADS if issubclass(HEADS[name], TwoStageHead))
            key = "short_sides" if self.config.inference.short_sides else "flip"
            raise UserError(
                f"config.inference.{key}={self.config.inference[key]!r}: the head "
                f"{self.config.head} has one view only; valid with it: {valid}"
            )

    def _check_fields(self):
        """Raises UserError if the dataset lacks what the head reads."""
        if head_class(self.config.head).has_stuff and FIELD not in self.info.fields:
            valid = ", ".join(sorted(datasets_with(self.reads | {FIELD})))
            raise UserError(
                f"config.dataset={self.config.dataset!r} has no {FIELD}, which "
                f"config.head={self.config.head!r} reads; valid: {valid}"
            )

    def examples(self, *, train: bool) -> Examples:
        head, overrides = head_class(self.config.head), self.config.head_overrides
        num_stuff = overrides.get("num_stuff", head.num_stuff) if head.has_stuff else 0
        return DetectionExamples(
            self.config, has_masks=self.has_masks, train=train, num_stuff=num_stuff
        )

    def make_model(self) -> nn.Module:
        return make_detector(self.config, self.info.num_classes, self.axis_name)

    def prepare(self, batch: Batch, rng: jax.Array) -> Inputs:
        # Draws depend on the image and the step, and not on the image's place in the batch.
        keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, batch["index"])
        left_out = batch["objects_left_out"].astype(jnp.float32)
        targets = {name: batch[name] for name in Targets._fields if name in batch}
        if FIELD in targets:
            stuff = targets[FIELD].astype(jnp.int32)
            targets[FIELD] = jnp.where(stuff == IGNORED, -1, stuff)
        return {
            "image": self.normalize(batch["image"]),
            "keys": keys,
            "objects_left_out": left_out,
            **targets,
        }

    def loss(
        self, model: nn.Module, params: Any, model_state: Any, inputs: Inputs, rngs: Rngs
    ) -> tuple[jax.Array, Aux]:
        targets = Targets(**{name: inputs.get(name) for name in Targets._fields})
        losses, model_state = apply_in_training(
            model, params, model_state, inputs["image"], rngs,
            method="losses", targets=targets, keys=inputs["keys"],
        )  # fmt: skip
        means = {name: values.mean() for name, values in losses.items()}
        metrics = {f"loss/{name}": value for name, value in means.items()}
        metrics["data/objects_left_out"] = inputs["objects_left_out"].mean()
        return sum(means.values()), Aux(model_state, metrics)

    def evaluate(self, model: nn.Module, variables: Any, batch: Batch) -> Outcome:
        found = self._detect(model, variables, batch)
        rows = {name: value for name, value in found._asdict().items() if value is not None}
        return Outcome(
            (), rows | {name: batch[name] for name in ("index", "mask", "original_size")}
        )

    def _detect(self, model, variables, batch) -> Detections:
        """Returns the detections with boxes in pixels of the original images."""
        original_size, views = batch["original_size"], eval_views(self.config)
        images = [self.normalize(batch[view.name]) for view in views]
        sizes = [batch[f"{view.name}_size"] for view in views]
        limits = jnp.tile(original_size[:, ::-1], 2)[:, None]
        if has_views(self.config):
            found = model.apply(
                variables, images, sizes, original_size, [view.limits for view in views],
                self.config.inference.flip, method="detect_views",
            )  # fmt: skip
            return found._replace(boxes=jnp.clip(found.boxes, 0, limits))
        (images,), (image_size,) = images, sizes
        found = model.apply(variables, images, train=False, image_size=image_size)
        factors = original_size / image_size  # rows, columns
        factors = jnp.tile(factors[:, ::-1], 2)[:, None].astype(jnp.float32)
        return found._replace(boxes=jnp.clip(found.boxes * factors, 0, limits))

    def grouped(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        return group_views(eval_views(self.config), batches)

    def meter(self) -> CocoMeter:
        annotations = functools.partial(open_annotations, self.config, self.info.eval_split)
        return CocoMeter(annotations, has_masks=self.has_masks)

    def score(self, metrics: dict[str, float]) -> float:
        return metrics["eval/mask_ap" if self.has_masks else "eval/box_ap"]

    def view(self, image: Image.Image) -> np.ndarray:
        image = with_channels(image, self.config.in_channels)
        return eval_canvas(self.config).place(image, self.view_size)[0]

    def outputs(self, model: nn.Module, variables: Any, images: jax.Array) -> dict[str, jax.Array]:
        found = model.apply(variables, images, train=False)
        return {name: value for name, value in found._asdict().items() if value is not None}

    def predictor(self, model: nn.Module, variables: Any) -> Predictor:
        from tokenvit_jax.tasks.detection import pictures  # matplotlib: drawing only

        names, views = self.class_names(), eval_views(self.config)

        @jax.jit
        def apply(variables, batch):
            found = self._detect(model, variables, batch)
            return jax.tree.map(lambda x: x[0], found)

        def predict(image):
            image = with_channels(image, self.config.in_channels)
            arrays = place_views(views, image, square=False)
            arrays["original_size"] = np.array(image.size[::-1], np.int32)
            batch = {name: x[None] for name, x in arrays.items()}
            found = jax.device_get(apply(variables, batch))
            count = int((found.classes >= 0).sum())
            boxes, classes, scores = (x[:count] for x in found[:3])
            arrays = {"boxes": boxes, "classes": classes, "scores": scores}
            if found.masks is not None:
                masks = [
                    paste_mask(*each, image.size[::-1])
                    for each in zip(found.masks[:count], boxes.astype(np.float64), strict=True)
                ]
                arrays["masks"] = np.array(masks, bool).reshape(count, *image.size[::-1])
            objects = [
                {
                    "class": names[label],
                    "score": float(f"{score:.4g}"),
                    "box": [round(float(x), 1) for x in box],
                }
                for box, label, score in zip(boxes, classes, scores, strict=True)
            ]
            text = pictures.describe(names, classes, scores)
            draw = functools.partial(pictures.draw, to_array(image), arrays, names)
            return Prediction(arrays, {"objects": objects}, text, draw)

        return predict
