"""Targets and losses of image classification."""

from collections.abc import Mapping

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


def token_label_entries(batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns the entries of a batch that :func:`token_labels` reads."""
    return {name: batch[name] for name in batch if name.startswith("token_")}


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
