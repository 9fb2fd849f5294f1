"""Clusters tokens by K-Means and K-Medoids (Marin et al. 2021, "Token Pooling", Supplement A).

Both alternate between assigning every token to its nearest centre (Eqs. 14 and 16) and moving the
centres, for a fixed number of rounds: once nothing moves, further rounds change nothing.

The medoid of a cluster is chosen among the cluster's own tokens (Eq. 17), at a cost that does not
depend on the other clusters. On CPU: if all tokens differ, a medoid is nearest to itself, so only
the N - K other tokens have to be assigned, and only clusters that contain some of them can move. A
round then reads N (N - K) of the N^2 distances, which are computed once; a literal form of the
equations would compare N K distances and add up K N^2. Whether all tokens differ is a question to
all images, which accelerators would have to answer together: they run one masked sum over N^2
distances a round, and NVIDIA GPUs all rounds of an image in one kernel.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Int32, Shaped

from tokenvit_jax.kernels.platforms import by_platform
from tokenvit_jax.kernels.token_pooling import kmeans_of_images, kmedoids_of_images, pooling_misfit
from tokenvit_jax.ops.counted import counted, counted_as
from tokenvit_jax.ops.dtypes import softmax_dtype
from tokenvit_jax.ops.gather import put, take
from tokenvit_jax.ops.merge_tokens import cluster_sums
from tokenvit_jax.ops.precise_product import precise_product
from tokenvit_jax.ops.selection import smallest


class Means(NamedTuple):
    """Clusters around means.

    Attributes:
      centers: (B, K, C).
      assignment: cluster of each token (B, N), in [0, K).
      counts: number of tokens in each cluster (B, K).
    """

    centers: Float[Array, "B K C"]
    assignment: Int32[Array, "B N"]
    counts: Int32[Array, "B K"]


class Medoids(NamedTuple):
    """Clusters around medoids.

    Attributes:
      indices: token that is the medoid of each cluster (B, K).
      assignment: cluster of each token (B, N), in [0, K).
      counts: number of tokens in each cluster (B, K).
    """

    indices: Int32[Array, "B K"]
    assignment: Int32[Array, "B N"]
    counts: Int32[Array, "B K"]


def _kmedoids_macs(inputs, outputs):
    """Counts N^2 C: every distance once, independent of the number of rounds."""
    batch, length, dim = inputs[0]
    return batch * length**2 * dim


@counted(_kmedoids_macs, static_argnames=("iterations",))
def kmedoids(
    tokens: Float[Array, "B N C"],
    initial: Int[Array, "B K"],
    weights: Shaped[Array, "B N"] | None = None,
    *,
    iterations: int = 5,
) -> Medoids:
    """Clusters tokens around K of them (weighted K-Medoids).

    Minimises the sum over all tokens of weight times squared distance to the nearest medoid. Ties
    go to the lowest index, for medoids and for tokens. Distances are computed in float32 (float64
    for float64 tokens). The results carry no gradient.

    Args:
      tokens: (B, N, C).
      initial: indices of the tokens that are the initial medoids (B, K), integers.
      weights: (B, N), not negative; None: all 1.
      iterations: rounds, at least 0.

    Returns:
      Medoids(indices, assignment, counts).

    Raises:
      ValueError: the shapes do not fit together, K is above N, or ``iterations`` is negative.

    References:
      Marin et al. 2021, Eqs. 16 to 18, with the weights of Eq. 13 inside the sum of Eq. 17.
    """
    _check(tokens, initial, weights, iterations)
    tokens, weights = lax.stop_gradient((tokens, _weights(tokens, weights)))
    over_all, over_few, in_one_program = (
        functools.partial(form, iterations=iterations)
        for form in (_over_all_tokens, _over_few_tokens, kmedoids_of_images)
    )
    found = by_platform(
        "k-medoids", tokens, weights, initial.astype(jnp.int32),
        default=over_all, cpu=over_few, cuda=in_one_program,
        misfits={"cuda": pooling_misfit(tokens.shape[1])},
    )  # fmt: skip
    return Medoids(*found)


def _over_few_tokens(tokens, weights, initial, iterations):
    """Computes the rounds over those tokens that can change, if all tokens differ."""
    distances = _squared_distances(tokens)
    args = (distances, weights, initial)
    if initial.shape[1] == tokens.shape[1]:
        return _rounds_over_all_tokens(*args, iterations)
    return lax.cond(
        _all_differ(distances, initial),
        functools.partial(_rounds_over_other_tokens, iterations=iterations),
        functools.partial(_rounds_over_all_tokens, iterations=iterations),
        *args,
    )


def _over_all_tokens(tokens, weights, initial, iterations):
    return _rounds_over_all_tokens(_squared_distances(tokens), weights, initial, iterations)


def _all_differ(distances, initial):
    """Returns whether all tokens differ and all medoids differ."""
    length = distances.shape[1]
    apart = (distances > 0) | jnp.eye(length, dtype=bool)
    return apart.all() & (_is_medoid(initial, length).sum(1) == initial.shape[1]).all()


def _is_medoid(medoids, length):
    zeros = jnp.zeros(length, bool)
    return jax.vmap(lambda at: zeros.at[at].set(True, mode="promise_in_bounds"))(medoids)


def _rounds_over_all_tokens(distances, weights, initial, iterations):
    """Computes the rounds over N x N distances."""

    def move(_, medoids):
        assignment = _nearest(distances, medoids)
        same = assignment[:, :, None] == assignment[:, None]
        cost = jnp.where(same, distances * weights[:, :, None], 0).sum(1)  # (B, N)
        member = assignment[:, None] == jnp.arange(medoids.shape[1])[:, None]  # (B, K, N)
        best = jnp.where(member, cost[:, None], jnp.inf).argmin(-1).astype(jnp.int32)
        # A cluster is empty only if its medoid equals an earlier one.
        return jnp.where(member.any(-1), best, medoids)

    medoids = lax.fori_loop(0, iterations, move, initial)
    assignment = _nearest(distances, medoids)
    return medoids, assignment, _counts(assignment, medoids.shape[1])


def _rounds_over_other_tokens(distances, weights, initial, iterations):
    """Computes the rounds over the R = N - K tokens that are not medoids (R x K, R x R distances).

    If all tokens differ, a medoid is nearest to itself, so only the other tokens are assigned, and
    a cluster without any of them does not move.
    """
    length = distances.shape[1]
    order = jnp.argsort(_is_medoid(initial, length), axis=1, stable=True).astype(jnp.int32)
    others = order[:, : length - initial.shape[1]]

    def assign(medoids, others):
        return smallest(_between(distances, others, medoids))  # (B, R, K) -> (B, R)

    def move(_, state):
        medoids, others = state
        cluster, to_medoid = assign(medoids, others)
        medoid, weight = take(medoids, cluster), take(weights, others)  # (B, R)
        same = cluster[:, :, None] == cluster[:, None]
        apart = _between(distances, others, others)
        cost = jnp.where(same, apart * weight[:, None], 0).sum(-1)
        cost += to_medoid * take(weights, medoid)
        medoid_cost = jnp.where(same, (to_medoid * weight)[:, None], 0).sum(-1)

        def better(cost, token, other_cost, other):  # ties to the lowest token
            return (cost < other_cost) | ((cost == other_cost) & (token < other))

        beaten = same & better(cost[:, None], others[:, None], cost[:, :, None], others[:, :, None])
        wins = better(cost, others, medoid_cost, medoid) & ~beaten.any(-1)
        place = jnp.where(wins, cluster, medoids.shape[1])  # out of bounds: dropped
        return put(medoids, place, others), jnp.where(wins, medoid, others)

    medoids, others = lax.fori_loop(0, iterations, move, (initial, others))
    cluster, _ = assign(medoids, others)
    own = jnp.broadcast_to(jnp.arange(medoids.shape[1], dtype=jnp.int32), medoids.shape)
    tokens, clusters = jnp.concatenate([medoids, others], 1), jnp.concatenate([own, cluster], 1)
    spread = lambda at, value: jnp.zeros(length, jnp.int32).at[at].set(value, unique_indices=True)  # noqa: E731
    return medoids, jax.vmap(spread)(tokens, clusters), 1 + _counts(cluster, own.shape[1])


def _between(distances, rows, columns):
    """Returns the distances (B, R, K) between some tokens and some others."""
    at = lambda d, i, j: d.at[i[:, None], j].get(mode="promise_in_bounds")  # noqa: E731
    return jax.vmap(at)(distances, rows, columns)


def _check(tokens, initial, weights, iterations):
    if tokens.ndim != 3:
        raise ValueError(f"tokens has shape {tokens.shape}; expected (batch, tokens, channels)")
    if initial.ndim != 2 or initial.shape[0] != tokens.shape[0]:
        raise ValueError(
            f"initial has shape {initial.shape}; expected ({tokens.shape[0]}, clusters) for tokens "
            f"of shape {tokens.shape}"
        )
    if not jnp.issubdtype(initial.dtype, jnp.integer):
        raise ValueError(f"initial has type {initial.dtype}; expected integers")
    if not 1 <= initial.shape[1] <= tokens.shape[1]:
        raise ValueError(
            f"initial has shape {initial.shape}; it must name from 1 to {tokens.shape[1]} of the "
            f"tokens of shape {tokens.shape}"
        )
    if weights is not None and weights.shape != tokens.shape[:2]:
        raise ValueError(f"weights has shape {weights.shape}; expected {tokens.shape[:2]}")
    if iterations < 0:
        raise ValueError(f"iterations is {iterations}; it must be at least 0")


def _weights(tokens, weights):
    dtype = softmax_dtype(tokens.dtype)
    if weights is None:
        return jnp.ones(tokens.shape[:2], dtype)
    return weights.astype(dtype)


def _squared_distances(tokens):
    """Returns squared distances (B, N, C) -> (B, N, N).

    The mean is subtracted first: far from the origin, digits would be lost.
    """
    x = lax.stop_gradient(tokens).astype(softmax_dtype(tokens.dtype))
    x = x - x.mean(1, keepdims=True)
    square = jnp.sum(x * x, -1)
    product = precise_product("bnc,bmc->bnm", x, x)
    distances = jnp.maximum(square[:, :, None] + square[:, None] - 2 * product, 0)
    return jnp.where(jnp.eye(x.shape[1], dtype=bool), 0, distances)


def _nearest(distances, medoids):
    """Returns the index (B, N) of each token's nearest medoid."""
    columns = take(distances, medoids)  # (B, K, N)
    return columns.argmin(1).astype(jnp.int32)


def _counts(assignment, num_clusters):
    member = assignment[:, None] == jnp.arange(num_clusters)[:, None]
    return member.sum(-1, dtype=jnp.int32)


@functools.partial(jax.jit, static_argnames=("iterations",))
def kmeans(
    tokens: Float[Array, "B N C"],
    initial: Int[Array, "B K"],
    weights: Shaped[Array, "B N"] | None = None,
    *,
    iterations: int = 5,
) -> Means:
    """Clusters tokens around K means (weighted K-Means).

    Minimises the sum over all tokens of weight times squared distance to the nearest centre. Ties
    go to the lowest index. An empty cluster keeps its centre. The means are computed in float32
    (float64 for float64 tokens). Gradients flow through the means of the last round, to tokens and
    weights; assignments carry no gradient.

    Args:
      tokens: (B, N, C).
      initial: indices of the tokens that are the initial centres (B, K), integers.
      weights: (B, N), not negative; None: all 1.
      iterations: rounds, at least 0.

    Returns:
      Means(centers in the type of ``tokens``, assignment, counts).

    Raises:
      ValueError: the shapes do not fit together, K is above N, or ``iterations`` is negative.

    References:
      Marin et al. 2021, Eqs. 13 to 15.
    """
    _check(tokens, initial, weights, iterations)
    if not iterations:
        assignment, counts = _assign_to_tokens(tokens, initial)
        return Means(take(tokens, initial), assignment, counts)
    _, length, dim = tokens.shape
    macs = iterations * initial.shape[1] * length * dim  # the distances of every round
    run = functools.partial(_means, iterations)
    args = tokens, _weights(tokens, weights), initial.astype(jnp.int32)
    centers, assignment, counts = counted_as("kmeans", macs, run)(*args)
    return Means(centers.astype(tokens.dtype), assignment, counts)


@counted(lambda inputs, outputs: 0)  # the callers count
def _assign_to_tokens(tokens, initial):
    """Returns the nearest of some tokens (B, K) for each token (B, N), and their numbers (B, K)."""

    x = lax.stop_gradient(tokens).astype(softmax_dtype(tokens.dtype))
    assignment = _nearest_center(x, take(x, initial))
    return assignment, _counts(assignment, initial.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _means(iterations, tokens, weights, initial):
    """Returns the means (B, K, C) in float32 or float64, assignment (B, N) and counts (B, K)."""
    return _means_and_members(iterations, tokens, weights, initial)[:3]


def _means_and_members(iterations, tokens, weights, initial):
    """Returns the results of `_means`, and the assignment that the means were computed with."""
    by_rounds = functools.partial(_rounds_of_means, iterations=iterations)
    in_one_program = functools.partial(kmeans_of_images, iterations=iterations)
    return by_platform(
        "k-means", tokens, weights, initial, default=by_rounds, cuda=in_one_program,
        misfits={"cuda": pooling_misfit(tokens.shape[1])},
    )  # fmt: skip


def _rounds_of_means(tokens, weights, initial, iterations):
    x = tokens.astype(softmax_dtype(tokens.dtype))

    def move(_, state):
        return _move_centers(x, weights[..., None], state[0])

    members = jnp.zeros(x.shape[:2], jnp.int32)
    centers, members = lax.fori_loop(0, iterations, move, (take(x, initial), members))
    assignment = _nearest_center(x, centers)
    return centers, assignment, _counts(assignment, centers.shape[1]), members


def _move_centers(x, weights, centers):
    """Moves each centre (B, K, C) to the weighted mean of the tokens that are nearest to it."""
    members = _nearest_center(x, centers)
    weighted = jnp.concatenate([x * weights, weights], -1)
    sums = cluster_sums(weighted, members, centers.shape[1])
    total = sums[..., -1:]
    return jnp.where(total > 0, sums[..., :-1] / jnp.where(total > 0, total, 1), centers), members


def _nearest_center(x, centers):
    """Returns the index (B, N) of each token's nearest centre."""
    mean = x.mean(1, keepdims=True)
    x, centers = x - mean, centers - mean
    product = precise_product("bnc,bkc->bnk", x, centers)
    return smallest(jnp.sum(centers**2, -1)[:, None] - 2 * product)[0]


def _means_forward(iterations, tokens, weights, initial):
    *results, members = _means_and_members(iterations, tokens, weights, initial)
    return tuple(results), (tokens, weights, results[0], members)


def _means_backward(iterations, residuals, d_results):
    """Differentiates the means of the last round."""
    del iterations
    tokens, weights, centers, members = residuals
    total = cluster_sums(weights[..., None], members, centers.shape[1])
    d_sums = jnp.where(total > 0, d_results[0] / jnp.where(total > 0, total, 1), 0)  # (B, K, C)
    rows = take(d_sums, members)
    d_tokens = (rows * weights[..., None]).astype(tokens.dtype)
    d_weights = jnp.sum(rows * (tokens.astype(rows.dtype) - take(centers, members)), -1)
    return d_tokens, d_weights, None


_means.defvjp(_means_forward, _means_backward)
