"""Dynamic group attention (Liu et al. 2022, "Dynamic Group Transformer", Section 3.1).

Queries are divided into groups by the nearest of G centroids, every centroid selects the k keys of
largest dot product, and each query attends to the keys of its group only (Eqs. 1 and 2). The number
of queries in a group depends on the data; two forms keep the shapes static and give the same values
and gradients for any assignment:

* dense: full logits with the keys of other groups masked. Cheapest while L^2 is small.
* tiles: queries sorted by group and cut into tiles of one group each. ``(L - g) // tile + g`` tiles
  with ``g = min(G, L)`` are enough for every possible assignment, so no query is ever dropped.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tokenvit_jax.ops.attention import check_qkv, dot_product_attention, softmax_dtype
from tokenvit_jax.ops.counted import counted
from tokenvit_jax.ops.group_attention_paths import (
    attend_dense,
    attend_tiles,
    cheaper_path,
    plan_tiles,
    tile_size,
)
from tokenvit_jax.ops.selection import top_indices

PATHS = ("auto", "dense", "tiles")


class GroupAttention(NamedTuple):
    """Output (B, L, N, D); groups (B, N, L) int32; keys (B, N, G, min(top_k, L)) int32."""

    output: jax.Array
    groups: jax.Array
    keys: jax.Array


class GroupSums(NamedTuple):
    """Of unit-norm queries, per head and group: sums (N, G, D) and counts (N, G)."""

    sums: jax.Array
    counts: jax.Array


def _macs(inputs, outputs):
    """2 k L C + 2 L G C of Eq. 6, or 2 L^2 C where every key is selected."""
    batch, length, heads, dim = inputs[0]
    groups, selected = outputs[2][2:]
    per_query = 2 * length if selected == length else 2 * selected + 2 * groups
    return batch * length * heads * dim * per_query


@counted(_macs, static_argnames=("top_k", "scale", "path"))
def group_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    centroids: jax.Array,
    *,
    top_k: int,
    scale: float | None = None,
    path: str = "auto",
) -> GroupAttention:
    """Attends from every query to the ``top_k`` keys that its group's centroid selects.

    A query belongs to the centroid of largest dot product, all centroids at unit norm. Ties go to
    the lowest index, of groups as of keys. With ``top_k >= L`` this is dense attention, exactly.
    Routing carries no gradient; distances and softmax are computed in float32 (float64 for float64
    inputs) whatever the input type.

    Args:
      q: queries (B, L, N, D).
      k: keys (B, L, N, D).
      v: values (B, L, N, D).
      centroids: (N, G, D), any norm but zero.
      top_k: number of keys per group, at least 1.
      scale: factor of the logits; None: 1 / sqrt(D).
      path: "dense", "tiles", or "auto": the cheaper one, chosen from the shapes alone.

    Returns:
      GroupAttention(output, groups, keys); keys in order of falling score.

    Raises:
      ValueError: shapes that do not fit, ``top_k`` below 1, or an unknown ``path``.

    References:
      Liu et al. 2022, Eqs. 1 and 2.
    """
    check_qkv(q, k, v)
    _check_routing(q, k, centroids, top_k, path)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    length = q.shape[1]
    top_k = min(top_k, length)

    heads_first = [jnp.swapaxes(x, 1, 2) for x in (q, k, v)]
    routing_q, routing_k = (lax.stop_gradient(x) for x in heads_first[:2])
    centroids = _unit_norm(lax.stop_gradient(centroids))
    groups = _assign(routing_q, centroids)
    scores = _key_scores(routing_k, centroids)  # (B, N, L, G)
    keys = top_indices(jnp.swapaxes(scores, -1, -2), top_k)

    if top_k == length:
        return GroupAttention(dot_product_attention(q, k, v, scale=scale), groups, keys)
    scaled = (heads_first[0] * scale, *heads_first[1:])
    num_groups = centroids.shape[1]
    if path == "auto":
        path = cheaper_path(length, num_groups, top_k)
    if path == "dense":
        output = attend_dense(*scaled, groups, _largest(scores, top_k))
    else:
        plan = plan_tiles(groups, num_groups, tile_size(length, num_groups))
        output = attend_tiles(*scaled, keys, plan)
    return GroupAttention(jnp.swapaxes(output, 1, 2), groups, keys)


def group_sums(q: jax.Array, groups: jax.Array, num_groups: int) -> GroupSums:
    """Sums the unit-norm queries of every group over the whole batch (the sum of Eq. 3).

    Args:
      q: queries (B, L, N, D).
      groups: (B, N, L) int32 in [0, num_groups).
      num_groups: G.

    Returns:
      GroupSums(sums (N, G, D), counts (N, G)) in float32, or float64 for float64 queries.
    """
    q = _unit_norm(lax.stop_gradient(q))
    member = (groups[:, :, None, :] == jnp.arange(num_groups)[:, None]).astype(q.dtype)
    # A product with the membership is deterministic on every backend; a scatter-add is not.
    sums = jnp.einsum("bngl,blnd->ngd", member, q, precision=lax.Precision.HIGHEST)
    return GroupSums(sums, member.sum((0, 3)))


def move_centroids(centroids: jax.Array, sums: GroupSums, old_weight: jax.Array) -> jax.Array:
    """Moves centroids towards the means of their groups (Eqs. 3 and 4).

    Args:
      centroids: (N, G, D).
      sums: of the whole global batch.
      old_weight: weight of the old centroid, in [0, 1].

    Returns:
      (N, G, D) at unit norm; an empty group keeps its centroid.
    """
    counts = sums.counts[..., None]
    means = sums.sums / jnp.maximum(counts, 1)
    moved = _unit_norm(old_weight * centroids + (1 - old_weight) * means)
    return jnp.where(counts > 0, moved, centroids)


def update_centroids(
    centroids: jax.Array,
    q: jax.Array,
    groups: jax.Array,
    *,
    old_weight: float | jax.Array,
    axis_name: str | None = None,
) -> jax.Array:
    """Returns the centroids after one batch: ``Norm(w e + (1 - w) mean of unit-norm queries)``.

    Args:
      centroids: (N, G, D), unit norm.
      q: queries (B, L, N, D).
      groups: their groups (B, N, L), from :func:`group_attention`.
      old_weight: w, the weight of the old centroid, in [0, 1].
      axis_name: mapped axis that the batch is divided over; sums and counts are added over it
        before they are divided. Under jit over a mesh the batch is already the global one.

    Returns:
      (N, G, D) at unit norm; an empty group keeps its centroid.

    Raises:
      ValueError: shapes that do not fit.

    References:
      Liu et al. 2022, Eqs. 3 and 4.
    """
    heads, num_groups, dim = centroids.shape
    if q.ndim != 4 or q.shape[2:] != (heads, dim):
        raise ValueError(f"q has shape {q.shape}; expected (batch, length, {heads}, {dim})")
    if groups.shape != (q.shape[0], heads, q.shape[1]):
        raise ValueError(
            f"groups has shape {groups.shape}; expected {(q.shape[0], heads, q.shape[1])}"
        )
    sums = group_sums(q, groups, num_groups)
    if axis_name is not None:
        sums = lax.psum(sums, axis_name)
    return move_centroids(centroids, sums, old_weight)


def _check_routing(q, k, centroids, top_k, path):
    if k.shape != q.shape:
        raise ValueError(f"k has shape {k.shape}; it must be that of q, {q.shape}")
    if centroids.ndim != 3 or (centroids.shape[0], centroids.shape[2]) != q.shape[2:]:
        raise ValueError(
            f"centroids has shape {centroids.shape}; expected ({q.shape[2]}, groups, "
            f"{q.shape[3]}) for q of shape {q.shape}"
        )
    if centroids.shape[1] < 1:
        raise ValueError("centroids has 0 groups; at least 1 is needed")
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be at least 1")
    if path not in PATHS:
        raise ValueError(f"path is {path!r}; it must be one of {', '.join(PATHS)}")


def _unit_norm(x):
    x = x.astype(softmax_dtype(x.dtype))
    square = jnp.sum(x * x, -1, keepdims=True)
    return x * lax.rsqrt(jnp.maximum(square, jnp.finfo(x.dtype).tiny))


def _per_image(centroids, q):
    return jnp.broadcast_to(centroids.astype(q.dtype), (q.shape[0], *centroids.shape))


def _assign(q, centroids):
    """Returns the group (B, N, L) of every query: the first largest dot product."""
    dtype = softmax_dtype(q.dtype)
    scores = jnp.einsum(
        "bngd,bnld->bngl", _per_image(centroids, q), q, preferred_element_type=dtype
    )
    num_groups = centroids.shape[1]
    # Two reductions over a leading axis are vector loops on CPU; argmax is a scalar one.
    is_best = scores == scores.max(2, keepdims=True)
    first = jnp.where(is_best, jnp.arange(num_groups, dtype=jnp.int32)[:, None], num_groups)
    return jnp.minimum(first.min(2), num_groups - 1)  # NaN equals nothing: keep it in range


def _key_scores(k, centroids):
    """Returns the dot products (B, N, L, G) of keys and centroids."""
    dtype = softmax_dtype(k.dtype)
    scores = jnp.einsum(
        "bnld,bngd->bnlg", k, _per_image(centroids, k), preferred_element_type=dtype
    )
    return jnp.where(scores == 0, jnp.zeros_like(scores), scores)  # -0 and 0 are a tie


def _largest(scores, top_k):
    """Returns the mask (B, N, L, G) of the ``top_k`` largest along L, ties to the lowest index.

    Bisection, bit by bit, of the k-th largest value in an integer that orders like the float, then
    of the index up to which its ties belong. Every step counts along a leading axis, which is a
    vector loop on CPU: faster than ``lax.top_k`` for a mask, and the same set exactly.
    """
    unsigned, signed, bits = {4: (jnp.uint32, jnp.int32, 32), 8: (jnp.uint64, jnp.int64, 64)}[
        scores.dtype.itemsize
    ]
    sign = jnp.array(1 << (bits - 1), unsigned)
    raw = lax.bitcast_convert_type(scores, unsigned)
    ordered = jnp.where(lax.bitcast_convert_type(scores, signed) < 0, ~raw, raw | sign)

    def count(mask):
        return jnp.sum(mask, axis=-2, keepdims=True, dtype=jnp.int32)

    zero = jnp.zeros_like(ordered, shape=(*scores.shape[:2], 1, scores.shape[3]))
    threshold = _largest_integer(zero, bits, lambda value: count(ordered >= value) >= top_k)
    above, tied = ordered > threshold, ordered == threshold
    wanted = top_k - count(above)
    index = jnp.arange(scores.shape[2], dtype=jnp.int32)[:, None]
    # The ties before this index are selected.
    end = _largest_integer(
        jnp.zeros_like(wanted),
        scores.shape[2].bit_length(),
        lambda value: count(tied & (index < value)) <= wanted,
    )
    return above | (tied & (index < end))


def _largest_integer(zero, bits, holds):
    """Returns the largest integers of so many bits, shaped like ``zero``, for which ``holds``.

    ``holds`` is true up to some integer and false above it. A loop, not 32 copies of its body: it
    compiles in half the time and runs as fast.
    """

    def try_bit(_, carry):
        value, bit = carry
        candidate = value | bit
        return jnp.where(holds(candidate), candidate, value), bit >> 1

    first_bit = jnp.array(1 << (bits - 1), zero.dtype)
    return lax.fori_loop(0, bits, try_bit, (zero, first_bit))[0]
