"""Adds many arrays over GPUs as few long vectors, *buckets*.

XLA joins the messages of GPUs, too, but only after it has chosen the kernels: quotients and casts
in front of a sum and slices behind it are then launches of their own, one for each array. Here
they are parts of the kernel that joins a bucket, and of the kernels that read the sums.
"""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

# XLA joins messages up to 30 MiB, by copies. Several buckets, so that the gradients of the last
# layers travel while those of the first layers are computed.
_BYTES = 32 * 2**20
# Arrays that one kernel joins: of 102, XLA left the quotients outside of the kernel.
_OPERANDS = 64
# Values of an array that may be copied twice, which takes less than a launch.
_SMALL = 2**16


def plan(grads: Sequence[jax.Array], layers: Sequence[int], itemsize: int) -> list[list[int]]:
    """Returns the numbers of the arrays of each bucket; small arrays end the last bucket.

    Args:
      grads: the arrays.
      layers: layer of each array, counted from the images; gradients of the last are known first.
      itemsize: bytes of a value.
    """
    large = [i for i, x in enumerate(grads) if x.size > _SMALL]
    # Vectors are neighbours, so that the update of all vectors reads them as one slice.
    small = sorted(set(range(len(grads))) - set(large), key=lambda i: (grads[i].ndim > 1, i))
    room = max(1, _OPERANDS - math.ceil(len(small) / _OPERANDS))
    buckets, size = [[]], 0
    for i in sorted(large, key=lambda i: -layers[i]):
        if size >= _BYTES or len(buckets[-1]) >= room:
            buckets.append([])
            size = 0
        buckets[-1].append(i)
        size += grads[i].size * itemsize
    buckets[-1] += small
    return buckets


def join(arrays: Sequence[jax.Array]) -> jax.Array:
    """Returns one vector of all values; small arrays are last."""
    flat = [x.reshape(-1) for x in arrays]
    if len(flat) > _OPERANDS:
        first = next(i for i, x in enumerate(flat) if x.size <= _SMALL)
        starts = range(first, len(flat), _OPERANDS)
        joined = [jnp.concatenate(flat[i : i + _OPERANDS]) for i in starts]
        # The barrier keeps XLA from joining all in one kernel again, and casting outside of it.
        flat = [*flat[:first], *lax.optimization_barrier(joined)]
    return jnp.concatenate(flat)


def split(flat: jax.Array, like: Sequence[jax.Array]) -> list[jax.Array]:
    """Undoes :func:`join` by slices, which fuse with their readers.

    Args:
      flat: the vector.
      like: arrays of the shapes of those that were joined.
    """
    ends = itertools.accumulate(x.size for x in like)
    return [flat[end - x.size : end].reshape(x.shape) for x, end in zip(like, ends, strict=True)]


def add(
    grads: Sequence[jax.Array],
    layers: Sequence[int],
    others: Sequence[jax.Array],
    axis_name: str | tuple[str, ...],
    dtype: DTypeLike,
) -> tuple[list[jax.Array], jax.Array, list[jax.Array]]:
    """Adds arrays over devices.

    Args:
      grads: gradients.
      layers: layer of each gradient; see :func:`plan`.
      others: scalars and vectors, which travel in float32.
      axis_name: mapped axis or axes of the devices.
      dtype: type in which the gradients travel and are added.

    Returns:
      The sums of the gradients, in the type, and their global norm; the sums of the others.
    """
    dtype = jnp.dtype(dtype)
    buckets = plan(grads, layers, dtype.itemsize)
    lists = [[grads[i].astype(dtype) for i in bucket] for bucket in buckets]
    others = [x.astype(jnp.float32) for x in others]
    lists = [*lists[:-1], lists[-1] + others] if dtype == jnp.float32 else [*lists, others]
    flats = []
    for arrays in lists:
        flat = join(arrays)
        if flats:  # XLA joins only messages that do not depend on each other
            flat, flats[-1] = lax.optimization_barrier((flat, flats[-1]))
        flats.append(lax.psum(flat, axis_name))
    squares = 0.0
    for flat, bucket in zip(flats, buckets, strict=False):
        values = flat[: sum(grads[i].size for i in bucket)]
        squares += jnp.square(values.astype(jnp.float32)).sum()
    parts = itertools.chain(*map(split, flats, lists))
    added = dict(zip(itertools.chain(*buckets), parts, strict=False))
    return [added[i] for i in range(len(grads))], jnp.sqrt(squares), [*parts]
