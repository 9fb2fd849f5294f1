"""Reads and writes rows at indices that differ from image to image."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped


def take(x: Shaped[Array, "..."], index: Int[Array, "..."]) -> Shaped[Array, "..."]:
    """Returns the rows of each image at its own indices.

    Args:
      x: rows (B, N, ...), or (B, H, N, ...) with an index per image and head.
      index: (B, K), or (B, H, K), in [0, N); the result is undefined if an index is out of range.

    Returns:
      (B, K, ...), or (B, H, K, ...).
    """
    axis = index.ndim - 1
    index = jnp.expand_dims(index, range(index.ndim, x.ndim))
    return jnp.take_along_axis(x, index, axis, mode="promise_in_bounds")


def put(
    x: Shaped[Array, "B N"], index: Int[Array, "B K"], values: Shaped[Array, "B K"]
) -> Shaped[Array, "B N"]:
    """Returns ``x`` with the entries of each image at its own indices replaced.

    Args:
      x: (B, N).
      index: (B, K), different numbers in each image; entries at index N are dropped.
      values: the new entries (B, K).
    """
    return jax.vmap(lambda row, at, new: row.at[at].set(new, mode="drop"))(x, index, values)


def add_rows(
    x: Shaped[Array, "B H N D"], index: Int[Array, "B H K"], rows: Shaped[Array, "B H K D"]
) -> Shaped[Array, "B H N D"]:
    """Returns ``x`` with rows added at the indices of each image and head.

    Args:
      x: (B, H, N, D).
      index: (B, H, K), in [0, N); the result is undefined if an index is out of range.
      rows: what is added (B, H, K, D); rows of equal index add up.
    """

    def add(x, index, rows):
        return x.at[index].add(rows, mode="promise_in_bounds")

    return jax.vmap(jax.vmap(add))(x, index, rows)
