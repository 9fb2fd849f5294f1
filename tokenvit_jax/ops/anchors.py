"""Anchors: boxes of fixed sizes and shapes at every cell of a map, from which deltas are predicted.

References:
  Ren et al. 2015, "Faster R-CNN"; Lin et al. 2017, "Focal Loss for Dense Object Detection".
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Num


def cell_anchors(sizes: Sequence[float], ratios: Sequence[float]) -> np.ndarray:
    """Returns the anchors of the cell at the origin, ratio by ratio, with all sizes for each.

    An anchor of size s and ratio r is s / sqrt(r) wide and s sqrt(r) high.

    Args:
      sizes: square roots of the areas [pixels].
      ratios: height over width.

    Returns:
      (ratios * sizes, 4) float32, around (0, 0).
    """
    roots = np.sqrt(np.asarray(ratios, np.float64))[:, None]
    widths, heights = (np.asarray(sizes) / roots).ravel(), (np.asarray(sizes) * roots).ravel()
    return np.stack([-widths, -heights, widths, heights], 1).astype(np.float32) / 2


def grid_anchors(
    map_sizes: Sequence[tuple[int, int]], strides: Sequence[int], cells: Sequence[np.ndarray]
) -> np.ndarray:
    """Returns the anchors of all levels, (A, 4) float32: level by level, row by row, cell by cell.

    The anchors of the cell in row i and column j are around (j stride, i stride), its upper left
    corner in the image.

    Args:
      map_sizes: height and width of every map.
      strides: strides of the maps [pixels].
      cells: result of :func:`cell_anchors` for every map.
    """
    levels = []
    for (height, width), stride, cell in zip(map_sizes, strides, cells, strict=True):
        y, x = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
        corners = np.stack([x, y, x, y], -1).reshape(-1, 1, 4) * stride
        levels.append((corners + cell).reshape(-1, 4))
    return np.concatenate(levels).astype(np.float32)


def valid_anchors(
    map_sizes: Sequence[tuple[int, int]],
    strides: Sequence[int],
    per_cell: int,
    size: Num[Array, "2"],
) -> Bool[Array, " A"]:
    """Returns which anchors of :func:`grid_anchors` belong to cells in the image.

    The other cells lie in the padding.

    Args:
      map_sizes: height and width of every map.
      strides: strides of the maps [pixels].
      per_cell: number of anchors of a cell.
      size: height and width of the image [pixels]; it may be smaller than the maps.
    """
    levels = []
    for (height, width), stride in zip(map_sizes, strides, strict=True):
        rows = jnp.arange(height) * stride < size[0]
        columns = jnp.arange(width) * stride < size[1]
        inside = (rows[:, None] & columns)[..., None]
        levels.append(jnp.broadcast_to(inside, (height, width, per_cell)).reshape(-1))
    return jnp.concatenate(levels)


def inside_image(anchors: Float[Array, "A 4"], size: Num[Array, "2"]) -> Bool[Array, " A"]:
    """Returns which anchors do not cross the border of an image.

    Args:
      anchors: (A, 4) [x1 y1 x2 y2, pixels].
      size: height and width of the image [pixels].
    """
    return (anchors[:, :2] >= 0).all(1) & (anchors[:, 2:] < size[::-1]).all(1)
