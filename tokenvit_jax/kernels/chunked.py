"""Computes in chunks, which stay in the cache on CPU."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped

from tokenvit_jax.kernels.platforms import device_batch

# Largest number of logits to hold at once on a CPU (16 MiB): more would not fit into the cache.
MAX_LOGITS = 2**22


def one_by_one(run: Callable[..., Array], *stacked: Any) -> Array:
    """Computes ``run`` for one entry of the leading axis after another.

    The backward pass computes each entry again instead of keeping intermediate results.

    Args:
      run: function of one entry of each argument.
      stacked: arrays (S, ...), or None.

    Returns:
      The results (S, ...).
    """
    run = jax.checkpoint(run, prevent_cse=False)
    return lax.map(lambda entries: run(*entries), stacked)


def num_chunks(batch: int, heads: int, length: int, num_keys: int) -> int:
    """Returns in how many chunks :func:`map_queries` computes."""
    logits = device_batch(batch) * heads * length * num_keys
    return min(-(-logits // MAX_LOGITS), length)


def map_queries(
    run: Callable[..., Array], num_keys: int, *queries: Shaped[Array, "B N L ..."]
) -> Shaped[Array, "B N L ..."]:
    """Computes ``run(*queries)`` in chunks of queries with about ``MAX_LOGITS`` logits each.

    Args:
      run: function from arrays (B, N, l, ...) to (B, N, l, ...). With several chunks, the backward
        pass computes the logits of each chunk again.
      num_keys: number of logits per query and head.
      queries: arrays (B, N, L, ...) that belong together.

    Returns:
      (B, N, L, ...).
    """
    batch, heads, length = queries[0].shape[:3]
    chunks = num_chunks(batch, heads, length, num_keys)
    if chunks == 1:
        return run(*queries)
    size = -(-length // chunks)
    padding = -length % size

    def split(x):  # (chunks, B, N, size, ...)
        x = jnp.pad(x, [(0, padding if axis == 2 else 0) for axis in range(x.ndim)])
        return jnp.moveaxis(x.reshape(batch, heads, -1, size, *x.shape[3:]), 2, 0)

    output = jnp.moveaxis(one_by_one(run, *map(split, queries)), 0, 2)
    return output.reshape(batch, heads, length + padding, *output.shape[4:])[:, :, :length]
