"""Targets and losses of image classification."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax


def soft_targets(labels: jax.Array, num_classes: int, label_smoothing: float) -> jax.Array:
    """Returns class probabilities to learn from integer labels.

    Args:
      labels: (B,) int, classes in [0, num_classes).
      num_classes: number of classes.
      label_smoothing: probability to spread evenly over all classes.

    Returns:
      (B, num_classes) float32; every row sums to 1.

    References:
      Szegedy et al. 2016, "Rethinking the Inception Architecture", Section 7.
    """
    return optax.smooth_labels(jax.nn.one_hot(labels, num_classes), label_smoothing)


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy () of a batch in nats, float32.

    Args:
      logits: (..., num_classes), any float type; the loss is computed in float32.
      targets: (..., num_classes) class probabilities.
    """
    return optax.softmax_cross_entropy(logits.astype(jnp.float32), targets).mean()


def taught_entries(batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns the entries of a batch that a teacher made, now or in files."""
    return {name: batch[name] for name in batch if name.startswith(("token_", "teacher_"))}


def distillation_loss(
    logits: jax.Array,
    taught: jax.Array,
    targets: jax.Array,
    teacher: jax.Array,
    settings: Any,
) -> jax.Array:
    """Returns the loss () of a batch with a teacher in nats, float32.

    With weight w and temperature t, it is (1 - w) CE(logits, targets) + w D. "hard": D is the
    cross-entropy with the teacher's most probable class, which is not smoothed. "soft": D is t^2
    times the mean Kullback-Leibler divergence of the tempered probabilities from the teacher's.

    Args:
      logits: logits that learn from the targets (B, num_classes).
      taught: logits that learn from the teacher (B, num_classes), of the distillation token, or the
        same logits.
      targets: class probabilities of the images (B, num_classes).
      teacher: logits of the teacher (B, num_classes).
      settings: entries `kind`, `weight` and `temperature`.

    References:
      Touvron et al. 2021, "Training data-efficient image transformers & distillation through
      attention", Eqs. 2 and 3.
    """
    if settings.kind == "hard":
        classes = jax.nn.one_hot(teacher.argmax(-1), teacher.shape[-1])
        distance = cross_entropy(taught, classes)
    else:
        tempered = (jax.nn.log_softmax(x / settings.temperature) for x in (taught, teacher))
        ours, theirs = tempered
        distance = jnp.sum(jnp.exp(theirs) * (theirs - ours), -1).mean() * settings.temperature**2
    return (1 - settings.weight) * cross_entropy(logits, targets) + settings.weight * distance


def token_labels(entries: Mapping[str, jax.Array], num_classes: int) -> jax.Array:
    """Returns class probabilities for every cell of the last map, (B, h, w, num_classes).

    Args:
      entries: either "token_labels", which holds these probabilities, or "token_classes"
        (B, h, w, n) int and "token_scores" (B, h, w, n) float, the probabilities of some classes;
        the probabilities of a class that occurs more than once add up.
      num_classes: number of classes.
    """
    if "token_labels" in entries:
        return entries["token_labels"]
    one_hot = jax.nn.one_hot(entries["token_classes"], num_classes)
    return jnp.sum(one_hot * entries["token_scores"][..., None], axis=-2)


def token_cross_entropy(
    logits: jax.Array,
    dense_logits: jax.Array,
    targets: jax.Array,
    labels: jax.Array,
    weight: float,
) -> jax.Array:
    """Returns the loss () of a batch with token labels in nats, float32.

    Args:
      logits: logits of the images (B, num_classes).
      dense_logits: logits of the cells of the last map (B, h, w, num_classes).
      targets: class probabilities of the images (B, num_classes).
      labels: class probabilities of the cells (B, h, w, num_classes).
      weight: factor of the mean cross-entropy of the cells.

    References:
      Jiang et al. 2021, "All Tokens Matter", section "Token Labeling".
    """
    return cross_entropy(logits, targets) + weight * cross_entropy(dense_logits, labels)
