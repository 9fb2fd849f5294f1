"""What a training step minimises: the loss of a batch, with what is mixed or added to it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from tokenvit_jax.data.token_labels import grid_size
from tokenvit_jax.errors import UserError
from tokenvit_jax.models.reducers import retention_mass
from tokenvit_jax.ops.mix_boxes import mix_boxes
from tokenvit_jax.tasks import classification, segmentation, task_of
from tokenvit_jax.training.mixing import draw_mixing, draw_token_mixing, mix_batch, mix_targets

# `loss(params, model_state, inputs, rng) -> loss, model_state`
Loss = Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, Any]]


def make_objective(
    model: nn.Module, config: ConfigDict, num_classes: int
) -> Callable[[jax.Array, dict[str, jax.Array], jax.Array], tuple[Loss, Any]]:
    """Returns `objective(images, batch, rng) -> loss, inputs`.

    Args:
      model: of the dataset's task.
      config: reads `dataset`, `label_smoothing`, `mix`, `token_labels` and `retention`.
      num_classes: number of classes of the dataset.

    Returns:
      A function of the normalised images (B, H, W, 3), the batch they come from and a key for what
      is drawn for the batch as a whole. Its inputs are arrays that lead with B, of which `loss`,
      differentiable in the parameters, may be given a part at a time.

    Raises:
      UserError: the model has no token head, but needs one.
    """
    if task_of(config.dataset) is segmentation:
        return _segmentation_objective(model)
    return _classification_objective(model, config, num_classes)


def _forward(model, params, model_state, images, rng, **kwargs):
    dropout_rng, routing_rng = jax.random.split(rng)
    return model.apply(
        {"params": params, **model_state},
        images,
        train=True,
        rngs={"dropout": dropout_rng, "routing": routing_rng},
        mutable=list(model_state),
        **kwargs,
    )


def _segmentation_objective(model):
    def loss(params, model_state, inputs, rng):
        images, labels = inputs
        logits, model_state = _forward(model, params, model_state, images, rng)
        return segmentation.pixel_cross_entropy(logits, labels), model_state

    return lambda images, batch, rng: (loss, (images, batch["label"]))


def _classification_objective(model, config, num_classes):
    loss_fn = _make_class_loss(model, config, num_classes)
    if config.retention.penalty:
        loss_fn = with_retention_penalty(loss_fn, config.retention.penalty)

    def objective(images, batch, rng):
        targets = classification.soft_targets(batch["label"], num_classes, config.label_smoothing)
        token_labels = {name: batch[name] for name in batch if name.startswith("token_")}
        loss = loss_fn
        if config.mix.mixup or config.mix.cutmix:
            mixing = draw_mixing(rng, config.mix, *images.shape[1:3])
            images, targets = mix_batch(images, targets, mixing)
        elif config.mix.mixtoken:
            # Inside the model and the loss: among the images of a micro-batch.
            mixing = draw_token_mixing(rng, config.mix, *map(grid_size, images.shape[1:3]))
            loss = functools.partial(loss_fn, mixing=mixing)
        return loss, (images, targets, token_labels)

    return objective


def with_retention_penalty(loss_fn: Callable, penalty: float) -> Callable:
    """Returns a loss that grows with the tokens that are retained, more for later blocks.

    By the penalty times the sum over the blocks l, from 1, of l times their retention mass.

    Source: Goyal et al. 2020, PoWER-BERT, Section 3.3.
    """

    def penalised(params, *args, **kwargs):
        loss, model_state = loss_fn(params, *args, **kwargs)
        mass = retention_mass(params)
        return loss + penalty * jnp.arange(1, len(mass) + 1) @ mass, model_state

    return penalised


def _make_class_loss(model, config, num_classes):
    """Returns `loss_fn(params, model_state, inputs, rng) -> loss, model_state`.

    The inputs are normalised images, class probabilities and what `classification.token_labels`
    reads. The loss of a model with a token head takes `mixing` too, what `draw_token_mixing` drew.
    """
    weight = config.token_labels.weight

    forward = functools.partial(_forward, model)

    def class_loss(params, model_state, inputs, rng):
        images, targets, _ = inputs
        logits, model_state = forward(params, model_state, images, rng)
        return classification.cross_entropy(logits, targets), model_state

    def token_loss(params, model_state, inputs, rng, mixing=None):
        images, targets, token_labels = inputs
        box = None if mixing is None else mixing.box
        (logits, dense_logits), model_state = forward(
            params, model_state, images, rng, box=box, method="token_logits"
        )
        if mixing is not None:
            targets = mix_targets(targets, mixing)
        if not weight:
            return classification.cross_entropy(logits, targets), model_state
        labels = classification.token_labels(token_labels, num_classes)
        if mixing is not None:
            labels = mix_boxes(labels, mixing.box)
        loss = classification.token_cross_entropy(logits, dense_logits, targets, labels, weight)
        return loss, model_state

    if not (weight or config.mix.mixtoken):
        return class_loss
    if not getattr(getattr(model, "settings", model), "token_head", False):
        raise UserError(
            f"config.mix.mixtoken={config.mix.mixtoken} and config.token_labels.weight={weight} "
            f"need a model with a token head; config.model={config.model!r} has none, or "
            "config.model_overrides.token_head is not True"
        )
    return token_loss
