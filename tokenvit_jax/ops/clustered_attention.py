"""Attention of clustered queries (Zheng et al. 2020, "Adaptive Clustering Transformer", ACT).

Queries with equal hashes form a cluster. The mean of a cluster, its prototype, attends once, and
all its queries receive the result.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Int32

from tokenvit_jax.ops.attention import check_qkv, dot_product_attention
from tokenvit_jax.ops.counted import counted
from tokenvit_jax.ops.dtypes import softmax_dtype
from tokenvit_jax.ops.gather import take
from tokenvit_jax.ops.merge_tokens import cluster_sums

# The authors use 16 to 32 rounds.
ROUNDS = 16
# Widths of the buckets that are tried, as powers of 2 of the spread of the projections.
FINEST, STEP, NUM_WIDTHS = -2.0, 0.25, 64


def _macs(inputs, outputs):
    batch, length, heads, dim = inputs[0]
    return batch * length * heads * dim * ROUNDS


@counted(_macs, static_argnames=("num_clusters",))
def hash_clusters(x: Float[Array, "B L N D"], num_clusters: int) -> Int32[Array, "B N L"]:
    """Clusters the vectors of every head by locality-sensitive hashing.

    A hash is the tuple of floor(a x / width + b) over ``ROUNDS`` random projections a and offsets
    b, which are constants; vectors with equal hashes form a cluster. ACT fixes the width and lets
    the number of clusters vary. Here shapes are static: every image and head has the smallest
    width, found by bisection among ``NUM_WIDTHS``, that leaves at most ``num_clusters`` clusters.
    The result carries no gradient.

    Args:
      x: vectors, such as queries (B, L, N, D).
      num_clusters: largest number of clusters, at least 1.

    Returns:
      Cluster of each vector (B, N, L), in [0, num_clusters). Clusters are numbered in no particular
      order, and the last numbers may be unused.

    Raises:
      ValueError: ``x`` is not (B, L, N, D), or ``num_clusters`` is below 1.

    References:
      Zheng et al. 2020, Section 3.2; exact Euclidean hashing: Datar et al. 2004.
    """
    if x.ndim != 4:
        raise ValueError(f"x has shape {x.shape}; expected (batch, length, heads, dim)")
    if num_clusters < 1:
        raise ValueError(f"num_clusters is {num_clusters}; it must be at least 1")
    x = lax.stop_gradient(x).astype(softmax_dtype(x.dtype))
    directions, offsets, factors = (jnp.asarray(c) for c in _hash_constants(x.shape[-1]))
    x = x - x.mean(1, keepdims=True)
    along = jnp.einsum(
        "blnd,dr->bnlr", x, directions.astype(x.dtype), precision=lax.Precision.HIGHEST
    )
    spread = jnp.sqrt(jnp.mean(along**2, (2, 3))) + jnp.finfo(x.dtype).tiny  # (B, N)

    def keys(step):  # (B, N) -> one number per hash (B, N, L)
        width = spread * 2.0 ** (FINEST + STEP * step)
        tuples = jnp.floor(along / width[..., None, None] + offsets.astype(x.dtype))
        # Different tuples have equal sums in one of 2 ** 31 cases.
        sums = jnp.sum(tuples.astype(jnp.int32) * factors, -1, dtype=jnp.int32)
        return jnp.where(step[..., None] == NUM_WIDTHS, 0, sums)

    def halve(_, bounds):
        low, high = bounds  # at high there are few enough clusters
        middle = (low + high + 1) // 2  # once they are neighbours, nothing changes
        fits = _is_new(lax.sort(keys(middle))).sum(-1) <= num_clusters
        return jnp.where(fits, low, middle), jnp.where(fits, middle, high)

    low = jnp.full(spread.shape, -1, jnp.int32)
    bounds = low, jnp.full_like(low, NUM_WIDTHS)  # without any width, all are in one cluster
    _, step = lax.fori_loop(0, (NUM_WIDTHS + 1).bit_length(), halve, bounds)
    return _number(keys(step))


@functools.cache
def _hash_constants(dim):
    """Returns directions (D, R) and offsets (R,) in float32, and odd factors (R,) int32."""
    with jax.ensure_compile_time_eval():
        of_directions, of_offsets, of_factors = jax.random.split(jax.random.key(0), 3)
        directions = jax.random.normal(of_directions, (dim, ROUNDS), jnp.float32)
        offsets = jax.random.uniform(of_offsets, (ROUNDS,), jnp.float32)
        factors = 2 * jax.random.randint(of_factors, (ROUNDS,), -(2**30), 2**30, jnp.int32) + 1
        return jax.device_get((directions, offsets, factors))


def _is_new(ordered):
    """Returns whether each of the sorted numbers (..., L) differs from the one before it."""
    differs = ordered[..., 1:] != ordered[..., :-1]
    return jnp.concatenate([jnp.ones_like(ordered[..., :1], bool), differs], -1)


def _number(keys):
    """Numbers the different keys (..., L) from 0."""
    places = lax.broadcasted_iota(jnp.int32, keys.shape, keys.ndim - 1)
    ordered, places = lax.sort((keys, places), num_keys=1)
    cluster = jnp.cumsum(_is_new(ordered), -1, dtype=jnp.int32) - 1
    return lax.sort((places, cluster), num_keys=1)[1]


def clustered_attention(
    q: Float[Array, "B L N D"],
    k: Float[Array, "B S N D"],
    v: Float[Array, "B S N D"],
    assignment: Int[Array, "B N C"],
    num_clusters: int,
    *,
    scale: float | None = None,
) -> Float[Array, "B L N D"]:
    """Attends once for every cluster of queries, and hands the result back to its queries.

    Args:
      q: queries (B, L, N, D).
      k: keys (B, S, N, D).
      v: values (B, S, N, D).
      assignment: cluster of each of the last C queries, per head (B, N, C), in [0, num_clusters);
        the L - C queries in front, such as a class token, attend by themselves.
      num_clusters: M.
      scale: factor of the logits; None: 1 / sqrt(D).

    Returns:
      (B, L, N, D) in the type of ``v``.

    Raises:
      ValueError: the shapes do not fit together.

    References:
      Zheng et al. 2020, Section 3.2.
    """
    check_qkv(q, k, v)
    batch, length, heads, _ = q.shape
    num_alone = length - assignment.shape[-1]
    if assignment.shape[:-1] != (batch, heads) or num_alone < 0:
        raise ValueError(
            f"assignment has shape {assignment.shape}; expected ({batch}, {heads}, at most "
            f"{length}) for q of shape {q.shape}"
        )
    alone, grouped = q[:, :num_alone], q[:, num_alone:]
    queries = jnp.concatenate([alone, query_prototypes(grouped, assignment, num_clusters)], 1)
    y = dot_product_attention(queries, k, v, scale=scale)
    alone, y = y[:, :num_alone], y[:, num_alone:]
    y = take(y.swapaxes(1, 2), assignment).swapaxes(1, 2)
    return jnp.concatenate([alone, y], 1)


def query_prototypes(
    q: Float[Array, "B L N D"], assignment: Int[Array, "B N L"], num_clusters: int
) -> Float[Array, "B M N D"]:
    """Returns the mean of the queries of each cluster; zero for a cluster without queries.

    Args:
      q: queries (B, L, N, D).
      assignment: cluster of each query, per head (B, N, L), in [0, M).
      num_clusters: M.
    """
    batch, length, heads, dim = q.shape
    x = q.swapaxes(1, 2).reshape(batch * heads, length, dim).astype(softmax_dtype(q.dtype))
    x = jnp.concatenate([x, jnp.ones_like(x[..., :1])], -1)
    sums = cluster_sums(x, assignment.reshape(batch * heads, length), num_clusters)
    means = sums[..., :-1] / jnp.maximum(sums[..., -1:], 1)
    means = means.reshape(batch, heads, num_clusters, dim).swapaxes(1, 2)
    return means.astype(q.dtype)
