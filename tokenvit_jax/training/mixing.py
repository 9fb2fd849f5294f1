"""Mixup and CutMix, inside the training step.

Sources: Zhang et al., "mixup: Beyond Empirical Risk Minimization"; Yun et al., "CutMix"; timm's
batch mode, which takes one ratio and one kind of mixing for the whole batch. timm's partner is
the image at the mirrored place of the batch; here it is the neighbour i ^ 1, so that the images
of a pair always lie on one device.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict


class Mixing(NamedTuple):
    """How to mix one batch.

    Attributes:
      ratio: () float32, part of an image that stays its own; 1 for a batch that is not mixed.
      box: (4,) int32, top, bottom, left, right of the rectangle that CutMix takes from the
        partner, in pixels, bottom and right exclusive.
      cutmix: () bool, CutMix rather than Mixup.
    """

    ratio: jax.Array
    box: jax.Array
    cutmix: jax.Array


def draw_mixing(rng: jax.Array, config: ConfigDict, height: int, width: int) -> Mixing:
    """Draws how to mix a batch.

    Args:
      rng: key of `jax.random`.
      config: `config.mix`: mixup and cutmix (parameters of the Beta distribution, 0: off),
        probability, switch_probability.
      height: of the images, pixels.
      width: of the images, pixels.

    Returns:
      The kind of mixing, its ratio and, for CutMix, its rectangle. With CutMix the ratio is the
      true one: the rectangle is cut off at the borders of the image.
    """
    apply_rng, switch_rng, ratio_rng, row_rng, column_rng = jax.random.split(rng, 5)
    if config.mixup and config.cutmix:
        cutmix = jax.random.bernoulli(switch_rng, config.switch_probability)
    else:
        cutmix = jnp.asarray(config.cutmix > 0)
    alpha = jnp.where(cutmix, config.cutmix, config.mixup)
    ratio = jax.random.beta(ratio_rng, alpha, alpha)
    applied = jax.random.bernoulli(apply_rng, config.probability)
    ratio = jnp.where(applied, ratio, 1.0)

    half_height = (height * jnp.sqrt(1.0 - ratio)).astype(jnp.int32) // 2
    half_width = (width * jnp.sqrt(1.0 - ratio)).astype(jnp.int32) // 2
    row = jax.random.randint(row_rng, (), 0, height)
    column = jax.random.randint(column_rng, (), 0, width)
    top, bottom = jnp.clip(jnp.stack([row - half_height, row + half_height]), 0, height)
    left, right = jnp.clip(jnp.stack([column - half_width, column + half_width]), 0, width)
    true_ratio = 1.0 - (bottom - top) * (right - left) / (height * width)
    return Mixing(
        ratio=jnp.where(cutmix, true_ratio, ratio).astype(jnp.float32),
        box=jnp.stack([top, bottom, left, right]),
        cutmix=cutmix,
    )


def mix_batch(images: jax.Array, targets: jax.Array, mixing: Mixing) -> tuple[jax.Array, jax.Array]:
    """Mixes every image and its target with those of its neighbour i ^ 1.

    Args:
      images: (B, H, W, C) float, B even.
      targets: (B, num_classes) class probabilities.
      mixing: what :func:`draw_mixing` drew.

    Returns:
      Images and targets of the same shapes.

    Raises:
      ValueError: B is odd.
    """
    if len(images) % 2:
        raise ValueError(f"images: a batch of {len(images)} cannot be paired; it must be even")
    rows = jnp.arange(images.shape[1])[:, None, None]
    columns = jnp.arange(images.shape[2])[None, :, None]
    top, bottom, left, right = mixing.box
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)  # (H, W, 1)
    own_part = jnp.where(mixing.cutmix, 1.0 - inside, mixing.ratio)
    mixed_images = images * own_part + _neighbours(images) * (1.0 - own_part)
    mixed_targets = targets * mixing.ratio + _neighbours(targets) * (1.0 - mixing.ratio)
    return mixed_images, mixed_targets


def _neighbours(x: jax.Array) -> jax.Array:
    """x[i ^ 1] for every i, written so that a batch that is split over devices stays there."""
    return x.reshape(-1, 2, *x.shape[1:])[:, ::-1].reshape(x.shape)
