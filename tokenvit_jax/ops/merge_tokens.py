"""Merges tokens by cluster (ClusTR, Eq. 3)."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tokenvit_jax.kernels import cluster_sums_tpu
from tokenvit_jax.kernels.cluster_sums import (
    means_by_kernel,
    sums_by_kernel,
    sums_by_products,
    sums_by_scatter,
)
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
    if scores is None:
        x = tokens.astype(softmax_dtype(tokens.dtype))
        ones = jnp.ones_like(x[..., :1])
        sums = cluster_sums(jnp.concatenate([x, ones], -1), assignment, num_clusters)
        return (sums[..., :-1] / jnp.maximum(sums[..., -1:], 1)).astype(tokens.dtype)
    return _weighted_means(tokens, assignment, scores, num_clusters)[0].astype(tokens.dtype)


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _weighted_means(tokens, assignment, scores, num_clusters):
    """Returns the means (B, M, C), and shifts and sums of the weights (B, M).

    The shift of the exponents in a cluster is its largest score, or 0 if that is larger. With one
    shift for the whole image, clusters with small scores would underflow. With a shift below 0, the
    constant in the sum of weights could overflow.
    """
    by = lambda largest, sums: functools.partial(  # noqa: E731
        _means, num_clusters=num_clusters, largest=largest, sums=sums
    )
    return by_platform(
        "merge tokens", tokens, assignment, scores,
        cpu=by(_largest_by_scatter, sums_by_scatter),
        default=by(_largest_by_comparison, sums_by_products),
        cuda=functools.partial(means_by_kernel, num_clusters=num_clusters, epsilon=EPSILON),
        tpu=functools.partial(
            cluster_sums_tpu.means, num_clusters=num_clusters, epsilon=EPSILON
        ),
        misfits={"tpu": cluster_sums_tpu.misfit(num_clusters, tokens.shape[2], tokens.dtype)},
    )  # fmt: skip


def _means(tokens, assignment, scores, *, num_clusters, largest, sums):
    dtype = softmax_dtype(tokens.dtype)
    x, scores = tokens.astype(dtype), scores.astype(dtype)
    shift = largest(scores, assignment, num_clusters)  # (B, M)
    weights = jnp.exp(scores - take(shift, assignment))[..., None]
    sums = sums(jnp.concatenate([x * weights, weights], -1), assignment, num_clusters)
    total = sums[..., -1] + EPSILON * jnp.exp(-shift)
    return sums[..., :-1] / total[..., None], shift, total


def _largest_by_scatter(scores, assignment, num_clusters):
    zeros = jnp.zeros_like(scores, shape=(num_clusters,))
    largest = lambda score, at: zeros.at[at].max(score, mode="promise_in_bounds")  # noqa: E731
    return jax.vmap(largest)(scores, assignment)


def _largest_by_comparison(scores, assignment, num_clusters):
    cluster = jnp.arange(num_clusters, dtype=assignment.dtype)[:, None]
    return jnp.where(assignment[:, None] == cluster, scores[:, None], 0).max(2)  # fused


def _weighted_means_forward(tokens, assignment, scores, num_clusters):
    means, shift, total = _weighted_means(tokens, assignment, scores, num_clusters)
    return (means, shift, total), (tokens, assignment, scores, means, shift, total)


def _weighted_means_backward(num_clusters, residuals, gradients):
    del num_clusters
    tokens, assignment, scores, means, shift, total = residuals
    d_means, _, d_total = gradients  # the shifts cancel out
    weights = jnp.exp(scores.astype(shift.dtype) - take(shift, assignment))
    d_sums = d_means / total[..., None]
    d_token = take(d_sums, assignment)  # (B, N, C)
    # d_total is not 0 in second derivatives only: nothing else reads the sums of weights.
    of_cluster = jnp.sum(d_sums * means, -1) - d_total
    along = jnp.sum(d_token * tokens, -1) - take(of_cluster, assignment)
    d_tokens = weights[..., None] * d_token
    return d_tokens.astype(tokens.dtype), None, (weights * along).astype(scores.dtype)


_weighted_means.defvjp(_weighted_means_forward, _weighted_means_backward)


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
    forms = {"cpu": sums_by_scatter, "default": sums_by_products, "cuda": sums_by_kernel}
    forms = {platform: by(sums) for platform, sums in forms.items()}
    return by_platform("cluster sums", x, assignment, **forms)


def _cluster_sums_forward(x, assignment, num_clusters):
    return _cluster_sums(x, assignment, num_clusters), assignment


def _cluster_sums_backward(num_clusters, assignment, d_sums):
    del num_clusters
    return take(d_sums, assignment), None


_cluster_sums.defvjp(_cluster_sums_forward, _cluster_sums_backward)
