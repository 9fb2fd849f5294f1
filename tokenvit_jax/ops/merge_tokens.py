"""Merging of tokens by cluster (ClusTR, Eq. 3)."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from tokenvit_jax.ops.attention import softmax_dtype
from tokenvit_jax.ops.chunks import num_chunks
from tokenvit_jax.ops.counted import counted

# Added to the sum of the weights of a cluster.
EPSILON = 1e-6


def _macs(inputs, outputs):
    """N C: every token is multiplied by its weight and added once."""
    batch, length, dim = inputs[0]
    return batch * length * dim


@counted(_macs, static_argnames=("num_clusters",))
def merge_tokens(
    tokens: jax.Array,
    assignment: jax.Array,
    num_clusters: int,
    scores: jax.Array | None = None,
) -> jax.Array:
    """Computes the weighted mean of the tokens of every cluster.

    The weights of a cluster are exp(score) over their sum plus 1e-6. Computed in float32 (float64
    for float64 tokens) for any finite score; a score of -inf excludes a token.

    Args:
      tokens: (B, N, C).
      assignment: cluster of every token (B, N), integers in [0, M).
      num_clusters: M, at least 1.
      scores: logarithms of the weights (B, N); None: the plain mean.

    Returns:
      (B, M, C) in the type of ``tokens``; 0 for an empty cluster.

    Raises:
      ValueError: shapes that do not fit, or ``num_clusters`` below 1.

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
    own_shift = jnp.take_along_axis(shift, assignment, 1, mode="promise_in_bounds")
    weights = jnp.exp(scores - own_shift)[..., None]
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
    """Returns the largest score of every cluster (B, M), or 0 if that is larger.

    It shifts the exponents of a cluster: one for the whole image would leave nothing of clusters
    with small scores. Never below 0, where the constant in the sum of weights would overflow.
    """
    zeros = jnp.zeros_like(scores, shape=(num_clusters,))
    largest = lambda score, at: zeros.at[at].max(score, mode="promise_in_bounds")  # noqa: E731
    return jax.vmap(largest)(scores, assignment)


@counted(_macs, static_argnames=("num_clusters",))
def cluster_sums(x: jax.Array, assignment: jax.Array, num_clusters: int) -> jax.Array:
    """Returns the sums (B, M, C) of the rows of every cluster.

    Args:
      x: (B, N, C).
      assignment: cluster of every row (B, N), integers in [0, M).
      num_clusters: M.
    """
    return _cluster_sums(x, assignment, num_clusters)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _cluster_sums(x, assignment, num_clusters):
    by = lambda sums: functools.partial(sums, num_clusters=num_clusters)  # noqa: E731
    return lax.platform_dependent(
        x, assignment, cpu=by(_sums_by_scatter), default=by(_sums_by_products)
    )


def _sums_by_scatter(x, assignment, num_clusters):
    """Row after row: on CPU 5 to 100 times faster than products, more for more clusters."""
    zeros = jnp.zeros_like(x, shape=(num_clusters, x.shape[2]))
    add = lambda rows, at: zeros.at[at].add(rows, mode="promise_in_bounds")  # noqa: E731
    return jax.vmap(add)(x, assignment)


def _sums_by_products(x, assignment, num_clusters, chunk=1 << 25):
    """Products with the membership, of at most about ``chunk`` entries at once.

    Deterministic on accelerators, where a scatter adds in any order.
    """
    batch, length, dim = x.shape
    size = min(max(chunk // (batch * num_clusters), 1), length)
    cluster = jnp.arange(num_clusters, dtype=assignment.dtype)[:, None]

    def step(i, sums):
        start = jnp.minimum(i * size, length - size)
        is_new = start + jnp.arange(size) >= i * size  # the last chunk begins earlier
        rows = lax.dynamic_slice_in_dim(x, start, size, 1)
        at = lax.dynamic_slice_in_dim(assignment, start, size, 1)[:, None]
        member = ((at == cluster) & is_new).astype(x.dtype)  # (B, M, size)
        return sums + jnp.einsum("bmn,bnc->bmc", member, rows, precision=lax.Precision.HIGHEST)

    sums = jnp.zeros_like(x, shape=(batch, num_clusters, dim))
    return lax.fori_loop(0, num_chunks(length, size), step, sums)


def _cluster_sums_forward(x, assignment, num_clusters):
    return _cluster_sums(x, assignment, num_clusters), assignment


def _cluster_sums_backward(num_clusters, assignment, d_sums):
    del num_clusters
    rows = jnp.take_along_axis(d_sums, assignment[..., None], 1, mode="promise_in_bounds")
    return rows, None


_cluster_sums.defvjp(_cluster_sums_forward, _cluster_sums_backward)
