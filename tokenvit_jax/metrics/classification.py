"""Accuracy and loss of a classifier."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tokenvit_jax.errors import UserError

TOP_K = 5


def accuracy_sums(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Returns sums over the images of a batch, which :class:`AccuracyMeter` turns into metrics.

    Args:
      logits: (B, num_classes).
      labels: (B,) int.
      mask: (B,) 1.0 for an image, 0.0 for padding.

    Returns:
      "loss" (nats) and "accuracy_top5" (images whose class is among the five largest logits), ()
      float32 each; "correct" and "count", images of each class that are classified correctly and
      all images of each class, (num_classes,) float32. "accuracy_top5" is left out if there are
      five classes or fewer.
    """
    num_classes = logits.shape[-1]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
    correct = (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
    by_class = jax.nn.one_hot(labels, num_classes) * mask[:, None]
    sums = {
        # Not losses * mask: padding may have any value, and infinity times 0 is not 0.
        "loss": jnp.sum(jnp.where(mask > 0, losses, 0.0)),
        "correct": correct @ by_class,
        "count": jnp.sum(by_class, axis=0),
    }
    if num_classes > TOP_K:
        _, best = jax.lax.top_k(logits, TOP_K)
        found = jnp.any(best == labels[:, None], axis=-1)
        sums["accuracy_top5"] = jnp.sum(found * mask)
    return sums


class AccuracyMeter:
    """Adds up :func:`accuracy_sums` in float64, which is exact for any number of images."""

    def __init__(self):
        self._totals = {}

    def add(self, outcome: Any) -> None:
        """Adds an `Outcome` with the sums of a batch."""
        for name, value in outcome.sums.items():
            self._totals[name] = self._totals.get(name, 0.0) + np.asarray(value, np.float64)

    def result(self) -> dict[str, float]:
        """Returns the metrics of the pass.

        Returns:
          Fractions: "eval/accuracy" and, with more than five classes, "eval/accuracy_top5".
          "eval/loss" is in nats per image.

        Raises:
          UserError: no image counts.
        """
        totals = dict(self._totals)
        count = totals.pop("count", np.zeros(1)).sum()
        if not count:
            raise UserError("nothing was evaluated: no image of the split can be read")
        totals["accuracy"] = totals.pop("correct").sum()
        return {f"eval/{name}": float(totals[name] / count) for name in sorted(totals)}

    def per_class(self) -> dict[str, np.ndarray]:
        """Returns "accuracy" (num_classes,), a fraction; nan for classes without images."""
        count = self._totals["count"]
        return {"accuracy": self._totals["correct"] / np.where(count > 0, count, np.nan)}
