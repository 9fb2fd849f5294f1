"""Accuracy and loss of a classifier."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def accuracy_sums(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Returns sums over the images of a batch, which :class:`AccuracyMeter` turns into metrics.

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
        # Not losses * mask: padding may have any value, and infinity times 0 is not 0.
        "loss": jnp.sum(jnp.where(mask > 0, losses, 0.0)),
        "accuracy": jnp.sum(correct * mask),
        "count": jnp.sum(mask),
    }


class AccuracyMeter:
    """Adds up :func:`accuracy_sums` in float64, which is exact for any number of images."""

    def __init__(self):
        self._totals = {"accuracy": 0.0, "loss": 0.0}
        self._count = 0.0

    def add(self, outcome: Any) -> None:
        """Adds an `Outcome` with the sums of a batch."""
        for name in self._totals:
            self._totals[name] += float(outcome.sums[name])
        self._count += float(outcome.sums["count"])

    def result(self) -> dict[str, float]:
        """Returns "eval/accuracy", a fraction, and "eval/loss", nats per image."""
        return {f"eval/{name}": total / self._count for name, total in self._totals.items()}
