"""Losses of depth maps, one number per image; pixels whose truth is 0 are unknown."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

FOCUS = 0.85  # weight of the squared mean in SILog, as in BTS
STEPS = 1, 2, 4, 8  # distances of the pixels that the four scales of the gradient loss keep
GRADIENT_WEIGHT = 0.5  # of the gradient loss, summed over the scales
_TINY = 1e-12


def silog(prediction: jax.Array, truth: jax.Array, focus: float = FOCUS) -> jax.Array:
    """Returns the root of a scale-invariant logarithmic error of every image, (B,) float32.

    The loss is sqrt(mean(e^2) - focus mean(e)^2) over the pixels that count, e = ln p - ln t; 0 for
    an image without any.

    Args:
      prediction: (B, H, W), above 0 [metres].
      truth: (B, H, W) [metres], 0 where unknown.
      focus: weight of the squared mean; 1 ignores the scale of the prediction.

    References:
      Eigen et al. 2014, Eq. 4; Lee et al. 2019, "From Big to Small", Eq. 5, which takes one root
      over the batch.
    """
    known = truth > 0
    pixels = jnp.maximum(known.sum((1, 2)), 1)
    error = jnp.log(jnp.where(known, prediction, 1.0)) - jnp.log(jnp.where(known, truth, 1.0))
    mean = error.sum((1, 2)) / pixels
    # mean(e^2) - mean(e)^2 as the mean of squares: the difference would lose digits.
    centred = jnp.where(known, error - mean[:, None, None], 0.0)
    variance = (centred**2).sum((1, 2)) / pixels
    inside = variance + (1 - focus) * mean**2
    # The gradient of the root is not finite at 0, a perfect prediction or an image without depth.
    return jnp.where(known.any((1, 2)), jnp.sqrt(inside + _TINY), 0.0)


def align(prediction: jax.Array, truth: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the scale and the shift (B,) with which predictions fit the truth best.

    They are the least-squares solution over the pixels that count; 0 and 0 where it is not unique.

    Args:
      prediction: (B, H, W).
      truth: (B, H, W), 0 where unknown.
    """
    known = truth > 0
    pixels = jnp.maximum(known.sum((1, 2)), 1)

    def mean(x):
        return jnp.where(known, x, 0.0).sum((1, 2)) / pixels

    means = mean(prediction), mean(truth)
    p, t = (x - m[:, None, None] for x, m in zip((prediction, truth), means, strict=True))
    variance = mean(p**2)
    unique = variance > _TINY * mean(prediction**2)
    scale = jnp.where(unique, mean(p * t) / jnp.where(unique, variance, 1.0), 0.0)
    return scale, jnp.where(unique, means[1] - scale * means[0], 0.0)


def count_pixels(truth: jax.Array) -> jax.Array:
    """Returns the number of pixels that count in each image: all, and at each scale, (B, 5)."""
    return jnp.stack([(x > 0).sum((1, 2)) for x in (truth, *_scales(truth))], 1)


def scale_and_shift_invariant(
    prediction: jax.Array, truth: jax.Array, pixels: jax.Array
) -> jax.Array:
    """Returns a loss of every image that ignores scale and shift of the prediction, (B,) float32.

    The prediction is first fitted to the truth (:func:`align`; gradients pass through the fit). The
    loss is the sum of the squared residuals / (2 M) plus half the sum, over four scales, of the
    absolute differences of neighbouring residuals / M.

    Args:
      prediction: (B, H, W), such as inverse depth.
      truth: (B, H, W), 0 where unknown.
      pixels: (B, 5), the divisors M: :func:`count_pixels` for means over each image, or their means
        over the batch, so that the mean of the losses is a mean over its pixels.

    References:
      Ranftl et al. 2020, "Towards Robust Monocular Depth Estimation", Eqs. 4 to 6 and 11.
    """
    scale, shift = align(prediction, truth)
    fitted = scale[:, None, None] * prediction + shift[:, None, None]
    residual, known = jnp.where(truth > 0, fitted - truth, 0.0), truth > 0
    pixels = jnp.maximum(pixels, 1)
    loss = (residual**2).sum((1, 2)) / (2 * pixels[:, 0])
    for level, (r, k) in enumerate(zip(_scales(residual), _scales(known), strict=True), 1):
        down = jnp.abs(r[:, 1:] - r[:, :-1]) * (k[:, 1:] & k[:, :-1])
        right = jnp.abs(r[:, :, 1:] - r[:, :, :-1]) * (k[:, :, 1:] & k[:, :, :-1])
        sums = down.sum((1, 2)) + right.sum((1, 2))
        loss = loss + GRADIENT_WEIGHT * sums / pixels[:, level]
    return loss


def _scales(x: jax.Array) -> Iterator[jax.Array]:
    """Yields every 1st, 2nd, 4th and 8th row and column of maps (B, H, W)."""
    return (x[:, ::step, ::step] for step in STEPS)
