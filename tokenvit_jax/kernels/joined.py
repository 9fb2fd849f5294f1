"""Queries, keys and values that kernels read in the array whose thirds they are.

One projection computes all three. As arguments of a kernel of their own, they would be copied out
of its result, and their gradients would be copied into one array.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

Parts = tuple[Array, ...]  # queries, keys and values (..., N, D), or all in one (..., 3, N, D)


def parts_of(
    q: Float[Array, "... N D"], k: Float[Array, "... N D"], v: Float[Array, "... N D"], joined: bool
) -> Parts:
    """Returns the arguments of a kernel.

    Args:
      q: queries (..., N, D).
      k: keys (..., N, D).
      v: values (..., N, D).
      joined: whether they are the thirds of the last axis of one array, with the heads in it. Then
        the compiler leaves out that they are cut from it and joined here.
    """
    if not joined:
        return q, k, v
    flat = jnp.concatenate([x.reshape(*x.shape[:-2], -1) for x in (q, k, v)], -1)
    return (flat.reshape(*q.shape[:-2], 3, *q.shape[-2:]),)


def inputs_of(parts: Parts, spec: pl.BlockSpec) -> tuple[list[Array], list[pl.BlockSpec]]:
    """Returns the arrays that a kernel reads queries, keys and values from, and their blocks.

    Args:
      parts: the arguments.
      spec: the block of an array (..., N, D).
    """
    if len(parts) == 3:
        return list(parts), [spec] * 3
    return list(parts) * 3, [_with_part(spec, None, part) for part in range(3)]


def gradients_of(parts: Parts, spec: pl.BlockSpec) -> tuple[list[Any], list[pl.BlockSpec]]:
    """Returns the shapes of the gradients, like ``parts``, and their blocks, like ``spec``."""
    specs = [spec] * 3 if len(parts) == 3 else [_with_part(spec, 3, 0)]
    return [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in parts], specs


def gradient_refs(refs: Sequence[Any]) -> list[tuple[Any, tuple[int, ...]]]:
    """Returns the references for the gradients of queries, keys and values.

    Args:
      refs: one reference each, or one for all.

    Returns:
      Each with the indices that come before the last axis.
    """
    return [(ref, ()) for ref in refs] if len(refs) == 3 else [(refs[0], (i,)) for i in range(3)]


def _with_part(spec, size, first):
    """Returns the block of an array that has an axis for the parts in front of the heads."""

    def index(*numbers):
        at = spec.index_map(*numbers)
        return (*at[:-2], first, *at[-2:])

    return pl.BlockSpec((*spec.block_shape[:-2], size, *spec.block_shape[-2:]), index)
