"""Attention of cells of several maps to a few places of all maps."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import constant, xavier_uniform, zeros
from jaxtyping import Array, Float

from tokenvit_jax import ops
from tokenvit_jax.layers.blocks import check_num_heads, dense
from tokenvit_jax.ops.heads import merge_heads


class DeformableAttention(nn.Module):
    """Multi-head attention to places around a reference point, which the queries predict.

    At first, all places have equal weights, and those of a head lie in one direction, at distances
    of 1, 2, ... cells.

    Attributes:
      num_heads: number of heads, a divisor of C.
      num_points: places of a head in a map.
      dtype: type of the computation; places are float32.

    Raises:
      UserError: num_heads does not divide C.

    References:
      Zhu et al. 2021, "Deformable DETR", Eq. 3 and Supplement A.4.
    """

    num_heads: int = 8
    num_points: int = 4
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        queries: Float[Array, "B Q C"],
        cells: Float[Array, "B S C"],
        references: Float[Array, "*q 2"],
        shapes: tuple[tuple[int, int], ...],
    ) -> Float[Array, "B Q C"]:
        """Attends.

        Args:
          queries: queries (B, Q, C).
          cells: cells of all maps (B, S, C), map after map and row by row.
          references: x and y of the queries (Q, 2), as in
            :func:`~tokenvit_jax.ops.deformable_attention`.
          shapes: rows and columns of each map.
        """
        channels, heads, points = cells.shape[-1], self.num_heads, self.num_points
        check_num_heads(heads, channels)
        shape = (*queries.shape[:2], heads, len(shapes), points)
        start = initial_offsets(heads, len(shapes), points).reshape(-1)
        offsets = dense(start.size, jnp.float32, "offsets", zeros, bias_init=constant(start))(
            queries
        ).reshape(*shape, 2)
        sizes = jnp.array([(width, height) for height, width in shapes], jnp.float32)
        places = references[:, None, None, None] + offsets / sizes[:, None]
        weights = dense(heads * len(shapes) * points, self.dtype, "weights", zeros)(queries)
        weights = jax.nn.softmax(weights.reshape(*shape[:3], -1)).reshape(shape)
        value = dense(channels, self.dtype, "value", xavier_uniform())(cells)
        value = value.reshape(*value.shape[:2], heads, -1)
        y = ops.deformable_attention(value, places, weights, shapes=shapes)
        return dense(channels, self.dtype, "output", xavier_uniform())(merge_heads(y))


def initial_offsets(
    num_heads: int, num_maps: int, num_points: int
) -> Float[np.ndarray, "heads maps points 2"]:
    """Returns the initial offsets of places, x and y, (num_heads, num_maps, num_points, 2) [cells].

    Place p of head h lies in the direction 2 pi h / num_heads, on the square of p + 1 cells around
    the reference point.
    """
    # In float32, so that the offsets are those of the published code to the last digit.
    angles = np.arange(num_heads, dtype=np.float32) * np.float32(2 * np.pi / num_heads)
    directions = np.stack([np.cos(angles), np.sin(angles)], -1)
    directions /= np.abs(directions).max(-1, keepdims=True)
    steps = np.arange(1, num_points + 1, dtype=np.float32)[:, None]
    offsets = directions[:, None, None] * steps
    return np.broadcast_to(offsets, (num_heads, num_maps, num_points, 2))


def cell_centers(size: tuple[int, int]) -> Float[np.ndarray, "n 2"]:
    """Returns x and y of the centres of a map's cells (h w, 2), row by row; 0 and 1: its borders.

    Args:
      size: rows h and columns w.
    """
    rows, columns = ((np.arange(length) + 0.5) / length for length in size)
    grid = np.meshgrid(columns, rows)
    return np.stack(grid, -1).reshape(-1, 2).astype(np.float32)
