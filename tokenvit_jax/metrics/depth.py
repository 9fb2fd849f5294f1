"""Compares depth maps with measured ones: nine metrics per image, and their means over images.

References:
  Eigen et al. 2014, "Depth Map Prediction from a Single Image using a Multi-Scale Deep Network";
  Garg et al. 2016, "Unsupervised CNN for Single View Depth Estimation"; Lee et al. 2019, "From Big
  to Small" (BTS), whose evaluation code others use.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokenvit_jax.errors import UserError

DELTA = 1.25  # ratio of prediction and truth that "delta1" allows
METRICS = (
    "abs_rel", "sq_rel", "rmse", "rmse_log", "silog", "log10", "delta1", "delta2", "delta3"
)  # fmt: skip


Box = tuple[int, int, int, int]  # left, top, right, bottom [pixels]


def _shares(left: float, top: float, right: float, bottom: float) -> Callable[[int, int], Box]:
    return lambda h, w: (int(left * w), int(top * h), int(right * w), int(bottom * h))


# Name of a crop -> function from height and width to the part that is compared. "garg" and "eigen"
# are for KITTI, "eigen_nyu" is for the 480 x 640 images of NYUv2.
CROPS: dict[str, Callable[[int, int], Box]] = {
    "none": lambda h, w: (0, 0, w, h),
    "garg": _shares(0.03594771, 0.40810811, 0.96405229, 0.99189189),
    "eigen": _shares(0.0359477, 0.3324324, 0.96405229, 0.91351351),
    "eigen_nyu": lambda h, w: (41, 45, 601, 471),
}


def comparable(truth: np.ndarray, limits: Sequence[float], boxes: Sequence[Box]) -> np.ndarray:
    """Returns a measured depth map with 0 at all pixels that are not compared.

    Args:
      truth: (H, W) float32 [metres], 0 where unknown.
      limits: depths between which, exclusively, a pixel is compared [metres].
      boxes: parts of the map; a pixel must be inside all of them.

    Returns:
      (H, W) float32.
    """
    low, high = limits
    kept = np.where((truth > low) & (truth < high), truth, np.float32(0))
    for left, top, right, bottom in boxes:
        inside = np.zeros_like(kept)
        inside[top:bottom, left:right] = kept[top:bottom, left:right]
        kept = inside
    return kept


def depth_metrics(
    prediction: jax.Array, truth: jax.Array, limits: Sequence[float]
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Computes the metrics of each image.

    Predictions are clipped to the limits. `METRICS` are the mean |p - t| / t, the mean
    (p - t)^2 / t [metres], the root mean squares of p - t [metres] and of ln p - ln t, the standard
    deviation of ln p - ln t times 100, the mean |log10 p - log10 t|, and the shares of pixels with
    max(p / t, t / p) below 1.25, 1.25^2 and 1.25^3.

    Args:
      prediction: (B, H, W) [metres].
      truth: (B, H, W) [metres], 0 at pixels that do not count.
      limits: lowest and highest prediction [metres].

    Returns:
      The metrics by name, (B,) float32, and the number of pixels that count (B,); without any, the
      metrics are 0.
    """
    counts = truth > 0
    pixels = counts.sum((1, 2))
    p = jnp.where(counts, jnp.clip(prediction.astype(jnp.float32), *limits), 1.0)
    t = jnp.where(counts, truth, 1.0)

    def mean(x):
        return jnp.where(counts, x, 0.0).sum((1, 2)) / jnp.maximum(pixels, 1)

    error, log_error = p - t, jnp.log(p) - jnp.log(t)
    centred = log_error - mean(log_error)[:, None, None]  # E[x^2] - E[x]^2 would lose digits
    ratio = jnp.maximum(p / t, t / p)
    found = {
        "abs_rel": mean(jnp.abs(error) / t),
        "sq_rel": mean(error**2 / t),
        "rmse": jnp.sqrt(mean(error**2)),
        "rmse_log": jnp.sqrt(mean(log_error**2)),
        "silog": 100 * jnp.sqrt(mean(centred**2)),
        "log10": mean(jnp.abs(log_error)) / np.log(10),
    }
    found |= {f"delta{n}": jnp.where(pixels > 0, mean(ratio < DELTA**n), 0.0) for n in (1, 2, 3)}
    return found, pixels


def depth_sums(
    prediction: jax.Array, truth: jax.Array, mask: jax.Array, limits: Sequence[float]
) -> dict[str, jax.Array]:
    """Returns the sums of :func:`depth_metrics` over the images that have a pixel to compare.

    Args:
      prediction: as in depth_metrics.
      truth: as in depth_metrics.
      mask: (B,), 0 for images to leave out.
      limits: as in depth_metrics.

    Returns:
      `METRICS`, "images", the number of images in these sums, and "images_left_out", the number of
      other images with a mask of 1.
    """
    metrics, pixels = depth_metrics(prediction, truth, limits)
    wanted = mask > 0
    used = wanted & (pixels > 0)
    sums = {name: jnp.where(used, values, 0.0).sum() for name, values in metrics.items()}
    return sums | {"images": used.sum(), "images_left_out": (wanted & ~used).sum()}


class DepthMeter:
    """Adds up :func:`depth_sums` over a pass, in float64."""

    def __init__(self):
        self._sums = dict.fromkeys((*METRICS, "images", "images_left_out"), 0.0)

    def add(self, outcome: Any) -> None:
        """Adds an `Outcome` with the sums of a batch."""
        for name in self._sums:
            self._sums[name] += float(outcome.sums[name])

    def result(self) -> dict[str, float]:
        """Returns the means over images, such as "eval/abs_rel", and "eval/images_left_out".

        Raises:
          UserError: no image has a pixel to compare.
        """
        images = self._sums["images"]
        if not images:
            raise UserError(
                "nothing was evaluated: no image of the split can be read, or none has a pixel with"
                " a depth between the limits"
            )
        means = {f"eval/{name}": self._sums[name] / images for name in METRICS}
        return means | {"eval/images_left_out": self._sums["images_left_out"]}

    def per_class(self) -> dict[str, np.ndarray]:
        """Returns {}: there are no classes."""
        return {}
