"""Clustering of tokens by density peaks (Xie et al. 2022, "ClusTR", Section 3.1).

A token is a good centre if its neighbourhood is dense and every denser token is far away (Eqs. 1
and 2). Both need all N^2 distances of an image, which are never held at once. GPUs and TPUs have
kernels, which keep distances in registers; elsewhere they are computed in chunks of tokens
(:mod:`tokenvit_jax.ops.nearest_tokens`).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, Key, UInt32

from tokenvit_jax.kernels import density_peaks as kernels
from tokenvit_jax.kernels import density_peaks_tpu as tpu_kernels
from tokenvit_jax.kernels import top_indices as counting
from tokenvit_jax.kernels.platforms import by_platform
from tokenvit_jax.ops.counted import counted
from tokenvit_jax.ops.gather import put, take
from tokenvit_jax.ops.nearest_tokens import (
    Neighbors,
    chunked_forms,
    for_kernels,
    nearest_center,
    nearest_denser,
    nearest_neighbors,
    points_of,
    square_norms,
)
from tokenvit_jax.ops.selection import top_indices

RULES = ("nearest", "parent")

# One key, or one key per image, in either of jax's two forms.
Keys = Key[Array, ""] | Key[Array, " B"] | UInt32[Array, " words"] | UInt32[Array, "B words"]


class DensityPeaks(NamedTuple):
    """Density of every token and its distance to the nearest denser token.

    Attributes:
      density: (B, N), float32, or float64 for float64 tokens.
      delta: distance to the nearest denser token (B, N), in the same type.
      parent: the nearest denser token (B, N); a peak is its own parent.
    """

    density: Float[Array, "B N"]
    delta: Float[Array, "B N"]
    parent: Int32[Array, "B N"]


class Clusters(NamedTuple):
    """Clusters of tokens.

    Attributes:
      assignment: cluster of each token (B, N), in [0, M).
      centers: token at the centre of each cluster (B, M), in order of falling density times delta.
      density: (B, N), as in :class:`DensityPeaks`.
      delta: (B, N), as in :class:`DensityPeaks`.
    """

    assignment: Int32[Array, "B N"]
    centers: Int32[Array, "B M"]
    density: Float[Array, "B N"]
    delta: Float[Array, "B N"]


def cluster_density_peaks(
    tokens: Float[Array, "B N C"],
    num_clusters: int,
    *,
    neighbors: int = 5,
    mask: Bool[Array, "B N"] | None = None,
    rng: Keys | None = None,
    assign: str = "nearest",
    chunk_size: int | None = None,
) -> Clusters:
    """Clusters the tokens of every image around those with the largest density times delta.

    Calls :func:`density_peaks` and :func:`assign_clusters`, which document the details.

    Args:
      tokens: (B, N, C).
      num_clusters: M, from 1 to N.
      neighbors: k of Eq. 1.
      mask: (B, N) bool, True for real tokens; None: all.
      rng: key, or one key per image (B,), for noise that breaks ties in density; None: no noise.
      assign: "nearest": each token joins the nearest centre; "parent": it joins the cluster of its
        nearest denser token.
      chunk_size: number of tokens whose distances are held at once; None: chosen for the platform.
        Kernels do without chunks.

    Returns:
      Clusters(assignment, centers, density, delta).

    Raises:
      ValueError: the shapes do not fit together, or a value is out of range.

    References:
      Xie et al. 2022, Section 3.1.
    """
    peaks = density_peaks(tokens, neighbors=neighbors, mask=mask, rng=rng, chunk_size=chunk_size)
    return assign_clusters(
        tokens, peaks, num_clusters, mask=mask, assign=assign, chunk_size=chunk_size
    )


def density_peaks(
    tokens: Float[Array, "B N C"],
    *,
    neighbors: int = 5,
    mask: Bool[Array, "B N"] | None = None,
    rng: Keys | None = None,
    chunk_size: int | None = None,
) -> DensityPeaks:
    """Computes the density of every token and its distance to the nearest denser token.

    Distances are Euclidean, divided by sqrt(C), in float32 (float64 for float64 tokens). On GPUs
    and TPUs, tokens of 16 bits that are nearer than 2^-9 of their length have distance 0. If two
    tokens have equal density, the one with the lower index counts as denser. The delta of the
    densest token of an image is the largest distance between two tokens of the image. The results
    carry no gradient.

    Args:
      tokens: (B, N, C).
      neighbors: k of Eq. 1, counting the token itself; at most the number of tokens is used.
      mask: (B, N) bool, True for real tokens; None: all. Masked tokens are neighbours of no token,
        and their density and delta are 0.
      rng: key for uniform noise below 1e-6, which is added to the density and breaks ties at
        random; None: no noise. With one key per image (B,), the noise of an image does not depend
        on its batch, for example when a batch is divided over devices.
      chunk_size: tokens whose distances are held at once; None: chosen for the platform.

    Returns:
      DensityPeaks(density, delta, parent).

    Raises:
      ValueError: the shapes do not fit together, or ``neighbors`` or ``chunk_size`` is below 1.

    References:
      Xie et al. 2022, Eqs. 1 and 2.
    """
    _check_tokens(tokens, mask, chunk_size)
    if neighbors < 1:
        raise ValueError(f"neighbors is {neighbors}; it must be at least 1")
    if rng is not None:
        if not jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):
            rng = jax.random.wrap_key_data(rng)
        if rng.shape not in ((), tokens.shape[:1]):
            raise ValueError(
                f"rng has shape {rng.shape}; expected one key, or {tokens.shape[0]} of them for "
                f"tokens of shape {tokens.shape}"
            )
    return _density_peaks(tokens, mask, rng, neighbors=neighbors, chunk_size=chunk_size)


def assign_clusters(
    tokens: Float[Array, "B N C"],
    peaks: DensityPeaks,
    num_clusters: int,
    *,
    mask: Bool[Array, "B N"] | None = None,
    threshold: float | Float[Array, ""] | None = None,
    assign: str = "nearest",
    chunk_size: int | None = None,
) -> Clusters:
    """Selects the tokens with the largest density times delta as centres, and assigns the others.

    The densest token is always a centre, and a centre is in its own cluster. Ties go to the lowest
    index, for centres and for clusters. "nearest" is the rule of the authors' implementation;
    "parent", where a token joins the cluster of its nearest denser token, is the rule of the
    paper's text.

    Args:
      tokens: (B, N, C).
      peaks: density, delta and parent of these tokens, computed with the same mask.
      num_clusters: M, from 1 to N.
      mask: (B, N) bool, True for real tokens; None: all. Masked tokens are not centres; with either
        rule they are assigned to the nearest centre.
      threshold: () density times delta below which a token, except for the densest, is not a
        centre. :func:`used_clusters` returns which clusters remain; the others are empty. None: all
        remain.
      assign: "nearest" or "parent".
      chunk_size: number of tokens whose distances are held at once; None: chosen for the platform.

    Returns:
      Clusters(assignment, centers, density, delta). If ``mask`` is traced, an image can have fewer
      real tokens than clusters: then the surplus clusters at the end are empty, and their centres
      are masked tokens.

    Raises:
      ValueError: the shapes do not fit together, ``num_clusters`` is not from 1 to N or is above
        the number of real tokens in an image (where the values of ``mask`` are known),
        ``chunk_size`` is below 1, or ``assign`` is unknown.

    References:
      Xie et al. 2022, Section 3.1.
    """
    _check_tokens(tokens, mask, chunk_size)
    for name, x in peaks._asdict().items():
        if x.shape != tokens.shape[:2]:
            raise ValueError(f"peaks.{name} has shape {x.shape}; expected {tokens.shape[:2]}")
    if not 1 <= num_clusters <= tokens.shape[1]:
        raise ValueError(
            f"num_clusters is {num_clusters}; it must be from 1 to {tokens.shape[1]} for tokens of "
            f"shape {tokens.shape}"
        )
    if assign not in RULES:
        raise ValueError(f"assign is {assign!r}; it must be one of {', '.join(RULES)}")
    if mask is not None and not isinstance(mask, jax.core.Tracer):
        fewest = int(mask.sum(1).min(initial=num_clusters))
        if fewest < num_clusters:
            raise ValueError(
                f"mask leaves an image {fewest} tokens; num_clusters, {num_clusters}, must not be "
                "more than that"
            )
    return _assign_clusters(
        tokens, peaks, mask, threshold,
        num_clusters=num_clusters, assign=assign, chunk_size=chunk_size,
    )  # fmt: skip


def used_clusters(
    peaks: DensityPeaks,
    centers: Int32[Array, "B M"],
    threshold: float | Float[Array, ""] | None,
) -> Bool[Array, "B M"]:
    """Returns which centres reach the threshold of :func:`assign_clusters`.

    Args:
      peaks: density and delta of the tokens.
      centers: tokens (B, M) in order of falling density times delta.
      threshold: (); None: all are used.
    """
    if threshold is None:
        return jnp.ones(centers.shape, bool)
    used = take(peaks.density * peaks.delta, centers) >= threshold
    return used.at[:, 0].set(True)  # the densest token


def _check_tokens(tokens, mask, chunk_size):
    if tokens.ndim != 3:
        raise ValueError(f"tokens has shape {tokens.shape}; expected (batch, tokens, channels)")
    if mask is not None and (mask.shape != tokens.shape[:2] or mask.dtype != bool):
        raise ValueError(
            f"mask has shape {mask.shape} and type {mask.dtype}; expected {tokens.shape[:2]} and "
            f"bool for tokens of shape {tokens.shape}"
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1, or None")


# ------------------------------------------------------------------------------------------------
# Density and delta
# ------------------------------------------------------------------------------------------------


def _macs(inputs, outputs):
    """Counts N^2 C: every distance once."""
    batch, length, dim = inputs[0]
    return batch * length**2 * dim


@counted(_macs, static_argnames=("neighbors", "chunk_size"))
def _density_peaks(tokens, mask, rng, *, neighbors, chunk_size):
    tokens = lax.stop_gradient(tokens)
    batch, length, channels = tokens.shape
    chunks = batch, length, length, chunk_size
    k = min(neighbors, length)
    misfits = {
        "cuda": kernels.misfit(channels, k),
        "tpu": tpu_kernels.misfit(length, channels, tokens.dtype, k, mask is not None),
    }
    near = by_platform(
        "nearest neighbors", tokens, mask, misfits=misfits,
        cuda=functools.partial(_neighbors_on_gpu, k=k),
        tpu=functools.partial(_neighbors_on_tpu, k=k),
        **chunked_forms(functools.partial(nearest_neighbors, k=k), *chunks),
    )  # fmt: skip
    density = _density(near, mask, rng, channels)
    squares, parent = by_platform(
        "nearest denser token", tokens, mask, near, density, misfits=misfits,
        cuda=_nearest_denser_on_gpu, tpu=_nearest_denser_on_tpu,
        **chunked_forms(nearest_denser, *chunks),
    )  # fmt: skip
    squares = jnp.where(jnp.isinf(squares), near.farthest[:, None], squares)  # a peak (Eq. 2)
    if mask is not None:
        squares = jnp.where(mask, squares, 0)
        parent = jnp.where(mask, parent, jnp.arange(length, dtype=jnp.int32))
    return DensityPeaks(density, jnp.sqrt(squares / channels), parent)


def _neighbors_on_gpu(tokens, mask, *, k):
    points = points_of(for_kernels(tokens, mask), mask)
    squares, indices, farthest = kernels.nearest_neighbors(*points, k=k, masked=mask is not None)
    return Neighbors(squares, indices, farthest.max(1))


def _neighbors_on_tpu(tokens, mask, *, k):
    points = points_of(for_kernels(tokens, mask), mask)
    squares, indices, farthest = tpu_kernels.nearest_neighbors(points.x, points.square, k=k)
    return Neighbors(squares, indices, farthest.max(1))


def _nearest_denser_on_gpu(tokens, mask, near, density):
    points = points_of(for_kernels(tokens, mask), mask)
    return kernels.nearest_denser(*points, density, near.squares, near.indices)


def _nearest_denser_on_tpu(tokens, mask, near, density):
    del near  # all tokens are searched
    points = points_of(for_kernels(tokens, mask), mask)
    return tpu_kernels.nearest_denser(points.x, points.square, density)


def _density(near, mask, rng, channels):
    found = near.squares < jnp.inf  # fewer than k if there are fewer tokens
    total = jnp.where(found, near.squares, 0).sum(1)
    density = jnp.exp(-total / (channels * jnp.maximum(found.sum(1), 1)))  # Eq. 1
    if rng is not None:
        rng = jax.random.split(rng, density.shape[0]) if rng.ndim == 0 else rng
        draw = lambda key: jax.random.uniform(key, density.shape[1:], density.dtype)  # noqa: E731
        density = density + 1e-6 * jax.vmap(draw)(rng)
    return density if mask is None else jnp.where(mask, density, 0)


# ------------------------------------------------------------------------------------------------
# Clusters
# ------------------------------------------------------------------------------------------------


def _no_macs(inputs, outputs):
    """Counts nothing: :func:`density_peaks` counts the distances to the centres too."""
    return 0


@counted(_no_macs, static_argnames=("num_clusters", "assign", "chunk_size"))
def _assign_clusters(tokens, peaks, mask, threshold, *, num_clusters, assign, chunk_size):
    peaks = lax.stop_gradient(peaks)
    batch, length, channels = tokens.shape
    centers, number = _centers(peaks, mask, num_clusters)
    used = used_clusters(peaks, centers, threshold)
    if mask is not None:
        used &= take(mask, centers)
    num_used = used.sum(1, dtype=jnp.int32)  # the first ones: the score falls
    # The cluster of a centre; -1 for other tokens.
    own = jnp.where(number < num_used[:, None], number, -1)

    if assign == "nearest" or mask is not None:
        assignment = by_platform(
            "nearest center", lax.stop_gradient(tokens), mask, centers, num_used,
            misfits={
                "cuda": kernels.misfit(channels),
                "tpu": tpu_kernels.misfit(num_clusters, channels, tokens.dtype),
            },
            cuda=_nearest_center_on_gpu, tpu=_nearest_center_on_tpu,
            **chunked_forms(nearest_center, batch, length, num_clusters, chunk_size),
        )  # fmt: skip
    if assign == "parent":
        by_parent = _follow_parents(peaks.parent, own)
        assignment = by_parent if mask is None else jnp.where(mask, by_parent, assignment)
    assignment = jnp.where(own < 0, assignment, own)
    return Clusters(assignment, centers, peaks.density, peaks.delta)


def _centers(peaks, mask, num_clusters):
    """Returns the tokens with the largest density times delta, the densest one first.

    Returns:
      The tokens (B, M), and for every token (B, N) its place among them, or -1 or at least M.
    """
    densest = peaks.parent == jnp.arange(peaks.parent.shape[1])
    score = jnp.where(densest, jnp.inf, peaks.density * peaks.delta)
    if mask is not None:
        score = jnp.where(mask, score, -jnp.inf)

    def select(score):
        centers = top_indices(score, num_clusters)
        numbers = jnp.broadcast_to(jnp.arange(num_clusters, dtype=jnp.int32), centers.shape)
        return centers, put(jnp.full_like(score, -1, jnp.int32), centers, numbers)

    def by_ranks(score):
        order, places = counting.ranks(score)
        return order[:, :num_clusters], places

    on_gpu = by_ranks if score.shape[1] <= counting.MAX_RANKED else select
    return by_platform("cluster centers", score, default=select, cuda=on_gpu)


def _nearest_center_on_gpu(tokens, mask, centers, num_used):
    x = for_kernels(tokens, mask)
    return kernels.nearest_center(x, square_norms(x), centers, num_used)


def _nearest_center_on_tpu(tokens, mask, centers, num_used):
    x = for_kernels(tokens, mask)
    return tpu_kernels.nearest_center(x, take(x, centers), num_used)


def _follow_parents(parent, own):
    """Returns the cluster of the first centre on the path along parents, in log2(N) jumps."""
    length = parent.shape[1]
    parent = jnp.where(own < 0, parent, jnp.arange(length, dtype=jnp.int32))
    jumps = (length - 1).bit_length()
    parent = lax.fori_loop(0, jumps, lambda _, parent: take(parent, parent), parent)
    return jnp.maximum(take(own, parent), 0)  # masked tokens have no path to a centre
