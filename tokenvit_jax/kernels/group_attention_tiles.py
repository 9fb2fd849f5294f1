"""Group attention of queries that are sorted by group and cut into tiles of one group each.

``(L - g) // tile + g`` tiles, with ``g = min(G, L)``, are enough for every possible division of the
queries into groups, so no query is ever dropped.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from tokenvit_jax.ops.dtypes import softmax_dtype
from tokenvit_jax.ops.gather import take


def num_tiles(length: int, num_groups: int, tile: int) -> int:
    """Returns a number of tiles that suffices for any division of the queries into groups."""
    nonempty = min(num_groups, length)
    return (length - nonempty) // tile + nonempty


def tile_size(length: int, num_groups: int, smallest: int = 32) -> int:
    """Returns the power of two next below the mean group size, between ``smallest`` and 128.

    These sizes were measured to be fast, with 16 as the smallest one on CPUs.
    """
    mean = max(length // num_groups, 1)
    return min(max(1 << (mean.bit_length() - 1), smallest), 128)


class TilePlan(NamedTuple):
    """Assignment of queries to T tiles of t slots, one group per tile, for each image and head.

    Attributes:
      query_of_slot: (B, N, T t).
      slot_of_query: (B, N, L).
      group_of_tile: (B, N, T).
      filled: (B, N, T, t), False for slots that hold no query of their own.
    """

    query_of_slot: Int32[Array, "B N slots"]
    slot_of_query: Int32[Array, "B N L"]
    group_of_tile: Int32[Array, "B N T"]
    filled: Bool[Array, "B N T t"]


def plan_tiles(groups: Int32[Array, "B N L"], num_groups: int, tile: int) -> TilePlan:
    """Sorts queries by group and cuts every group into tiles of ``tile`` slots.

    Args:
      groups: group of each query (B, N, L), in [0, num_groups).
      num_groups: G; G * L must stay below 2^31.
      tile: slots per tile.
    """
    batch, heads, length = groups.shape
    total_tiles = num_tiles(length, num_groups, tile)
    position = jnp.arange(length, dtype=jnp.int32)
    # One sort of (group, index) packed into an integer orders the queries by group.
    packed = jnp.sort(groups * length + position, axis=-1)
    order, sorted_groups = packed % length, packed // length

    counts = jnp.sum(
        groups[:, :, None] == jnp.arange(num_groups)[:, None], -1, dtype=jnp.int32
    )  # (B, N, G)
    first_query = jnp.cumsum(counts, -1) - counts
    tiles = -(-counts // tile)
    end_tile = jnp.cumsum(tiles, -1)
    first_tile = end_tile - tiles

    tile_index = jnp.arange(total_tiles, dtype=jnp.int32)
    group_of_tile = jnp.sum(tile_index[:, None] >= end_tile[:, :, None], -1, dtype=jnp.int32)
    group_of_tile = jnp.minimum(group_of_tile, num_groups - 1)  # unused tiles at the end
    tile_of_group = tile_index - take(first_tile, group_of_tile)
    rank = tile_of_group[..., None] * tile + jnp.arange(tile, dtype=jnp.int32)
    filled = rank < take(counts, group_of_tile)[..., None]
    sorted_position = jnp.where(filled, take(first_query, group_of_tile)[..., None] + rank, 0)
    query_of_slot = take(order, sorted_position.reshape(batch, heads, total_tiles * tile))

    slot = take(first_tile * tile - first_query, sorted_groups) + position
    invert = lambda order, slot: (  # noqa: E731
        jnp.zeros_like(order).at[order].set(slot, unique_indices=True, mode="promise_in_bounds")
    )
    slot_of_query = jax.vmap(jax.vmap(invert))(order, slot)
    return TilePlan(query_of_slot, slot_of_query, group_of_tile, filled)


def _to_tiles(x, plan):
    """Reorders x (B, N, L, D) into tiles (B, N, T, t, D)."""
    batch, heads, num_tiles, tile = plan.filled.shape
    return take(x, plan.query_of_slot).reshape(batch, heads, num_tiles, tile, x.shape[-1])


def _from_tiles(x, plan):
    """Reorders x (B, N, T, t, D) into (B, N, L, D): every query has exactly one slot."""
    batch, heads, num_tiles, tile, dim = x.shape
    return take(x.reshape(batch, heads, num_tiles * tile, dim), plan.slot_of_query)


def _select_keys(x, keys):
    """Gathers x (B, N, L, D) into the selected rows (B, N, G, k, D) of every group."""
    batch, heads, num_groups, top_k = keys.shape
    rows = take(x, keys.reshape(batch, heads, num_groups * top_k))
    return rows.reshape(batch, heads, num_groups, top_k, x.shape[-1])


def _add_keys(x, keys, plan, length):
    """Adds up the tiles' gradients (B, N, T, k, D) to the gradient of all keys (B, N, L, D)."""
    batch, heads, num_groups, top_k = keys.shape
    num_tiles, dim = x.shape[2], x.shape[-1]
    # Tiles of a group first, as a product with their membership; only G * k rows are scattered.
    member = plan.group_of_tile[:, :, None] == jnp.arange(num_groups)[:, None]
    rows = jnp.einsum(
        "bngt,bntx->bngx",
        member.astype(x.dtype),
        x.reshape(batch, heads, num_tiles, top_k * dim),
        precision=lax.Precision.HIGHEST,
    ).reshape(batch, heads, num_groups * top_k, dim)
    add = lambda rows, at: (  # noqa: E731
        jnp.zeros((length, dim), x.dtype).at[at].add(rows, mode="promise_in_bounds")
    )
    return jax.vmap(jax.vmap(add))(rows, keys.reshape(batch, heads, num_groups * top_k))


@jax.custom_vjp
def attend_tiles(
    q: Float[Array, "B N L D"],
    k: Float[Array, "B N L D"],
    v: Float[Array, "B N L D"],
    keys: Int32[Array, "B N G k"],
    plan: TilePlan,
) -> Float[Array, "B N L D"]:
    """Attends from each tile to the keys that its group selected, gathered once per group.

    Args:
      q: scaled queries (B, N, L, D).
      k: keys (B, N, L, D).
      v: values (B, N, L, D).
      keys: indices of the keys that each group selected (B, N, G, k).
      plan: assignment of the queries to tiles.

    Returns:
      (B, N, L, D) in the type of ``v``.
    """
    return _forward(q, k, v, keys, plan)[0]


def _forward(q, k, v, keys, plan):
    tile_q = _to_tiles(q, plan)
    group_k, group_v = _select_keys(k, keys), _select_keys(v, keys)
    tile_k, tile_v = (take(x, plan.group_of_tile) for x in (group_k, group_v))
    dtype = softmax_dtype(q.dtype)
    logits = jnp.einsum("bntqd,bntkd->bntqk", tile_q, tile_k, preferred_element_type=dtype)
    largest = logits.max(-1, keepdims=True)
    weights = jnp.exp(logits - largest)
    total = weights.sum(-1, keepdims=True)
    output = jnp.einsum(
        "bntqk,bntkd->bntqd", weights.astype(v.dtype), tile_v, preferred_element_type=dtype
    )
    output = _from_tiles((output / total).astype(v.dtype), plan)
    log_total = largest + jnp.log(total)
    return output, (q, group_k, group_v, keys, plan, output, log_total)


def _backward(residuals, d_output):
    q, group_k, group_v, keys, plan, output, log_total = residuals
    dtype, length = softmax_dtype(q.dtype), q.shape[2]
    product = lambda spec, *xs: jnp.einsum(spec, *xs, preferred_element_type=dtype)  # noqa: E731
    tile_q = _to_tiles(q, plan)
    tile_k, tile_v = (take(x, plan.group_of_tile) for x in (group_k, group_v))
    # Probabilities are computed again: T t k of them would be the largest array kept.
    weights = jnp.exp(product("bntqd,bntkd->bntqk", tile_q, tile_k) - log_total)

    delta = jnp.sum(d_output.astype(dtype) * output.astype(dtype), -1, keepdims=True)
    filled = plan.filled[..., None]  # an empty slot repeats some query, which must not count twice
    tile_d = jnp.where(filled, _to_tiles(d_output, plan), 0)
    tile_delta = jnp.where(filled, _to_tiles(delta, plan), 0)
    d_v = product("bntqk,bntqd->bntkd", weights.astype(group_v.dtype), tile_d)
    d_weights = product("bntqd,bntkd->bntqk", tile_d, tile_v)
    d_logits = (weights * (d_weights - tile_delta)).astype(q.dtype)
    d_q = _from_tiles(product("bntqk,bntkd->bntqd", d_logits, tile_k), plan)
    d_k = product("bntqk,bntqd->bntkd", d_logits, tile_q)
    d_k, d_v = (_add_keys(x, keys, plan, length) for x in (d_k, d_v))
    return d_q.astype(q.dtype), d_k.astype(group_k.dtype), d_v.astype(group_v.dtype), None, None


attend_tiles.defvjp(_forward, _backward)
