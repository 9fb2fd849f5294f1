"""The task of segmentation by masks: semantic, instance and panoptic segmentation."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from ml_collections import ConfigDict
from PIL import Image

from tokenvit_jax.data import Examples, datasets_with, open_annotations, open_split, with_channels
from tokenvit_jax.errors import UserError
from tokenvit_jax.heads import Mask2Former
from tokenvit_jax.heads.mask_losses import (
    WEIGHTS,
    Counts,
    MaskTargets,
    count_segments,
    mask_losses,
)
from tokenvit_jax.tasks.masks.examples import MaskExamples
from tokenvit_jax.tasks.masks.inference import predict_masks
from tokenvit_jax.tasks.masks.meters import LabelMapMeter, ObjectMeter, SegmentMeter
from tokenvit_jax.tasks.masks.model import make_mask_segmenter
from tokenvit_jax.tasks.masks.predictions import predictor_of
from tokenvit_jax.tasks.masks.settings import (
    ENTRIES,
    INSTANCE,
    NEEDS,
    PANOPTIC,
    SEMANTIC,
    check_sizes,
    eval_canvas,
    result_size,
)
from tokenvit_jax.tasks.task import (
    Aux,
    Batch,
    Inputs,
    Meter,
    Outcome,
    Predictor,
    Rngs,
    Task,
    apply_in_training,
)

# Fields of a record from which the segments of each kind are made: one of them is enough.
FIELDS = {
    SEMANTIC: ("label_map", "segments"),
    INSTANCE: ("instances",),
    PANOPTIC: ("segments",),
}
SCORES = {SEMANTIC: "eval/miou", INSTANCE: "eval/mask_ap", PANOPTIC: "eval/pq"}


class Masks(Task):
    """Segments with a class each, by Mask2Former.

    Batches: see :class:`MaskExamples`. The ground truth of an evaluation comes from the dataset, at
    its own size.
    """

    reads = frozenset({"image"})  # and one of `FIELDS`, see `check`
    entries, needs = ENTRIES, NEEDS
    has_results = True

    @staticmethod
    def overridable(config: ConfigDict) -> dict[str, Any]:
        return Task.overridable(config) | {"head_overrides": Mask2Former}

    @property
    def kind(self) -> str:
        """What the segments are: "semantic", "instance" or "panoptic"."""
        return self.config.inference.kind

    def check(self) -> None:
        self._check_fields()
        queries = self.make_model().head.num_queries
        if self.config.data.max_segments > queries:
            raise UserError(
                f"config.data.max_segments={self.config.data.max_segments} is above the number of "
                f"queries; valid: at most config.head_overrides.num_queries={queries}"
            )
        check_sizes(self.config)

    def _check_fields(self):
        """Raises UserError if the dataset lacks what the kind of segments reads."""
        fields = FIELDS[self.kind]
        if not self.info.fields & set(fields):
            valid = {name for field in fields for name in datasets_with({"image", field})}
            raise UserError(
                f"config.dataset={self.config.dataset!r} has no {' or '.join(fields)}, which "
                f"config.inference.kind={self.kind!r} reads; valid: {', '.join(sorted(valid))}"
            )

    def examples(self, *, train: bool) -> Examples:
        return MaskExamples(self.config, train=train)

    def make_model(self) -> nn.Module:
        return make_mask_segmenter(self.config, self.info.num_classes, self.axis_name)

    def prepare(self, batch: Batch, rng: jax.Array) -> Inputs:
        # Draws depend on the image and the step, and not on the image's place in the batch.
        keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, batch["index"])
        counts = count_segments(batch["classes"], self.make_model().head.num_queries)
        means = jax.tree.map(lambda x: x.mean(0), counts)
        means = lax.pmean(means, self.axis_name) if self.axis_name else means
        # At least one segment in the whole batch.
        rows = len(keys) * (lax.axis_size(self.axis_name) if self.axis_name else 1)
        means = means._replace(segments=jnp.maximum(means.segments, 1 / rows))
        return {
            "image": self.normalize(batch["image"]),
            "keys": keys,
            "segments_left_out": batch["segments_left_out"].astype(jnp.float32),
            **{
                f"mean_{name}": jnp.broadcast_to(x, keys.shape)
                for name, x in means._asdict().items()
            },
            **{name: batch[name] for name in ("segments", "classes")},
        }

    def loss(
        self, model: nn.Module, params: Any, model_state: Any, inputs: Inputs, rngs: Rngs
    ) -> tuple[jax.Array, Aux]:
        predictions, model_state = apply_in_training(
            model, params, model_state, inputs["image"], rngs
        )
        classes = inputs["classes"]
        ids = jnp.broadcast_to(1 + jnp.arange(classes.shape[1]), classes.shape)
        targets = MaskTargets(inputs["segments"], ids, classes)
        # Divided by the mean counts of the whole batch, the loss is a mean over images.
        counts = Counts(*(inputs[f"mean_{name}"].sum() for name in Counts._fields))
        losses = mask_losses(
            *predictions, targets, inputs["keys"], counts,
            num_points=self.config.masks.num_points,
        )  # fmt: skip
        weighted = jax.tree.map(jnp.multiply, WEIGHTS._asdict(), losses._asdict())
        # The losses of the last prediction are logged by name.
        metrics = {f"loss/{name}": values[-1] for name, values in weighted.items()}
        metrics["data/segments_left_out"] = inputs["segments_left_out"].mean()
        return sum(x.sum() for x in weighted.values()), Aux(model_state, metrics)

    def evaluate(self, model: nn.Module, variables: Any, batch: Batch) -> Outcome:
        found = self._predict(
            model, variables, batch["image"], batch["image_size"], batch["original_size"],
            room=result_size(self.config),
        )  # fmt: skip
        return Outcome(
            (), found | {name: batch[name] for name in ("index", "mask", "original_size")}
        )

    def _predict(self, model, variables, images, image_size, original_size, *, room):
        """Returns the predictions of images in buffers of a size; see :func:`predict_masks`."""
        predictions = model.apply(variables, self.normalize(images), train=False)
        return predict_masks(
            predictions.logits[-1], predictions.masks[-1], images.shape[1:3], image_size,
            original_size, room=room, kind=self.kind, things=self.info.things,
        )  # fmt: skip

    def grouped(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        return eval_canvas(self.config).grouped(batches)

    def meter(self) -> Meter:
        self._check_fields()  # again: an evaluation may have another dataset or kind
        split = self.info.eval_split
        if self.kind == INSTANCE:
            return ObjectMeter(functools.partial(open_annotations, self.config, split))
        truth = open_split(self.config, split).read
        if self.kind == SEMANTIC:
            return LabelMapMeter(truth, self.info.num_classes)
        things = self.info.things
        is_thing = [things is None or i in things for i in range(self.info.num_classes)]
        return SegmentMeter(truth, is_thing)

    def score(self, metrics: dict[str, float]) -> float:
        return metrics[SCORES[self.kind]]

    @property
    def view_size(self) -> tuple[int, int]:
        canvas = eval_canvas(self.config)
        return canvas.low, canvas.high

    def view(self, image: Image.Image) -> np.ndarray:
        image = with_channels(image, self.config.in_channels)
        return eval_canvas(self.config).place(image, self.view_size)[0]

    def outputs(self, model: nn.Module, variables: Any, images: jax.Array) -> dict[str, jax.Array]:
        found = model.apply(variables, images, train=False)
        return {"logits": found.logits[-1], "masks": found.masks[-1]}

    def predictor(self, model: nn.Module, variables: Any) -> Predictor:
        return predictor_of(self, functools.partial(self._predict, model), variables)
