"""Keypoints in images from the heat maps of crops."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from tokenvit_jax.data.person_crops import partners_of
from tokenvit_jax.data.record import Skeleton
from tokenvit_jax.ops.heatmaps import average_mirrored, decode_heatmaps, from_heatmap


def flip_tested(
    apply: Callable[[jax.Array], jax.Array], images: jax.Array, skeleton: Skeleton, *, shift: bool
) -> jax.Array:
    """Returns the mean of the heat maps of images and of their mirror images (B, h, w, K).

    Args:
      apply: maps images (B, H, W, C) to heat maps.
      images: the images.
      skeleton: provides the pairs.
      shift: as in :func:`~tokenvit_jax.ops.average_mirrored`.
    """
    both = apply(jnp.concatenate([images, images[:, :, ::-1]]))
    heatmaps, mirrored = jnp.split(both, 2)
    return average_mirrored(heatmaps, mirrored, partners_of(skeleton), shift=shift)


def keypoints_in_images(
    heatmaps: jax.Array,
    to_image: jax.Array,
    input_size: tuple[int, int],
    *,
    refinement: str,
    unbiased: bool,
) -> jax.Array:
    """Returns the keypoints in pixels of the images, (B, K, 3): x, y and score.

    Args:
      heatmaps: (B, h, w, K).
      to_image: affine maps from places in the crops to places in the images (B, 2, 3).
      input_size: height and width of the crops [pixels].
      refinement: as in :func:`~tokenvit_jax.ops.decode_heatmaps`.
      unbiased: as in :func:`~tokenvit_jax.ops.heatmaps.from_heatmap`.
    """
    found = decode_heatmaps(heatmaps, refinement)
    points = from_heatmap(found.points, input_size, heatmaps.shape[1:3], unbiased=unbiased)
    # Sums of products, not a product of matrices: places need float32 on every platform.
    x, y = points[..., :1], points[..., 1:]
    columns = to_image[:, None]  # (B, 1, 2, 3)
    places = x * columns[..., 0] + y * columns[..., 1] + columns[..., 2]
    return jnp.concatenate([places, found.scores[..., None]], -1)
