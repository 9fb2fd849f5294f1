"""Adaptive average pooling, as in PyTorch."""

import numpy as np
from jaxtyping import Array, Float

from tokenvit_jax.ops.counted import counted
from tokenvit_jax.ops.resize import multiply_axis


@counted(lambda inputs, outputs: 0, static_argnames=("side",))
def adaptive_average_pool(x: Float[Array, "B H W C"], side: int) -> Float[Array, "B side side C"]:
    """Averages maps over side x side cells that cover them.

    Rows floor(i H / side) to ceil((i + 1) H / side) - 1 belong to cell i: cells can share a row,
    and there can be more cells than rows (`torch.nn.AdaptiveAvgPool2d`).

    Args:
      x: (B, H, W, C).
      side: number of cells along each axis.

    Returns:
      (B, side, side, C) in the type of x.
    """
    y = x
    for axis in (1, 2):
        y = multiply_axis(y, _cell_weights(x.shape[axis], side), axis)
    return y.astype(x.dtype)


def _cell_weights(size: int, cells: int) -> np.ndarray:
    """Returns the weights (cells, size) of the means along one axis."""
    cell, place = np.arange(cells)[:, None], np.arange(size)
    first, last = cell * size // cells, -(-(cell + 1) * size // cells)
    inside = (first <= place) & (place < last)
    return inside / inside.sum(1, keepdims=True)
