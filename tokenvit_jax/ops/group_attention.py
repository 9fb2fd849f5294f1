"""Dynamic group attention (Liu et al. 2022, "Dynamic Group Transformer", Section 3.1).

Queries are divided into groups by the nearest of G centroids, every centroid selects the k keys
with the largest dot product, and each query attends only to the keys that its group selected (Eqs.
1 and 2). The number of queries in a group depends on the data. Two forms keep the shapes static and
give the same values and gradients for any division into groups:

* dense (:mod:`tokenvit_jax.kernels.group_attention_dense`) computes all logits, with a mask; it is
  the cheaper form while L^2 is small.
* tiles (:mod:`tokenvit_jax.kernels.group_attention_tiles`) sorts the queries by group and cuts them
  into tiles of one group each.

GPUs have kernels for both (:mod:`tokenvit_jax.kernels.group_routing`,
:mod:`tokenvit_jax.kernels.group_attention_fused`,
:mod:`tokenvit_jax.kernels.group_attention_sorted`), TPUs have one for both
(:mod:`tokenvit_jax.kernels.group_attention_heads`): they write neither logits nor, up to 1,024
tokens, the scores of keys to memory.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from tokenvit_jax.kernels import cudnn
from tokenvit_jax.kernels.chunked import map_queries, num_chunks
from tokenvit_jax.kernels.group_attention_dense import attend_dense, attend_dense_by_cudnn
from tokenvit_jax.kernels.group_attention_fused import attend_fused
from tokenvit_jax.kernels.group_attention_heads import (
    attend_heads,
    heads_misfit,
    selected_keys,
)
from tokenvit_jax.kernels.group_attention_sorted import (
    attend_sorted,
    sort_groups,
    sorted_misfit,
)
from tokenvit_jax.kernels.group_attention_tiles import (
    attend_tiles,
    num_tiles,
    plan_tiles,
    tile_size,
)
from tokenvit_jax.kernels.group_routing import (
    assign,
    assign_misfit,
    route,
    routing_misfit,
    unpack,
)
from tokenvit_jax.kernels.group_sums import group_sums_misfit, sum_groups
from tokenvit_jax.kernels.joined import parts_of
from tokenvit_jax.kernels.platforms import by_platform, num_devices
from tokenvit_jax.ops.attention import check_qkv, dot_product_attention
from tokenvit_jax.ops.counted import counted
from tokenvit_jax.ops.dtypes import softmax_dtype
from tokenvit_jax.ops.selection import largest_mask, top_indices
from tokenvit_jax.ops.unit_norm import unit_norm

PATHS = ("auto", "dense", "tiles")
SMALLEST_TILE = {"cpu": 16, "default": 32}


class GroupAttention(NamedTuple):
    """Output of group attention, and its routing.

    Attributes:
      output: (B, L, N, D).
      groups: group of each query (B, N, L).
      keys: keys that each group selected (B, N, G, min(top_k, L)), in order of falling score.
    """

    output: Float[Array, "B L N D"]
    groups: Int32[Array, "B N L"]
    keys: Int32[Array, "B N G k"]


class GroupSums(NamedTuple):
    """Sums of unit-norm queries per head and group.

    Attributes:
      sums: (N, G, D).
      counts: number of queries (N, G).
    """

    sums: Float[Array, "N G D"]
    counts: Float[Array, "N G"]


def _macs(inputs, outputs):
    """Counts 2 k L C + 2 L G C (Eq. 6), or 2 L^2 C where every key is selected."""
    batch, length, heads, dim = inputs[0]
    groups, selected = outputs[2][2:]
    per_query = 2 * length if selected == length else 2 * selected + 2 * groups
    return batch * length * heads * dim * per_query


@counted(_macs, static_argnames=("top_k", "scale", "path", "joined"))
def group_attention(
    q: Float[Array, "B L N D"],
    k: Float[Array, "B L N D"],
    v: Float[Array, "B L N D"],
    centroids: Float[Array, "N G D"],
    *,
    top_k: int,
    scale: float | None = None,
    path: str = "auto",
    joined: bool = False,
) -> GroupAttention:
    """Attends from every query to the ``top_k`` keys that its group's centroid selects.

    A query belongs to the centroid with the largest dot product, with all centroids at unit norm.
    Ties go to the lowest index, for groups and for keys. With ``top_k >= L`` this is exactly dense
    attention. Routing carries no gradient. Distances and softmax are computed in float32 (float64
    for float64 inputs) for any input type.

    Args:
      q: queries (B, L, N, D).
      k: keys (B, L, N, D).
      v: values (B, L, N, D).
      centroids: (N, G, D), any norm but zero.
      top_k: number of keys per group, at least 1.
      scale: factor of the logits; None: 1 / sqrt(D).
      path: "dense", "tiles", or "auto": the cheaper one, chosen from the shapes alone.
      joined: whether q, k and v are the thirds of one projection, in this order. GPUs then read
        them there; with other arrays, joining them takes longer.

    Returns:
      GroupAttention(output in the type of ``v``, groups, keys).

    Raises:
      ValueError: the shapes do not fit together, ``top_k`` is below 1, or ``path`` is unknown.

    References:
      Liu et al. 2022, Eqs. 1 and 2.
    """
    check_qkv(q, k, v)
    _check_routing(q, k, centroids, top_k, path)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    length, num_groups = q.shape[1], centroids.shape[1]
    top_k = min(top_k, length)
    centroids = unit_norm(lax.stop_gradient(centroids))

    if top_k == length:
        groups, keys, _ = _route(q, k, centroids, top_k)
        return GroupAttention(dot_product_attention(q, k, v, scale=scale), groups, keys)
    on_cpu = path
    if path == "auto":
        path = cheaper_path(length, num_groups, top_k)
        on_cpu = cheaper_path_on_cpu(q.shape, num_groups, top_k)
    if path == "tiles":
        return GroupAttention(*_attend_tiles(q, k, v, centroids, top_k, scale))
    return GroupAttention(*_attend_dense(q, k, v, centroids, top_k, scale, on_cpu, joined))


def cheaper_path(
    length: int, num_groups: int, top_k: int, smallest: int = SMALLEST_TILE["default"]
) -> str:
    """Returns the path, "dense" or "tiles", that ``path="auto"`` takes for these shapes.

    Args:
      length: L.
      num_groups: G.
      top_k: number of keys per group.
      smallest: smallest number of queries in a tile.
    """
    # A tiled logit costs about as much as three dense ones (sorting, gathers, smaller products).
    # Measured on CPU, where both paths take equally long near L = 600 at k = 98, and tiles of 32
    # near L = 1,000.
    tile = tile_size(length, num_groups, smallest)
    tiled = num_tiles(length, num_groups, tile) * tile * top_k
    return "dense" if length**2 <= 3 * tiled else "tiles"


def cheaper_path_on_cpu(shape: tuple[int, ...], num_groups: int, top_k: int) -> str:
    """Returns the path that ``path="auto"`` takes on a CPU.

    Smaller tiles make "tiles" the cheaper path for shorter sequences, once all logits do not fit
    into the cache.

    Args:
      shape: shape of the queries (B, L, N, D).
      num_groups: G.
      top_k: number of keys per group.
    """
    batch, length, heads, _ = shape
    path = cheaper_path(length, num_groups, top_k)
    if path == "dense" and num_chunks(batch, heads, length, length) > 1:
        return cheaper_path(length, num_groups, top_k, SMALLEST_TILE["cpu"])
    return path


def group_sums(
    q: Float[Array, "B L N D"], groups: Int32[Array, "B N L"], num_groups: int
) -> GroupSums:
    """Sums the unit-norm queries in each group over the whole batch (the sum in Eq. 3).

    Args:
      q: queries (B, L, N, D).
      groups: group of each query (B, N, L), in [0, num_groups).
      num_groups: G.

    Returns:
      GroupSums(sums (N, G, D), counts (N, G)) in float32, or float64 for float64 queries.
    """
    by_kernel = lambda q, groups: sum_groups(q, groups, num_groups).sum(0, keepdims=True)  # noqa: E731
    by_products = lambda q, groups: _as_part(_sum_by_products(q, groups, num_groups))  # noqa: E731
    parts = by_platform(
        "group sums",
        *(lax.stop_gradient(q), groups),
        cuda=by_kernel,
        default=by_products,
        misfits={"cuda": group_sums_misfit(q, num_groups)},
    )
    sums = parts.sum(0)
    return GroupSums(sums[..., :-1], sums[..., -1])


def _sum_by_products(q, groups, num_groups):
    """Returns the sums of queries and their numbers (N, G, D + 1)."""
    q = unit_norm(q)
    member = (groups[:, :, None, :] == jnp.arange(num_groups)[:, None]).astype(q.dtype)
    # A product with the membership matrix is deterministic on every backend; a scatter-add is not.
    sums = jnp.einsum("bngl,blnd->ngd", member, q, precision=lax.Precision.HIGHEST)
    return jnp.concatenate([sums, member.sum((0, 3))[..., None]], -1)


def _as_part(sums):
    """Returns the sums as the first of as many parts as kernels return, one per device."""
    return jnp.pad(sums[None], [(0, num_devices() - 1)] + [(0, 0)] * sums.ndim)


def move_centroids(
    centroids: Float[Array, "N G D"], sums: GroupSums, old_weight: float | Float[Array, ""]
) -> Float[Array, "N G D"]:
    """Moves centroids towards the means of their groups (Eqs. 3 and 4).

    Args:
      centroids: (N, G, D).
      sums: sums and counts of the queries of the global batch.
      old_weight: weight of the old centroid, in [0, 1].

    Returns:
      (N, G, D) at unit norm; an empty group keeps its centroid.
    """
    counts = sums.counts[..., None]
    means = sums.sums / jnp.maximum(counts, 1)
    moved = unit_norm(old_weight * centroids + (1 - old_weight) * means)
    return jnp.where(counts > 0, moved, centroids)


def update_centroids(
    centroids: Float[Array, "N G D"],
    q: Float[Array, "B L N D"],
    groups: Int32[Array, "B N L"],
    *,
    old_weight: float | Float[Array, ""],
    axis_name: str | None = None,
) -> Float[Array, "N G D"]:
    """Returns the centroids after one batch: ``Norm(w e + (1 - w) mean of unit-norm queries)``.

    Args:
      centroids: (N, G, D), unit norm.
      q: queries (B, L, N, D).
      groups: group of each query (B, N, L), from :func:`group_attention`.
      old_weight: w, the weight of the old centroid, in [0, 1].
      axis_name: mapped axis over which the batch is divided; sums and counts are added over it
        before the division. None under jit, where the batch is the global batch.

    Returns:
      (N, G, D) at unit norm; an empty group keeps its centroid.

    Raises:
      ValueError: the shapes do not fit together.

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


def _attend_dense(q, k, v, centroids, top_k, scale, on_cpu, joined):
    """Attends with all logits: on CPU in chunks of queries, or in tiles, else in kernels."""

    def masked(q, k, v, centroids, run, attend=attend_dense):
        groups, keys, scores = _route(q, k, centroids, top_k)
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
        selected = largest_mask(scores, top_k)
        attend_to_all = lambda q, groups: attend(q, k, v, groups, selected)  # noqa: E731
        output = run(attend_to_all, k.shape[2], q * scale, groups)
        return jnp.swapaxes(output, 1, 2), groups, keys

    def at_once(attend, _, *queries):
        return attend(*queries)

    def fused(q, k, v, centroids):
        parts = parts_of(q, k, v, joined)
        groups, words = route(lax.stop_gradient(parts), centroids, top_k)
        output = attend_fused(parts, groups, words, scale)
        return output, groups, _in_order(unpack(words, num_groups), k, centroids, top_k)

    num_groups = centroids.shape[1]
    on_gpu, misfit = fused, _other_types(q, k, v) or routing_misfit(q, num_groups)
    if misfit and cudnn.misfit(q, k, v, extra=num_groups) is None:
        on_gpu = functools.partial(masked, run=at_once, attend=attend_dense_by_cudnn)
        misfit = None
    return by_platform(
        "group attention, dense",
        *(q, k, v, centroids),
        cpu=(
            functools.partial(_in_tiles, top_k=top_k, scale=scale, smallest=SMALLEST_TILE["cpu"])
            if on_cpu == "tiles"
            else functools.partial(masked, run=map_queries)
        ),
        cuda=on_gpu,
        tpu=functools.partial(_attend_by_heads, top_k=top_k, scale=scale),
        default=functools.partial(masked, run=at_once),
        misfits={"cuda": misfit, "tpu": _other_types(q, k, v) or heads_misfit(q, num_groups)},
        shared=(3,),
    )


def _attend_tiles(q, k, v, centroids, top_k, scale):
    """Attends to the keys of one group at a time: in tiles of queries, on GPUs in kernels."""
    num_groups = centroids.shape[1]
    in_tiles = {
        platform: functools.partial(_in_tiles, top_k=top_k, scale=scale, smallest=smallest)
        for platform, smallest in SMALLEST_TILE.items()
    }

    def in_kernels(q, k, v, centroids):
        groups = assign(lax.stop_gradient(q), centroids)
        scores = jnp.einsum(
            "bngd,blnd->bngl",
            *(_per_image(centroids, k), lax.stop_gradient(k)),
            preferred_element_type=jnp.float32,
        )
        routing = sort_groups(groups, scores, top_k)
        output = attend_sorted(q, k, v, routing, scale)
        selected = jnp.swapaxes(routing.places >= 0, 2, 3)
        return output, groups, _in_order(selected, k, centroids, top_k)

    of_types = _other_types(q, k, v)
    return by_platform(
        "group attention, tiles",
        *(q, k, v, centroids),
        **in_tiles,
        cuda=in_kernels,
        tpu=functools.partial(_attend_by_heads, top_k=top_k, scale=scale),
        misfits={
            "cuda": of_types or assign_misfit(q, num_groups) or sorted_misfit(q, top_k),
            "tpu": of_types or heads_misfit(q, num_groups),
        },
        shared=(3,),
    )


def _in_tiles(q, k, v, centroids, *, top_k, scale, smallest):
    groups, keys, _ = _route(q, k, centroids, top_k)
    num_groups = centroids.shape[1]
    plan = plan_tiles(groups, num_groups, tile_size(q.shape[1], num_groups, smallest))
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    return jnp.swapaxes(attend_tiles(q * scale, k, v, keys, plan), 1, 2), groups, keys


def _attend_by_heads(q, k, v, centroids, top_k, scale):
    output, groups, bias = attend_heads(q, k, v, centroids, top_k, scale)
    selected = selected_keys(bias, *centroids.shape[:2])
    return output, groups, _in_order(selected, k, centroids, top_k)


def _in_order(selected, k, centroids, top_k):
    """Returns the selected keys (B, N, L, G) in order of falling score, (B, N, G, top_k).

    The compiler leaves this out where nobody reads the keys.
    """
    scores = _key_scores(jnp.swapaxes(lax.stop_gradient(k), 1, 2), centroids)
    scores = jnp.where(selected, scores, -jnp.inf)
    return top_indices(jnp.swapaxes(scores, -1, -2), top_k)


def _other_types(q, k, v):
    types = sorted({str(x.dtype) for x in (q, k, v)})
    return f"q, k and v of types {', '.join(types)}" if len(types) > 1 else None


def _check_routing(q, k, centroids, top_k, path):
    if k.shape != q.shape:
        raise ValueError(f"k has shape {k.shape}; expected the shape of q, {q.shape}")
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


def _route(q, k, centroids, top_k):
    """Returns groups (B, N, L), keys (B, N, G, top_k) in order, and key scores (B, N, L, G)."""
    q, k = (jnp.swapaxes(lax.stop_gradient(x), 1, 2) for x in (q, k))
    scores = _key_scores(k, centroids)
    return _assign(q, centroids), top_indices(jnp.swapaxes(scores, -1, -2), top_k), scores


def _per_image(centroids, q):
    return jnp.broadcast_to(centroids.astype(q.dtype), (q.shape[0], *centroids.shape))


def _assign(q, centroids):
    """Returns the group (B, N, L) of every query: the first largest dot product."""
    dtype = softmax_dtype(q.dtype)
    scores = jnp.einsum(
        "bngd,bnld->bngl", _per_image(centroids, q), q, preferred_element_type=dtype
    )
    num_groups = centroids.shape[1]
    # Two reductions over a leading axis are vector loops on CPU; argmax is a scalar loop.
    is_best = scores == scores.max(2, keepdims=True)
    first = jnp.where(is_best, jnp.arange(num_groups, dtype=jnp.int32)[:, None], num_groups)
    return jnp.minimum(first.min(2), num_groups - 1)  # NaN equals nothing: keep the index in range


def _key_scores(k, centroids):
    """Returns the dot products (B, N, L, G) of keys and centroids."""
    dtype = softmax_dtype(k.dtype)
    scores = jnp.einsum(
        "bnld,bngd->bnlg", k, _per_image(centroids, k), preferred_element_type=dtype
    )
    return jnp.where(scores == 0, jnp.zeros_like(scores), scores)  # -0 and 0 are a tie
