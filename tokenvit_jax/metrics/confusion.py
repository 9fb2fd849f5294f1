"""Computes the metrics of label maps from one confusion matrix."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokenvit_jax.errors import UserError


def confusion_matrix(
    predicted: jax.Array, labels: jax.Array, num_classes: int, ignored: int
) -> jax.Array:
    """Counts the pixels of each class (rows) that are predicted as each class (columns).

    Args:
      predicted: (...) int, classes in [0, num_classes).
      labels: (...) integers, classes or `ignored`.
      num_classes: K.
      ignored: label of pixels that do not count.

    Returns:
      (K, K) int32.
    """
    cell = jnp.where(labels == ignored, num_classes**2, labels.astype(jnp.int32) * num_classes)
    cell = jnp.minimum(cell + predicted, num_classes**2)
    counts = jnp.bincount(cell.reshape(-1), length=num_classes**2 + 1)[:-1]
    return counts.reshape(num_classes, num_classes).astype(jnp.int32)


class ConfusionMeter:
    """Adds up "confusion" (K, K) in int64 and "loss" () in float64 over a pass."""

    def __init__(self, num_classes: int):
        self._confusion = np.zeros((num_classes, num_classes), np.int64)
        self._loss = 0.0

    def add(self, outcome: Any) -> None:
        """Adds an `Outcome` with the sums of a batch."""
        self._confusion += np.asarray(outcome.sums["confusion"], np.int64)
        self._loss += float(outcome.sums["loss"])

    def result(self) -> dict[str, float]:
        """Returns the metrics of the pass.

        Returns:
          Fractions: "eval/miou", the intersection of prediction and label divided by their union,
          averaged over the classes that occur in either; "eval/accuracy", the accuracy of the
          pixels; "eval/class_accuracy", the accuracy averaged over the classes that occur in the
          labels. "eval/loss" is in nats per pixel.

        Raises:
          UserError: no pixel counts.
        """
        right, wanted = np.diag(self._confusion), self._confusion.sum(1)
        if not wanted.any():
            raise UserError(
                "nothing was evaluated: no image of the split can be read, or no pixel has a class"
            )
        return {
            "eval/miou": float(np.nanmean(self.per_class()["iou"])),
            "eval/accuracy": float(right.sum() / wanted.sum()),
            "eval/class_accuracy": float(np.mean(right[wanted > 0] / wanted[wanted > 0])),
            "eval/loss": self._loss / float(wanted.sum()),
        }

    def per_class(self) -> dict[str, np.ndarray]:
        """Returns "iou" and "accuracy" of every class, (num_classes,), as fractions.

        "iou" is nan for classes that occur in neither predictions nor labels, "accuracy" for
        classes that do not occur in the labels.
        """
        right, wanted, found = np.diag(self._confusion), *map(self._confusion.sum, (1, 0))
        union = wanted + found - right
        pairs = {"iou": union, "accuracy": wanted}
        return {name: right / np.where(all_ > 0, all_, np.nan) for name, all_ in pairs.items()}
