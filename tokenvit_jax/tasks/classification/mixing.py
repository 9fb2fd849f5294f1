"""Applies Mixup, CutMix and MixToken inside the training step.

As in timm's batch mode, the whole batch has one ratio and one kind of mixing. timm pairs image i
with image B - 1 - i of the batch; here its partner is the neighbour i ^ 1, so that both images of a
pair are always on the same device.

References:
  Zhang et al. 2018, "mixup: Beyond Empirical Risk Minimization".
  Yun et al. 2019, "CutMix".
  Jiang et al. 2021, "All Tokens Matter", section "Token Labeling with MixToken".
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from tokenvit_jax.ops.mix_boxes import mix_boxes, neighbors

MIN_MIXTOKEN_GRID = 2  # cells along a side of the last map; in a single row, every box is empty


class Mixing(NamedTuple):
    """How to mix one batch.

    Attributes:
      ratio: () float32, the fraction of each image that is kept; 1: the batch is not mixed.
      box: (4,) int32, top, bottom, left, right of the rectangle that comes from the partner, in
        pixels (CutMix) or in cells of the last map (MixToken); bottom and right are exclusive.
      cutmix: () bool, whether to mix a rectangle rather than whole images (Mixup).
    """

    ratio: jax.Array
    box: jax.Array
    cutmix: jax.Array


def draw_mixing(rng: jax.Array, config: ConfigDict, height: int, width: int) -> Mixing:
    """Draws how to mix a batch by Mixup or CutMix.

    Args:
      rng: key of `jax.random`.
      config: `config.mix`: mixup and cutmix (parameters of the Beta distribution, 0: off),
        probability, switch_probability.
      height: image height [pixels].
      width: image width [pixels].

    Returns:
      The kind of mixing, its ratio and, for CutMix, its rectangle. CutMix clips the rectangle at
      the borders of the image; its ratio follows from the remaining area.
    """
    apply_rng, switch_rng, ratio_rng, center_rng = jax.random.split(rng, 4)
    if config.mixup and config.cutmix:
        cutmix = jax.random.bernoulli(switch_rng, config.switch_probability)
    else:
        cutmix = jnp.asarray(config.cutmix > 0)
    alpha = jnp.where(cutmix, config.cutmix, config.mixup)
    ratio = _draw_ratio(apply_rng, ratio_rng, alpha, config.probability)
    # Even, so that the centre is in the middle.
    sides = 2 * (_box_sides(ratio, height, width) // 2)
    box, true_ratio = _draw_box(center_rng, sides, height, width)
    ratio = jnp.where(cutmix, true_ratio, ratio).astype(jnp.float32)
    return Mixing(ratio=ratio, box=box, cutmix=cutmix)


def draw_token_mixing(rng: jax.Array, config: ConfigDict, height: int, width: int) -> Mixing:
    """Draws how MixToken mixes a batch: like CutMix, but in whole cells of the last map.

    Unlike in CutMix, the sides of the box may be odd, because the map has few cells.

    Args:
      rng: key of `jax.random`.
      config: `config.mix`: mixtoken (parameter of the Beta distribution), probability.
      height: height of the last map [cells].
      width: width of the last map [cells].
    """
    apply_rng, ratio_rng, center_rng = jax.random.split(rng, 3)
    ratio = _draw_ratio(apply_rng, ratio_rng, config.mixtoken, config.probability)
    sides = _box_sides(ratio, height, width)
    box, true_ratio = _draw_box(center_rng, sides, height, width)
    return Mixing(ratio=true_ratio.astype(jnp.float32), box=box, cutmix=jnp.asarray(True))


def _draw_ratio(apply_rng, ratio_rng, alpha, probability):
    ratio = _draw_beta(ratio_rng, alpha)
    applied = jax.random.bernoulli(apply_rng, probability)
    return jnp.where(applied, ratio, 1.0)


def _draw_beta(rng, alpha):
    """Draws from Beta(alpha, alpha) without the loops of `jax.random.beta`.

    In every round of such a loop, a GPU would wait for the host, and the host for the step before.

    The logit of Beta(a + 1, a + 1) plus a Laplace variable / a is that of Beta(a, a), because
    Gamma(a + 1) times U^(1 / a) is Gamma(a). The first comes from the projection of a sphere of
    2 a + 3 dimensions (Ulrich 1984; Devroye 1996, "Random variate generation in one line of code").
    """
    u, v, w = jax.random.uniform(rng, (3,))
    cosine = jnp.cos(2 * jnp.pi * v)
    larger = 0.5 + 0.5 * jnp.sqrt(1 - u ** (2 / (2 * alpha + 1))) * cosine
    laplace = jnp.sign(w - 0.5) * jnp.log1p(-abs(2 * w - 1))
    return jax.nn.sigmoid(jax.scipy.special.logit(larger) + laplace / alpha)


def _box_sides(ratio, height, width):
    """Returns the height and width of a box with the area 1 - ratio."""
    return (jnp.array([height, width]) * jnp.sqrt(1.0 - ratio)).astype(jnp.int32)


def _draw_box(center_rng, sides, height, width):
    """Returns a box around a random point, clipped at the borders, and the share outside it."""
    limits = jnp.array([height, width])
    first = jax.random.randint(center_rng, (2,), 0, limits) - sides // 2
    (top, left), (bottom, right) = jnp.clip(first, 0, limits), jnp.clip(first + sides, 0, limits)
    true_ratio = 1.0 - (bottom - top) * (right - left) / (height * width)
    return jnp.stack([top, bottom, left, right]), true_ratio


def mix_batch(images: jax.Array, targets: jax.Array, mixing: Mixing) -> tuple[jax.Array, jax.Array]:
    """Mixes every image and its target with its neighbour i ^ 1.

    Args:
      images: (B, H, W, C) float, B even.
      targets: (B, num_classes) class probabilities.
      mixing: result of :func:`draw_mixing`.

    Returns:
      Images and targets of the same shapes.

    Raises:
      ValueError: B is odd.
    """
    faded = _fade(images, mixing.ratio)
    images = jnp.where(mixing.cutmix, mix_boxes(images, mixing.box), faded)
    return images, mix_targets(targets, mixing)


def mix_targets(targets: jax.Array, mixing: Mixing) -> jax.Array:
    """Mixes every target with its neighbour i ^ 1, like :func:`mix_batch`."""
    return _fade(targets, mixing.ratio)


def _fade(x, ratio):
    return x * ratio + neighbors(x) * (1.0 - ratio)
