"""Position embeddings of the cells of a map."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

TEMPERATURE = 10000.0


def sine_positions(size: tuple[int, int], dim: int) -> Float[Array, "h w dim"]:
    """Returns sines and cosines of the places of cells, (h, w, dim) in float32.

    The first half of the channels is for rows, the second one for columns. Cell i of n lies at the
    angle 2 pi (i + 1) / (n + 1e-6); channels 2 j and 2 j + 1 of a half are the sine and the cosine
    of the angle over 10000^(4 j / dim).

    Args:
      size: rows h and columns w.
      dim: number of channels, a multiple of 4.

    Raises:
      ValueError: ``dim`` is not a multiple of 4.

    References:
      Carion et al. 2020, "End-to-End Object Detection with Transformers", Supplement A.4, with
      normalised places as in the code.
    """
    if dim < 4 or dim % 4:
        raise ValueError(f"dim={dim} is not valid; valid: multiples of 4")
    rows, columns = (jnp.asarray(_table(length, dim // 2)) for length in size)
    shape = (*size, dim // 2)
    rows = jnp.broadcast_to(rows[:, None], shape)
    return jnp.concatenate([rows, jnp.broadcast_to(columns, shape)], -1)


def _table(length: int, dim: int) -> np.ndarray:
    """Returns the channels of one direction (length, dim) float32."""
    angles = 2 * np.pi * np.arange(1, length + 1) / (length + 1e-6)
    angles = angles[:, None] / TEMPERATURE ** (2 * np.arange(dim // 2) / dim)
    table = np.stack([np.sin(angles), np.cos(angles)], -1).reshape(length, dim)
    return table.astype(np.float32)
