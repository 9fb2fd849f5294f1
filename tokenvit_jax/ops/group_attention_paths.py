"""The two forms of attention within groups, once queries and keys have their groups.

Both take queries, keys and values as (B, N, L, D), the queries already scaled, and give the same
values and gradients for any division of the queries into groups.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tokenvit_jax.ops.attention import attend, map_queries, softmax_dtype


def cheaper_path(length: int, num_groups: int, top_k: int) -> str:
    """Returns the path, "dense" or "tiles", that ``path="auto"`` takes for these shapes."""
    # A tiled logit costs about three dense ones: sorting, gathers, smaller products. Measured on
    # CPU, where the two meet near L = 1,000 at k = 98.
    tile = tile_size(length, num_groups)
    tiled = num_tiles(length, num_groups, tile) * tile * top_k
    return "dense" if length**2 <= 3 * tiled else "tiles"


def num_tiles(length: int, num_groups: int, tile: int) -> int:
    """Returns the number of tiles that no division of the queries into groups can exceed."""
    nonempty = min(num_groups, length)
    return (length - nonempty) // tile + nonempty


def tile_size(length: int, num_groups: int) -> int:
    """Returns the power of two next below the mean group, within what was measured to be fast."""
    mean = max(length // num_groups, 1)
    return min(max(1 << (mean.bit_length() - 1), 32), 128)


# ------------------------------------------------------------------------------------------------
# Dense with a mask
# ------------------------------------------------------------------------------------------------


def attend_dense(
    q: jax.Array, k: jax.Array, v: jax.Array, groups: jax.Array, selected: jax.Array
) -> jax.Array:
    """Attends with all logits, those of keys that a group did not select masked.

    On CPU not all of them are held at once.

    Args:
      q, k, v: (B, N, L, D), q scaled.
      groups: of the queries (B, N, L).
      selected: whether a key is one of a group's (B, N, L, G) bool.

    Returns:
      (B, N, L, D).
    """

    def at_once(q, groups):
        return _attend_dense(q, k, v, groups, selected)

    def in_chunks(q, groups):
        return map_queries(at_once, k.shape[2], q, groups)

    return lax.platform_dependent(q, groups, cpu=in_chunks, default=at_once)


@jax.custom_vjp
def _attend_dense(q, k, v, groups, selected):
    return _dense_forward(q, k, v, groups, selected)[0]


def _dense_forward(q, k, v, groups, selected):
    num_groups = selected.shape[-1]
    # The mask rides on the product: appending a query's one-hot group and a key's (0 or -1e30) per
    # group adds exactly that to the logit, without a gather of L x L mask entries.
    member = jax.nn.one_hot(groups, num_groups, dtype=q.dtype)
    bias = jnp.where(selected, 0.0, -1e30).astype(k.dtype)
    output, weights, total = attend(
        jnp.concatenate([q, member], -1), jnp.concatenate([k, bias], -1), v
    )
    return output, (q, k, v, weights, total, output)


def _dense_backward(residuals, d_output):
    q, k, v, weights, total, output = residuals
    dtype = softmax_dtype(q.dtype)
    d_output = d_output.astype(dtype) / total  # weights are not normalised
    delta = jnp.sum(d_output * output.astype(dtype), -1, keepdims=True)
    d_output = d_output.astype(v.dtype)
    product = lambda spec, *xs: jnp.einsum(spec, *xs, preferred_element_type=dtype)  # noqa: E731
    d_v = product("bnqk,bnqd->bnkd", weights, d_output)
    d_weights = product("bnqd,bnkd->bnqk", d_output, v)
    d_logits = (weights.astype(dtype) * (d_weights - delta)).astype(q.dtype)
    d_q = product("bnqk,bnkd->bnqd", d_logits, k)
    d_k = product("bnqk,bnqd->bnkd", d_logits, q)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None, None


_attend_dense.defvjp(_dense_forward, _dense_backward)


# ------------------------------------------------------------------------------------------------
# Tiles
# ------------------------------------------------------------------------------------------------


class TilePlan(NamedTuple):
    """Where each query goes: T tiles of t slots, every tile of one group, for each of B x N.

    query_of_slot (B, N, T * t), slot_of_query (B, N, L), group_of_tile (B, N, T), and filled
    (B, N, T, t): False for slots that hold no query of their own.
    """

    query_of_slot: jax.Array
    slot_of_query: jax.Array
    group_of_tile: jax.Array
    filled: jax.Array


def _rows(x, index):
    """Gathers rows of x (B, N, M, ...) at index (B, N, R), all within range."""
    take = lambda rows, at: rows.at[at].get(mode="promise_in_bounds")  # noqa: E731
    return jax.vmap(jax.vmap(take))(x, index)


def plan_tiles(groups: jax.Array, num_groups: int, tile: int) -> TilePlan:
    """Sorts queries by group and cuts every group into tiles of ``tile`` slots.

    Args:
      groups: of the queries (B, N, L) int32 in [0, num_groups).
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
    group_of_tile = jnp.minimum(group_of_tile, num_groups - 1)  # tiles behind the last one
    tile_of_group = tile_index - _rows(first_tile, group_of_tile)
    rank = tile_of_group[..., None] * tile + jnp.arange(tile, dtype=jnp.int32)
    filled = rank < _rows(counts, group_of_tile)[..., None]
    sorted_position = jnp.where(filled, _rows(first_query, group_of_tile)[..., None] + rank, 0)
    query_of_slot = _rows(order, sorted_position.reshape(batch, heads, -1))

    slot = _rows(first_tile * tile - first_query, sorted_groups) + position
    invert = lambda order, slot: (  # noqa: E731
        jnp.zeros_like(order).at[order].set(slot, unique_indices=True, mode="promise_in_bounds")
    )
    slot_of_query = jax.vmap(jax.vmap(invert))(order, slot)
    return TilePlan(query_of_slot, slot_of_query, group_of_tile, filled)


def _to_tiles(x, plan):
    """Reorders x (B, N, L, D) into tiles (B, N, T, t, D)."""
    batch, heads, num_tiles, tile = plan.filled.shape
    return _rows(x, plan.query_of_slot).reshape(batch, heads, num_tiles, tile, x.shape[-1])


def _from_tiles(x, plan):
    """Reorders x (B, N, T, t, D) into (B, N, L, D): every query has exactly one slot."""
    batch, heads, num_tiles, tile, dim = x.shape
    return _rows(x.reshape(batch, heads, num_tiles * tile, dim), plan.slot_of_query)


def _select_keys(x, keys):
    """Gathers x (B, N, L, D) into the selected rows (B, N, G, k, D) of every group."""
    batch, heads, num_groups, top_k = keys.shape
    rows = _rows(x, keys.reshape(batch, heads, -1))
    return rows.reshape(batch, heads, num_groups, top_k, x.shape[-1])


def _add_keys(x, keys, plan, length):
    """Adds x (B, N, T, k, D) of every tile up to the keys' gradient (B, N, L, D)."""
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
    return jax.vmap(jax.vmap(add))(rows, keys.reshape(batch, heads, -1))


@jax.custom_vjp
def attend_tiles(
    q: jax.Array, k: jax.Array, v: jax.Array, keys: jax.Array, plan: TilePlan
) -> jax.Array:
    """Attends from each tile to the keys that its group selected, gathered once per group.

    Args:
      q, k, v: (B, N, L, D), q scaled.
      keys: indices that each group selected (B, N, G, k) int32.
      plan: of the queries' groups.

    Returns:
      (B, N, L, D).
    """
    return _tiles_forward(q, k, v, keys, plan)[0]


def _tiles_forward(q, k, v, keys, plan):
    tile_q = _to_tiles(q, plan)
    group_k, group_v = _select_keys(k, keys), _select_keys(v, keys)
    tile_k, tile_v = (_rows(x, plan.group_of_tile) for x in (group_k, group_v))
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


def _tiles_backward(residuals, d_output):
    q, group_k, group_v, keys, plan, output, log_total = residuals
    dtype, length = softmax_dtype(q.dtype), q.shape[2]
    product = lambda spec, *xs: jnp.einsum(spec, *xs, preferred_element_type=dtype)  # noqa: E731
    tile_q = _to_tiles(q, plan)
    tile_k, tile_v = (_rows(x, plan.group_of_tile) for x in (group_k, group_v))
    # Probabilities are computed again: T t k of them would be the largest array kept.
    weights = jnp.exp(product("bntqd,bntkd->bntqk", tile_q, tile_k) - log_total)

    delta = jnp.sum(d_output.astype(dtype) * output.astype(dtype), -1, keepdims=True)
    filled = plan.filled[..., None]  # an empty slot repeats some query: it must not count twice
    tile_d = jnp.where(filled, _to_tiles(d_output, plan), 0)
    tile_delta = jnp.where(filled, _to_tiles(delta, plan), 0)
    d_v = product("bntqk,bntqd->bntkd", weights.astype(group_v.dtype), tile_d)
    d_weights = product("bntqd,bntkd->bntqk", tile_d, tile_v)
    d_logits = (weights * (d_weights - tile_delta)).astype(q.dtype)
    d_q = _from_tiles(product("bntqk,bntkd->bntqd", d_logits, tile_k), plan)
    d_k = product("bntqk,bntqd->bntkd", d_logits, tile_q)
    d_k, d_v = (_add_keys(x, keys, plan, length) for x in (d_k, d_v))
    return d_q.astype(q.dtype), d_k.astype(group_k.dtype), d_v.astype(group_v.dtype), None, None


attend_tiles.defvjp(_tiles_forward, _tiles_backward)
