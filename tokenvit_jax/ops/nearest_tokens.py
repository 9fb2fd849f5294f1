"""Nearest neighbours, nearest denser tokens and nearest centres, in chunks of tokens.

These are the forms of :mod:`tokenvit_jax.ops.density_peaks` for platforms without kernels. The N^2
distances of an image are never held at once:

* Pass 1 keeps the k nearest neighbours of every token. The k smallest distances are in the k groups
  with the smallest minima, so all reductions but one work on a fraction of the chunk. Most tokens
  also find their nearest denser token here, because it is one of the k neighbours.
* Pass 2 searches all tokens for the nearest denser token of the remaining tokens, about a fifth.

Chunks change the result at most by rounding. A squared distance is |y|^2 - 2 x.y + |x|^2, computed
after subtracting the mean of the tokens: it loses digits where the tokens are far from the origin.
The last term is the same for all y; it is added only to selected distances.

Kernels multiply tokens of 16 bits as they are: such products are exact in float32, and tokens that
are far from the origin are rounded more coarsely themselves. Tensor cores and matrix units take one
product for that, instead of three or six for float32.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from tokenvit_jax.kernels.density_peaks import is_denser
from tokenvit_jax.kernels.platforms import num_devices, on_each_device
from tokenvit_jax.ops.chunks import ACCELERATOR_CHUNK, CPU_CHUNK, LANES, chunk_tokens, num_chunks
from tokenvit_jax.ops.dtypes import softmax_dtype
from tokenvit_jax.ops.gather import put, take
from tokenvit_jax.ops.precise_product import precise_product
from tokenvit_jax.ops.selection import GROUP, in_groups, smallest_of_groups


class Points(NamedTuple):
    """Tokens, with the terms that distances need.

    Attributes:
      x: (B, N, C).
      square: |x|^2 (B, N), in float32 for tokens of 16 bits.
      bias: |x|^2, or inf for a masked token, which is thus farthest from every token (B, N).
    """

    x: Float[Array, "B N C"]
    square: Float[Array, "B N"]
    bias: Float[Array, "B N"]


class Neighbors(NamedTuple):
    """Nearest neighbours of every token.

    Attributes:
      squares: squared distances (B, k, N), rising, inf where there is no neighbour.
      indices: (B, k, N).
      farthest: largest squared distance in each image (B,).
    """

    squares: Float[Array, "B k N"]
    indices: Int32[Array, "B k N"]
    farthest: Float[Array, " B"]


def centered(
    tokens: Float[Array, "B N C"], mask: Bool[Array, "B N"] | None
) -> Float[Array, "B N C"]:
    """Returns tokens (B, N, C) minus the mean of the real ones; of 16 bits, in float32."""
    x = tokens.astype(softmax_dtype(tokens.dtype))
    if mask is None:
        return x - x.mean(1, keepdims=True)
    total = jnp.where(mask[..., None], x, 0).sum(1, keepdims=True)
    return x - total / jnp.maximum(mask.sum(1), 1)[:, None, None]


def for_kernels(
    tokens: Float[Array, "B N C"], mask: Bool[Array, "B N"] | None
) -> Float[Array, "B N C"]:
    """Returns tokens of 16 bits as they are, and others :func:`centered`."""
    return tokens if tokens.dtype.itemsize == 2 else centered(tokens, mask)


def points_of(x: Float[Array, "B N C"], mask: Bool[Array, "B N"] | None) -> Points:
    """Returns the points of tokens (B, N, C), where masked tokens are 0.

    That is the mean of :func:`centered` tokens, which is never farther from a token than its
    farthest one.
    """
    if mask is not None:
        x = jnp.where(mask[..., None], x, 0)
    square = square_norms(x)
    return Points(x, square, square if mask is None else jnp.where(mask, square, jnp.inf))


def square_norms(x: Float[Array, "... C"]) -> Float[Array, "..."]:
    """Returns |x|^2 (...), in float32 for tokens of 16 bits."""
    x = x.astype(softmax_dtype(x.dtype))
    return jnp.sum(x * x, -1)


def chunked_forms(
    run: Callable[..., Any], batch: int, length: int, width: int, chunk_size: int | None
) -> dict[str, Callable[..., Any]]:
    """Returns forms of ``run(*args, size=...)`` for different platforms.

    Args:
      run: function that computes the whole result in chunks of ``size`` tokens.
      batch: number of images.
      length: N, number of tokens of an image.
      width: number of distances per token.
      chunk_size: tokens per chunk; None: chosen for the platform.
    """

    def form(elements):
        size = min(chunk_size or chunk_tokens(elements, batch, length, width), length)
        return functools.partial(run, size=size)

    return {"cpu": form(CPU_CHUNK), "default": form(ACCELERATOR_CHUNK)}


def nearest_neighbors(
    tokens: Float[Array, "B N C"], mask: Bool[Array, "B N"] | None, k: int, size: int
) -> Neighbors:
    """Finds the k nearest neighbours (pass 1), in chunks of ``size`` tokens."""
    points = points_of(centered(tokens, mask), mask)
    batch, length, _ = points.x.shape
    padding = -length % GROUP
    keys = jnp.pad(points.x, ((0, 0), (0, padding), (0, 0)))
    square = jnp.pad(points.square, ((0, 0), (0, padding)))[..., None]
    bias = jnp.pad(points.bias, ((0, 0), (0, padding)), constant_values=jnp.inf)[..., None]

    def step(i, near):
        start = i * size
        queries = lax.dynamic_slice_in_dim(points.x, start, size, 1)
        query_square = lax.dynamic_slice_in_dim(points.square, start, size, 1)
        products = _products(keys, queries)  # (B, N, size)
        scores = products + bias
        minima, maxima = _group_extrema(scores, products + square)
        squares, indices = smallest_of_groups(scores, minima, k)
        squares = jnp.maximum(squares + query_square[:, None], 0)
        indices = jnp.clip(indices, 0, length - 1)  # NaN equals nothing: keep the index in range
        return Neighbors(
            lax.dynamic_update_slice_in_dim(near.squares, squares, start, 2),
            lax.dynamic_update_slice_in_dim(near.indices, indices, start, 2),
            jnp.maximum(near.farthest, maxima.max(1) + query_square),
        )

    near = Neighbors(
        jnp.zeros_like(points.square, shape=(batch, k, length)),
        jnp.zeros_like(points.square, shape=(batch, k, length), dtype=jnp.int32),
        jnp.zeros_like(points.square, shape=(batch, size)),
    )
    near = lax.fori_loop(0, num_chunks(length, size), step, near)
    return near._replace(farthest=near.farthest.max(1))


def nearest_denser(
    tokens: Float[Array, "B N C"],
    mask: Bool[Array, "B N"] | None,
    near: Neighbors,
    density: Float[Array, "B N"],
    size: int,
) -> tuple[Float[Array, "B N"], Int32[Array, "B N"]]:
    """Returns squared distance and index (B, N) of the nearest denser token.

    For a peak, which has none, returns inf and the token itself.
    """

    def search(tokens, mask, near, density):
        points = points_of(centered(tokens, mask), mask)
        squares, parent = _denser_neighbor(near, density)
        pending = jnp.isinf(squares)
        if mask is not None:
            pending &= mask
        return _search_denser(points, density, squares, parent, pending, size)

    # The number of rounds depends on the tokens: every device has its own.
    batch = density.shape[0]
    divides = isinstance(batch, int) and batch % num_devices() == 0
    return (on_each_device(search) if divides else search)(tokens, mask, near, density)


def nearest_center(
    tokens: Float[Array, "B N C"],
    mask: Bool[Array, "B N"] | None,
    centers: Int32[Array, "B M"],
    num_used: Int32[Array, " B"],
    size: int,
) -> Int32[Array, "B N"]:
    """Returns the index (B, N) of each token's nearest used centre, ``size`` tokens at a time."""
    x = centered(tokens, mask)
    used = jnp.arange(centers.shape[1]) < num_used[:, None]
    keys = take(x, centers)  # (B, M, C)
    keys = jnp.where(used[..., None], keys, 0)  # a masked token may hold any value, even NaN
    bias = jnp.where(used, jnp.sum(keys * keys, -1), jnp.inf)[..., None]
    index = _column(centers.shape[1])

    def step(i, assignment):
        queries = lax.dynamic_slice_in_dim(x, i * size, size, 1)
        _, number = _first_smallest(_products(keys, queries) + bias, index)
        return lax.dynamic_update_slice_in_dim(assignment, number, i * size, 1)

    assignment = jnp.zeros_like(centers, shape=x.shape[:2])
    return lax.fori_loop(0, num_chunks(assignment.shape[1], size), step, assignment)


# ------------------------------------------------------------------------------------------------
# Steps
# ------------------------------------------------------------------------------------------------


def _group_extrema(low, high):
    """Returns minima of ``low`` and maxima of ``high`` (B, N, Q) in every group of tokens.

    One reduction of both reads the distances once; on CPU it takes 0.8 times as long as two.
    """
    return lax.reduce(
        (in_groups(low), in_groups(high)),
        (jnp.array(jnp.inf, low.dtype), jnp.array(-jnp.inf, low.dtype)),
        lambda a, b: (jnp.minimum(a[0], b[0]), jnp.maximum(a[1], b[1])),
        (2,),
    )


def _denser_neighbor(near, density):
    """Returns squared distance and index (B, N) of the nearest denser token among the neighbours.

    If no neighbour is denser, returns inf and the token itself. A denser neighbour that is found is
    the nearest denser one of all tokens, because all nearer tokens are neighbours too.
    """
    batch, k, length = near.indices.shape
    index = jnp.broadcast_to(_column(length)[:, 0], density.shape)
    neighbor_density = take(density, near.indices.reshape(batch, k * length))
    neighbor_density = neighbor_density.reshape(near.indices.shape)
    denser = is_denser(neighbor_density, near.indices, density[:, None], index[:, None])
    denser &= near.squares < jnp.inf
    squares, parent = jnp.full_like(density, jnp.inf), index
    for i in reversed(range(k)):  # ties: keep the first one
        squares = jnp.where(denser[:, i], near.squares[:, i], squares)
        parent = jnp.where(
            denser[:, i] & (near.squares[:, i] < jnp.inf), near.indices[:, i], parent
        )
    return squares, parent


def _search_denser(points, density, squares, parent, pending, size):
    """Searches all tokens for the pending tokens (B, N) (pass 2); a peak does not change."""
    length = density.shape[1]
    size = min(size, max(size // 4, 2 * LANES))  # few are pending: a last chunk should be short
    index = _column(length)
    order = jnp.sort(jnp.where(pending, index[:, 0], length + index[:, 0])) % length

    def step(i, found):
        at = lax.dynamic_slice_in_dim(order, i * size, size, 1)  # (B, size)
        scores = _products(points.x, take(points.x, at)) + points.bias[..., None]
        denser = is_denser(density[..., None], index, take(density, at)[:, None], at[:, None])
        nearest, key = _first_smallest(jnp.where(denser, scores, jnp.inf), index)
        key = jnp.where(nearest < jnp.inf, key, at)
        nearest = jnp.maximum(nearest + take(points.square, at), 0)
        # The other tokens in the last chunk already have their results.
        at = jnp.where(take(pending, at), at, length)
        return tuple(map(put, found, (at, at), (nearest, key)))

    chunks = num_chunks(pending.sum(1).max(initial=0), size)
    return lax.fori_loop(0, chunks, step, (squares, parent))


def _first_smallest(values, index):
    """Returns the smallest of values (B, K, Q) along K and its index (B, Q), ties to the lowest."""
    smallest = values.min(1)
    index = jnp.where(values == smallest[:, None], index, values.shape[1])
    first = index.min(1)
    return smallest, jnp.where(first < values.shape[1], first, 0)  # NaN equals nothing


def _products(keys, queries):
    """Returns -2 y.x (B, keys, queries): reductions over the keys are vector loops on CPU."""
    return precise_product("bkc,bqc->bkq", keys, -2 * queries)


def _column(length):
    return jnp.arange(length, dtype=jnp.int32)[:, None]
