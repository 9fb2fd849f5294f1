"""Sums of the rows of every cluster, in forms for different machines."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from tokenvit_jax.kernels.platforms import device_batch


def sums_by_scatter(
    x: Float[Array, "B N C"], assignment: Int[Array, "B N"], num_clusters: int
) -> Float[Array, "B M C"]:
    """Adds row by row; on CPU 5 to 100 times faster than products, more so with more clusters."""
    zeros = jnp.zeros_like(x, shape=(num_clusters, x.shape[2]))
    add = lambda rows, at: zeros.at[at].add(rows, mode="promise_in_bounds")  # noqa: E731
    return jax.vmap(add)(x, assignment)


def sums_by_products(
    x: Float[Array, "B N C"],
    assignment: Int[Array, "B N"],
    num_clusters: int,
    chunk: int = 1 << 25,
) -> Float[Array, "B M C"]:
    """Multiplies by the membership matrix, in parts with at most about ``chunk`` entries.

    Deterministic on accelerators, where a scatter adds in any order.
    """
    batch, length, dim = x.shape
    size = min(max(chunk // (device_batch(batch) * num_clusters), 1), length)
    cluster = jnp.arange(num_clusters, dtype=assignment.dtype)[:, None]

    def step(i, sums):
        start = jnp.minimum(i * size, length - size)
        is_new = start + jnp.arange(size) >= i * size  # the last chunk begins earlier
        rows = lax.dynamic_slice_in_dim(x, start, size, 1)
        at = lax.dynamic_slice_in_dim(assignment, start, size, 1)[:, None]
        member = ((at == cluster) & is_new).astype(x.dtype)  # (B, M, size)
        return sums + jnp.einsum("bmn,bnc->bmc", member, rows, precision=lax.Precision.HIGHEST)

    sums = jnp.zeros_like(x, shape=(batch, num_clusters, dim))
    return lax.fori_loop(0, -(-length // size), step, sums)
