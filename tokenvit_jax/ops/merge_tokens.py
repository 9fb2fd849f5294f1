"""Merges tokens by cluster (ClusTR, Eq. 3)."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from tokenvit_jax.kernels.cluster_sums import sums_by_products, sums_by_scatter
from tokenvit_jax.kernels.platforms import by_platform
from tokenvit_jax.ops.counted import counted
from tokenvit_jax.ops.dtypes import softmax_dtype
from tokenvit_jax.ops.gather import take

# Added to the sum of the weights in a cluster.
EPSILON = 1e-6


def _macs(inputs, outputs):
    """Counts N C: every token is multiplied by its weight and added once."""
    batch, length, dim = inputs[0]
    return batch * length * dim


@counted(_macs, static_argnames=("num_clusters",))
def merge_tokens(
    tokens: Float[Array, "B N C"],
    assignment: Int[Array, "B N"],
    num_clusters: int,
    scores: Float[Array, "B N"] | None = None,
) -> Float[Array, "B M C"]:
    """Computes the weighted mean of the tokens in each cluster.

    A token's weight is exp(score), divided by the cluster's sum of exp(score) plus 1e-6. The mean
    is computed in float32 (float64 for float64 tokens), for any finite scores; a score of -inf
    excludes a token.

    Args:
      tokens: (B, N, C).
      assignment: cluster of each token (B, N), integers in [0, M).
      num_clusters: M, at least 1.
      scores: logarithms of the weights (B, N); None: the plain mean.

    Returns:
      (B, M, C) in the type of ``tokens``; 0 for an empty cluster.

    Raises:
      ValueError: the shapes do not fit together, or ``num_clusters`` is below 1.

    References:
      ClusTR, Eq. 3.
    """
    _check(tokens, assignment, num_clusters, scores)
    dtype = softmax_dtype(tokens.dtype)
    x = tokens.astype(dtype)
    if scores is None:
        ones = jnp.ones_like(x[..., :1])
        sums = cluster_sums(jnp.concatenate([x, ones], -1), assignment, num_clusters)
        return (sums[..., :-1] / jnp.maximum(sums[..., -1:], 1)).astype(tokens.dtype)
    scores = scores.astype(dtype)
    shift = _largest_scores(lax.stop_gradient(scores), assignment, num_clusters)  # (B, M)
    weights = jnp.exp(scores - take(shift, assignment))[..., None]
    sums = cluster_sums(jnp.concatenate([x * weights, weights], -1), assignment, num_clusters)
    total = sums[..., -1:] + EPSILON * jnp.exp(-shift)[..., None]
    return (sums[..., :-1] / total).astype(tokens.dtype)


def _check(tokens, assignment, num_clusters, scores):
    if tokens.ndim != 3:
        raise ValueError(f"tokens has shape {tokens.shape}; expected (batch, tokens, channels)")
    for name, x in (("assignment", assignment), ("scores", scores)):
        if x is not None and x.shape != tokens.shape[:2]:
            raise ValueError(
                f"{name} has shape {x.shape}; expected {tokens.shape[:2]} for tokens of shape "
                f"{tokens.shape}"
            )
    if not jnp.issubdtype(assignment.dtype, jnp.integer):
        raise ValueError(f"assignment has type {assignment.dtype}; expected integers")
    if num_clusters < 1:
        raise ValueError(f"num_clusters is {num_clusters}; it must be at least 1")


def _largest_scores(scores, assignment, num_clusters):
    """Returns the largest score in each cluster (B, M), at least 0.

    This is the shift of the exponents in a cluster. With one shift for the whole image, clusters
    with small scores would underflow. With a shift below 0, the constant in the sum of weights
    could overflow.
    """
    zeros = jnp.zeros_like(scores, shape=(num_clusters,))
    largest = lambda score, at: zeros.at[at].max(score, mode="promise_in_bounds")  # noqa: E731
    return jax.vmap(largest)(scores, assignment)


@counted(_macs, static_argnames=("num_clusters",))
def cluster_sums(
    x: Float[Array, "B N C"], assignment: Int[Array, "B N"], num_clusters: int
) -> Float[Array, "B M C"]:
    """Returns the sum of the rows in each cluster (B, M, C).

    Args:
      x: (B, N, C).
      assignment: cluster of each row (B, N), integers in [0, M).
      num_clusters: M.
    """
    return _cluster_sums(x, assignment, num_clusters)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _cluster_sums(x, assignment, num_clusters):
    by = lambda sums: functools.partial(sums, num_clusters=num_clusters)  # noqa: E731
    forms = {"cpu": by(sums_by_scatter), "default": by(sums_by_products)}
    return by_platform("cluster sums", x, assignment, **forms)


def _cluster_sums_forward(x, assignment, num_clusters):
    return _cluster_sums(x, assignment, num_clusters), assignment


def _cluster_sums_backward(num_clusters, assignment, d_sums):
    del num_clusters
    return take(d_sums, assignment), None


_cluster_sums.defvjp(_cluster_sums_forward, _cluster_sums_backward)
