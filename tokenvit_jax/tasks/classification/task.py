"""The task of image classification."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from PIL import Image

from tokenvit_jax.data import Examples, eval_image, with_channels
from tokenvit_jax.data.token_labels import grid_size
from tokenvit_jax.errors import UserError
from tokenvit_jax.metrics.classification import AccuracyMeter, accuracy_sums
from tokenvit_jax.ops.mix_boxes import mix_boxes
from tokenvit_jax.tasks import overrides
from tokenvit_jax.tasks.classification import losses, teaching
from tokenvit_jax.tasks.classification.examples import ClassificationExamples, eval_crop
from tokenvit_jax.tasks.classification.mixing import (
    draw_mixing,
    draw_token_mixing,
    mix_batch,
    mix_targets,
)
from tokenvit_jax.tasks.classification.settings import ENTRIES, NEEDS, check_relations
from tokenvit_jax.tasks.task import (
    Aux,
    Batch,
    Inputs,
    Outcome,
    Prediction,
    Predictor,
    Rngs,
    Task,
    Teacher,
    apply_in_training,
    by_class,
    describe_shares,
)


class Classification(Task):
    """One label per image: cross-entropy, accuracy, and token labels where a model has them.

    Training batches hold "image" (B, H, W, C) uint8 and "label" (B,) int32, and with
    `token_labels.weight` also the entries that `losses.token_labels` reads.
    """

    reads = frozenset({"image", "label"})
    entries = ENTRIES
    needs = NEEDS

    def check(self) -> None:
        check_relations(self.config, self.info)

    def check_devices(self, devices: int) -> None:
        mix, batch_size = self.config.mix, self.config.batch_size
        accumulate = self.config.accumulate_steps
        if (mix.mixup or mix.cutmix) and batch_size % (2 * devices):
            raise UserError(
                f"config.batch_size={batch_size} gives each of {devices} devices an odd number of "
                "images; config.mix pairs them, so it must be even"
            )
        if mix.mixtoken and batch_size % (2 * devices * accumulate):
            raise UserError(
                f"config.batch_size={batch_size} gives each of {devices} devices x {accumulate} "
                "accumulate_steps an odd number of images; config.mix.mixtoken pairs them, so it "
                "must be even"
            )

    def examples(self, *, train: bool) -> Examples:
        return ClassificationExamples(self.config, self.info, train=train)

    def make_model(self) -> nn.Module:
        config = self.config
        model = overrides.make_backbone(
            config,
            num_classes=self.info.num_classes,
            dtype=jnp.dtype(config.dtype),
            axis_name=self.axis_name,
        )
        if self._trains_tokens and not getattr(model.settings, "token_head", False):
            raise UserError(
                f"config.mix.mixtoken={config.mix.mixtoken} and config.token_labels.weight="
                f"{config.token_labels.weight} need a model with a token head; config.model="
                f"{config.model!r} has none, or config.model_overrides.token_head is not True"
            )
        return model

    @property
    def _trains_tokens(self):
        return bool(self.config.token_labels.weight or self.config.mix.mixtoken)

    @property
    def teacher(self) -> Teacher | None:
        return teaching.teacher_of(self.config)

    def misfit(self, teacher: Task, model: nn.Module) -> str:
        if self.config.token_labels.weight:
            return teaching.cell_misfit(model)
        return "" if isinstance(teacher, Classification) else teaching.NO_CLASSIFIER

    def teach(
        self, teacher: Task, model: nn.Module, variables: Any, batch: Batch, rng: jax.Array
    ) -> Batch:
        if self.config.token_labels.weight:
            labels = teaching.label_cells(teacher, model, variables, batch["image"])
            return {"token_labels": teaching.resize_labels(labels, *batch["image"].shape[1:3])}
        images = self.pixels(self.prepare(batch, rng)["image"])  # mixed like the student's
        return {"teacher_logits": teaching.label_images(teacher, model, variables, images)}

    def prepare(self, batch: Batch, rng: jax.Array) -> Inputs:
        images = self.normalize(batch["image"])
        smoothing = self.config.label_smoothing
        targets = losses.soft_targets(batch["label"], self.info.num_classes, smoothing)
        if self.config.mix.mixup or self.config.mix.cutmix:
            mixing = draw_mixing(rng, self.config.mix, *images.shape[1:3])
            images, targets = mix_batch(images, targets, mixing)
        return {"image": images, "targets": targets, **losses.taught_entries(batch)}

    def loss(
        self, model: nn.Module, params: Any, model_state: Any, inputs: Inputs, rngs: Rngs
    ) -> tuple[jax.Array, Aux]:
        compute = self._token_loss if self._trains_tokens else self._class_loss
        compute = self._distillation_loss if self.config.distillation.weight else compute
        loss, model_state = compute(model, params, model_state, inputs, rngs)
        return loss, Aux(model_state, {})

    def _class_loss(self, model, params, model_state, inputs, rngs):
        logits, model_state = apply_in_training(model, params, model_state, inputs["image"], rngs)
        return losses.cross_entropy(logits, inputs["targets"]), model_state

    def _distillation_loss(self, model, params, model_state, inputs, rngs):
        distilled = self.config.model_overrides.get("distilled", False)
        method = {"method": "distillation_logits"} if distilled else {}
        found, model_state = apply_in_training(
            model, params, model_state, inputs["image"], rngs, **method
        )
        pair = found if distilled else (found, found)
        entries = inputs["targets"], inputs["teacher_logits"], self.config.distillation
        return losses.distillation_loss(*pair, *entries), model_state

    def _token_loss(self, model, params, model_state, inputs, rngs):
        images, targets, mixing = inputs["image"], inputs["targets"], None
        if self.config.mix.mixtoken:  # inside the model: among the images of a micro-batch
            grid = grid_size(images.shape[1:3])
            mixing = draw_token_mixing(rngs["batch"], self.config.mix, *grid)
            targets = mix_targets(targets, mixing)
        box = None if mixing is None else mixing.box
        (logits, dense_logits), model_state = apply_in_training(
            model, params, model_state, images, rngs, box=box, method="token_logits"
        )
        weight = self.config.token_labels.weight
        if not weight:
            return losses.cross_entropy(logits, targets), model_state
        labels = losses.token_labels(inputs, self.info.num_classes)
        if mixing is not None:
            labels = mix_boxes(labels, box)
        loss = losses.token_cross_entropy(logits, dense_logits, targets, labels, weight)
        return loss, model_state

    def evaluate(self, model: nn.Module, variables: Any, batch: Batch) -> Outcome:
        logits = model.apply(variables, self.normalize(batch["image"]), train=False)
        return Outcome(accuracy_sums(logits, batch["label"], batch["mask"]))

    def meter(self) -> AccuracyMeter:
        return AccuracyMeter()

    def score(self, metrics: dict[str, float]) -> float:
        return metrics["eval/accuracy"]

    def view(self, image: Image.Image) -> np.ndarray:
        image = with_channels(image, self.config.in_channels)
        crop = eval_crop(self.config, self.info)
        return eval_image(image, self.view_size, crop, self.config.data.eval_interpolation)

    def outputs(self, model: nn.Module, variables: Any, images: jax.Array) -> dict[str, jax.Array]:
        found = model.apply(variables, images, train=False)
        if not self.info.num_classes:  # a model without a classifier
            return {"features": found}
        return {"logits": found, "probabilities": jax.nn.softmax(found)}

    def predictor(self, model: nn.Module, variables: Any) -> Predictor:
        from tokenvit_jax.tasks.classification import pictures  # matplotlib: drawing only

        @jax.jit
        def apply(variables, images):
            images = self.normalize(images)
            output, state = model.apply(variables, images, train=False, mutable=["intermediates"])
            noted = pictures.noted_by(model, variables, images, state.get("intermediates", {}))
            return jax.nn.softmax(output) if self.info.num_classes else output, noted

        def predict(image):
            pixels = self.view(image)
            output, noted = apply(variables, pixels[None])
            describe = self._probabilities if self.info.num_classes else self._features
            return describe(np.asarray(output[0]), pixels, noted)

        return predict

    def _probabilities(self, probabilities, pixels, noted):
        """Returns the prediction of a classifier for one image."""
        from tokenvit_jax.tasks.classification import pictures

        names, order = self.class_names(), np.argsort(-probabilities, kind="stable")
        classes = [(names[label], float(probabilities[label])) for label in order]
        row = {
            "class": names[order[0]],
            "probability": float(f"{probabilities[order[0]]:.6g}"),
            "probabilities": by_class(names, probabilities),
        }
        draw = functools.partial(pictures.draw, pixels, classes, noted)
        return Prediction({"probabilities": probabilities}, row, describe_shares(classes), draw)

    def _features(self, features, pixels, noted):
        """Returns the prediction of a model without classes for one image."""
        from tokenvit_jax.tasks.classification import pictures

        row = {"features": [float(f"{value:.6g}") for value in features]}
        draw = functools.partial(pictures.draw, pixels, (), noted)
        return Prediction({"features": features}, row, f"{len(features)} features", draw)
