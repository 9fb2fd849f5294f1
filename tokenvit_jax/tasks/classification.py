"""Image classification: model, targets, loss and metrics."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from ml_collections import ConfigDict

from tokenvit_jax.models import create_model


def make_model(config: ConfigDict, num_classes: int, *, axis_name: str | None = None) -> nn.Module:
    """Returns the classifier of a configuration.

    Args:
      config: reads `model`, `model_overrides` and `dtype`.
      num_classes: number of classes.
      axis_name: axis of `jax.pmap` over which a batch is split; None under `jax.jit`.

    Raises:
      UserError: unknown model or override.
    """
    return create_model(
        config.model,
        num_classes=num_classes,
        dtype=jnp.dtype(config.dtype),
        axis_name=axis_name,
        **config.model_overrides.to_dict(),
    )


def soft_targets(labels: jax.Array, num_classes: int, label_smoothing: float) -> jax.Array:
    """Returns class probabilities to learn from integer labels.

    Args:
      labels: (B,) int, classes in [0, num_classes).
      num_classes: number of classes.
      label_smoothing: probability that is spread evenly over all classes.

    Returns:
      (B, num_classes) float32; every row sums to 1.

    Source: Szegedy et al., "Rethinking the Inception Architecture", section 7.
    """
    return optax.smooth_labels(jax.nn.one_hot(labels, num_classes), label_smoothing)


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy of a batch.

    Args:
      logits: (..., num_classes), any float type; computed in float32.
      targets: (..., num_classes) class probabilities.

    Returns:
      () float32, nats.
    """
    return optax.softmax_cross_entropy(logits.astype(jnp.float32), targets).mean()


def token_labels(batch: dict[str, jax.Array], num_classes: int) -> jax.Array:
    """Returns the class probabilities of every cell of the last map, (B, h, w, num_classes).

    Args:
      batch: has either "token_labels", which are they, or "token_classes" (B, h, w, n) int and
        "token_scores" (B, h, w, n) float: probabilities of some classes; those of a class that
        occurs more than once add up.
      num_classes: number of classes.
    """
    if "token_labels" in batch:
        return batch["token_labels"]
    one_hot = jax.nn.one_hot(batch["token_classes"], num_classes)
    return jnp.sum(one_hot * batch["token_scores"][..., None], axis=-2)


def token_cross_entropy(
    logits: jax.Array,
    dense_logits: jax.Array,
    targets: jax.Array,
    labels: jax.Array,
    weight: float,
) -> jax.Array:
    """Returns the loss of the class and of the tokens of a batch.

    Args:
      logits: (B, num_classes) of the images.
      dense_logits: (B, h, w, num_classes) of the cells of the last map.
      targets: (B, num_classes) class probabilities of the images.
      labels: (B, h, w, num_classes) class probabilities of the cells.
      weight: of the mean cross-entropy of the cells.

    Returns:
      () float32, nats.

    Source: Jiang et al., "All Tokens Matter", section "Token Labeling".
    """
    return cross_entropy(logits, targets) + weight * cross_entropy(dense_logits, labels)


def batch_sums(
    model: nn.Module,
    config: ConfigDict,
    variables: Any,
    images: jax.Array,
    batch: dict[str, jax.Array],
) -> dict[str, jax.Array]:
    """Returns the :func:`metric_sums` of a batch.

    Args:
      model: of :func:`make_model`.
      config: nothing of it is read.
      variables: of the model.
      images: (B, H, W, 3), normalised.
      batch: "label" (B,) int and "mask" (B,).
    """
    del config
    logits = model.apply(variables, images, train=False)
    return metric_sums(logits, batch["label"], batch["mask"])


def metric_sums(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Returns sums over the images of a batch that :func:`mean_metrics` turns into metrics.

    Args:
      logits: (B, num_classes).
      labels: (B,) int.
      mask: (B,) 1.0 for an image, 0.0 for padding.

    Returns:
      "loss" (nats), "accuracy" (correct images) and "count" (images), () float32 each.
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
    correct = (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
    return {
        # Not losses * mask: padding may be anything, and infinity times 0 is not 0.
        "loss": jnp.sum(jnp.where(mask > 0, losses, 0.0)),
        "accuracy": jnp.sum(correct * mask),
        "count": jnp.sum(mask),
    }


def mean_metrics(sums: list[dict[str, jax.Array]]) -> dict[str, float]:
    """Returns {"eval/accuracy", "eval/loss"} of a pass from the :func:`metric_sums` of its batches.

    Accuracy is a part of 1, the loss is in nats per image.
    """
    # On the host in float64: exact for any number of images.
    totals = {name: sum(float(batch[name]) for batch in sums) for name in ("accuracy", "loss")}
    count = sum(float(batch["count"]) for batch in sums)
    return {f"eval/{name}": total / count for name, total in totals.items()}
