"""Kernels of clustering by density peaks for TPUs (Pallas-Mosaic).

A program holds the keys of an image and a block of queries, and streams over blocks of keys. The
matrix unit is fast enough to search all tokens for a denser one, without a list of those that have
none among their neighbours: a TPU cannot gather them.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from tokenvit_jax.kernels.density_peaks import insert_entry, is_denser, squared_distances
from tokenvit_jax.kernels.tpus import has_large_vmem, vmem_limit

# Queries and keys per block: the number of lanes.
BLOCK = 128
# Bytes of an image that fit into the memory of a core twice, because the next image is loaded
# meanwhile: on any TPU, and on TPUs with much memory.
MOST_BYTES, MOST_BYTES_IN_LARGE_VMEM = 4 << 20, 24 << 20
MOST_NEIGHBORS = 16


def misfit(
    num_keys: int, channels: int, dtype: DTypeLike, neighbors: int = 1, masked: bool = False
) -> str | None:
    """Returns why the kernels cannot take such images, or None.

    Args:
      num_keys: tokens or centres that are searched.
      channels: C.
      dtype: type of the tokens; Mosaic does not load float16.
      neighbors: k.
      masked: whether tokens are masked; centres cannot be.
    """
    if masked:
        return "masked tokens"
    if jnp.dtype(dtype) == jnp.float16:
        return "float16"
    most = MOST_BYTES_IN_LARGE_VMEM if has_large_vmem() else MOST_BYTES
    if _padded(num_keys) * _padded(channels) * jnp.dtype(dtype).itemsize > most:
        return f"{num_keys} keys with {channels} channels exceed {most >> 20} MiB"
    if neighbors > MOST_NEIGHBORS:
        return f"{neighbors} neighbors are more than {MOST_NEIGHBORS}"
    return None


def _padded(length):
    return -(-length // BLOCK) * BLOCK


def _call(kernel, x, rows, outputs, interpret):
    """Calls a kernel for every image and block of queries.

    The kernel has references to the tokens of an image (padded N, C), to those of its queries
    (BLOCK, C), to each of the rows as a whole (1, padded N), and to its part of each output
    (..., BLOCK).

    Args:
      x: tokens (B, N, C).
      rows: numbers of the tokens, (B, N) each.
      outputs: shapes and types of the results (B, ..., N).
    """
    batch, length, channels = x.shape
    # Blocks may reach beyond an image, where they hold any values, even NaN.
    image = pl.BlockSpec((None, _padded(length), channels), lambda i, j: (i, 0, 0))
    queries = pl.BlockSpec((None, BLOCK, channels), lambda i, j: (i, j, 0))
    row = pl.BlockSpec((None, 1, _padded(length)), lambda i, j: (i, 0, 0))
    return pl.pallas_call(
        functools.partial(kernel, length=length),
        grid=(batch, _padded(length) // BLOCK),
        in_specs=[image, queries] + [row] * len(rows),
        out_specs=[
            pl.BlockSpec((None, out.shape[1], BLOCK), lambda i, j: (i, 0, j)) for out in outputs
        ],
        out_shape=outputs,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=vmem_limit()
        ),
        interpret=interpret,
    )(x, x, *(row[:, None] for row in rows))


def _part(ref, i):
    """Returns block i of a row (1, padded N) as (1, BLOCK)."""
    return ref[:, pl.ds(pl.multiple_of(i * BLOCK, BLOCK), BLOCK)]


def _keys(x, i):
    return x[pl.ds(pl.multiple_of(i * BLOCK, BLOCK), BLOCK), :]


def _products(a, b):
    """Returns a.b (rows of a, rows of b)."""
    # Products of two numbers of 16 bits are exact in float32. Without a precision they would take
    # that of `jax.default_matmul_precision`, and Mosaic knows no other one for them.
    exact = a.dtype.itemsize == 2
    return lax.dot_general(
        a, b, (((1,), (1,)), ((), ())),
        precision=lax.Precision.DEFAULT if exact else lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )  # fmt: skip


def _halves(keys, queries):
    """Returns |key|^2 / 2 - key.query (keys, queries): halves save a multiplication."""
    wide = keys.astype(jnp.float32)
    return 0.5 * jnp.sum(wide * wide, 1, keepdims=True) - _products(keys, queries)


def _iota(axis):
    return lax.broadcasted_iota(jnp.int32, (BLOCK, BLOCK), axis)


def _first(values, index, axis):
    """Returns the smallest values along an axis, which stays, and their lowest index."""
    low = values.min(axis, keepdims=True)
    none = jnp.iinfo(jnp.int32).max
    return low, jnp.where(values == low, index, none).min(axis, keepdims=True)


# ------------------------------------------------------------------------------------------------
# Pass 1: nearest neighbours. Keys are along the sublanes, queries along the lanes
# ------------------------------------------------------------------------------------------------


def nearest_neighbors(
    x: Float[Array, "B N C"], square: Float[Array, "B N"], *, k: int, interpret: bool = False
) -> tuple[Float[Array, "B k N"], Int32[Array, "B k N"], Float[Array, "B N"]]:
    """Finds the k nearest tokens of every token, and the distance of the farthest one.

    Args:
      x: tokens (B, N, C).
      square: |x|^2 (B, N).
      k: number of neighbours, at most N and ``MOST_NEIGHBORS``.
      interpret: run on a CPU, for tests.

    Returns:
      Rising squared distances and indices (B, k, N), and the largest squared distance of each token
      (B, N).
    """
    batch, length, _ = x.shape
    outputs = [
        jax.ShapeDtypeStruct((batch, k, length), jnp.float32),
        jax.ShapeDtypeStruct((batch, k, length), jnp.int32),
        jax.ShapeDtypeStruct((batch, 1, length), jnp.float32),
    ]
    squares, indices, farthest = _call(_nearest_kernel, x, [square], outputs, interpret)
    return squares, indices, farthest[:, 0]


def _nearest_kernel(x, queries, square, squares, indices, farthest, *, length):
    k = squares.shape[0]
    query = queries[...]

    def step(i, carry):
        values, numbers, far = carry
        keys = _keys(x, i)
        index = i * BLOCK + _iota(0)
        tile = _halves(keys, query)
        tile = jnp.where(index < length, tile, jnp.inf)
        far = jnp.maximum(far, jnp.where(tile < jnp.inf, tile, -jnp.inf).max(0, keepdims=True))
        for _ in range(k):
            low, at = _first(tile, index, 0)
            values, numbers = insert_entry(low, at, values, numbers)
            tile = jnp.where(index == at, jnp.inf, tile)
        return values, numbers, far

    none = jnp.full((1, BLOCK), jnp.inf, jnp.float32)
    carry = (none,) * k, (jnp.zeros((1, BLOCK), jnp.int32),) * k, -none
    values, numbers, far = lax.fori_loop(0, x.shape[0] // BLOCK, step, carry)
    own = _part(square, pl.program_id(1))
    for i in range(k):
        squares[i : i + 1, :] = squared_distances(2 * values[i], own, x.dtype)
        indices[i : i + 1, :] = numbers[i]
    farthest[...] = squared_distances(2 * far, own, x.dtype)


# ------------------------------------------------------------------------------------------------
# Pass 2: nearest denser token. Queries are along the sublanes, keys along the lanes
# ------------------------------------------------------------------------------------------------


def nearest_denser(
    x: Float[Array, "B N C"],
    square: Float[Array, "B N"],
    density: Float[Array, "B N"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B N"], Int32[Array, "B N"]]:
    """Finds the nearest denser token of every token.

    Args:
      x: tokens (B, N, C).
      square: |x|^2 (B, N).
      density: (B, N); of two equally dense tokens the one with the lower index counts as denser.
      interpret: run on a CPU, for tests.

    Returns:
      Squared distance and index (B, N); inf and the token itself if there is no denser token.
    """
    batch, length, _ = x.shape
    outputs = [
        jax.ShapeDtypeStruct((batch, 1, length), dtype) for dtype in (jnp.float32, jnp.int32)
    ]
    found, parent = _call(_denser_kernel, x, [square, density], outputs, interpret)
    return found[:, 0], parent[:, 0]


def _denser_kernel(x, queries, square, density, found, parent, *, length):
    block = pl.program_id(1)
    query, rows = queries[...], block * BLOCK + _iota(0)
    # Rows become columns by a transpose: there is no cheaper way.
    own = jnp.broadcast_to(_part(density, block), (BLOCK, BLOCK)).T

    def step(i, carry):
        best, number = carry
        keys = i * BLOCK + _iota(1)
        denser = is_denser(_part(density, i), keys, own, rows)
        tile = 0.5 * _part(square, i) - _products(query, _keys(x, i))
        nearer = denser & (keys < length) & (tile < best)
        return jnp.where(nearer, tile, best), jnp.where(nearer, keys, number)

    best = jnp.full((BLOCK, BLOCK), jnp.inf, jnp.float32)
    best, number = lax.fori_loop(0, x.shape[0] // BLOCK, step, (best, rows))
    low, at = _first(best, number, 1)  # without a denser token, all numbers are the token itself
    as_row = lambda column: jnp.broadcast_to(column, (BLOCK, BLOCK)).T[:1]  # noqa: E731
    found[...] = squared_distances(2 * as_row(low), _part(square, block), x.dtype)
    parent[...] = as_row(at)


# ------------------------------------------------------------------------------------------------
# Clusters. Keys are along the sublanes, queries along the lanes
# ------------------------------------------------------------------------------------------------


def nearest_center(
    x: Float[Array, "B N C"],
    centers: Float[Array, "B M C"],
    num_used: Int32[Array, " B"],
    *,
    interpret: bool = False,
) -> Int32[Array, "B N"]:
    """Returns the number of the nearest centre of every token.

    Args:
      x: tokens (B, N, C).
      centers: tokens at the centres (B, M, C).
      num_used: number of centres that can be nearest, the first ones (B,); 0: the result is 0.
      interpret: run on a CPU, for tests.

    Returns:
      (B, N), in [0, M).
    """
    batch, length, channels = x.shape
    keys = _padded(centers.shape[1])
    nearest = pl.pallas_call(
        _nearest_center_kernel,
        grid=(batch, _padded(length) // BLOCK),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec((None, keys, channels), lambda i, j: (i, 0, 0)),
            pl.BlockSpec((None, BLOCK, channels), lambda i, j: (i, j, 0)),
        ],
        out_specs=pl.BlockSpec((None, 1, BLOCK), lambda i, j: (i, 0, j)),
        out_shape=jax.ShapeDtypeStruct((batch, 1, length), jnp.int32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=vmem_limit()
        ),
        interpret=interpret,
    )(num_used, centers, x)
    return nearest[:, 0]


def _nearest_center_kernel(num_used, centers, queries, nearest):
    used, query = num_used[pl.program_id(0)], queries[...]

    def step(i, carry):
        best, number = carry
        keys, index = _keys(centers, i), i * BLOCK + _iota(0)
        tile = _halves(keys, query)
        low, at = _first(jnp.where(index < used, tile, jnp.inf), index, 0)
        return jnp.where(low < best, low, best), jnp.where(low < best, at, number)

    best, number = jnp.full((1, BLOCK), jnp.inf, jnp.float32), jnp.zeros((1, BLOCK), jnp.int32)
    nearest[...] = lax.fori_loop(0, centers.shape[0] // BLOCK, step, (best, number))[1]
