"""Group attention of queries that are sorted by group on GPUs, one program per group.

A program reads the queries of its group and the keys that the group selected where they lie, by
their indices. It takes any division of the queries into groups; no tile is planned. Gradients of
keys are summed per group, and then per key over the groups that selected it, in a fixed order.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int16, Int32

from tokenvit_jax.kernels.arithmetic import exp2, fma
from tokenvit_jax.kernels.group_routing import largest
from tokenvit_jax.kernels.pieces import LOG2_E, MASKED, Attended, dot, range_of

# Queries in a tile, keys in a chunk, and keys whose gradients are collected at a time.
_TILE, _CHUNK, _COLLECTED = 64, 128, 64
# Groups that a program selects keys for, and the largest number of keys to select from.
_SELECTED, MAX_LENGTH = 4, 4096
# Queries that are sorted at a time, and the least number of programs, which occupy a GPU.
_SORTED, _PROGRAMS = 4096, 512
# Groups whose selections of a key are bits of one number.
_WORD = 32


class SortedGroups(NamedTuple):
    """The queries and the keys of every group.

    Attributes:
      order: queries in order of (group, index), (B, N, L + 1); the last entry is undefined.
      starts: place of the first query of each group in ``order``, (B, N, G + 1).
      keys: keys that each group selected, (B, N, G, k + 1); the last entry is undefined.
      places: place of each key in ``keys`` of a group, or -1, (B, N, G, L).
    """

    order: Int32[Array, "B N slots"]
    starts: Int32[Array, "B N bounds"]
    keys: Int32[Array, "B N G slots_of_group"]
    places: Int16[Array, "B N G L"]


def sorted_misfit(q: Float[Array, "B L N D"], top_k: int) -> str | None:
    """Returns why :func:`attend_sorted` cannot take these queries, or None."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"{q.dtype}: the tensor cores would round the products"
    if q.shape[3] not in (16, 32, 64):
        return f"head dim {q.shape[3]} is not a power of two from 16 to 64"
    if top_k >= 2**15:
        return f"{top_k} keys per group are more than {2**15 - 1}"
    return None


def sort_groups(
    groups: Int32[Array, "B N L"],
    scores: Float[Array, "B N G L"],
    top_k: int,
    interpret: bool = False,
) -> SortedGroups:
    """Sorts the queries by group, and selects the keys with the largest scores for each group.

    Args:
      groups: group of each query (B, N, L), in [0, G).
      scores: scores of the keys (B, N, G, L) in float32; ties go to the lowest index.
      top_k: number of keys that each group selects, at most L.
      interpret: whether to run without a GPU, for tests.
    """
    num_groups, length = scores.shape[2:]
    order, starts = _sort_queries(groups, num_groups, interpret)
    select = _select_by_kernel if length <= MAX_LENGTH else _select_by_top_k
    return SortedGroups(order, starts, *select(scores, top_k, interpret))


def _sort_queries(groups, num_groups, interpret):
    batch, heads, length = groups.shape
    row = lambda size: pl.BlockSpec((None, None, size), lambda b, n, g: (b, n, 0))  # noqa: E731
    return pl.pallas_call(
        _sort,
        grid=(batch, heads, num_groups),
        in_specs=[row(length)],
        out_specs=[row(length + 1), row(num_groups + 1)],
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, length + 1), jnp.int32),
            jax.ShapeDtypeStruct((batch, heads, num_groups + 1), jnp.int32),
        ],
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="sort_queries",
    )(groups)


def _sort(groups_ref, order_ref, starts_ref):
    """Counts the queries of the groups before this one, then writes its queries after them."""
    length, group = groups_ref.shape[0], pl.program_id(2)
    size = min(_SORTED, pl.next_power_of_2(length))
    chunks = pl.cdiv(length, size)

    def load(i):
        token = range_of(i * size, size)
        return token, plt.load(groups_ref.at[token], mask=token < length, other=2**31 - 1)

    def count(i, before):
        return before + jnp.sum(load(i)[1] < group, dtype=jnp.int32)

    def write(i, at):
        token, groups = load(i)
        member = groups == group
        place = at + jnp.cumsum(member.astype(jnp.int32)) - 1
        # Tests write entries that are masked, too: these go to the last one.
        plt.store(order_ref.at[jnp.where(member, place, length)], token, mask=member)
        return at + jnp.sum(member, dtype=jnp.int32)

    start = lax.fori_loop(0, chunks, count, jnp.int32(0))
    end = lax.fori_loop(0, chunks, write, start)
    side = range_of(0, 2)  # the program of the next group writes the same number at its start
    plt.store(starts_ref.at[group + side], start + (end - start) * side)


def _select_by_kernel(scores, top_k, interpret):
    batch, heads, num_groups, length = scores.shape
    rows = lambda size: pl.BlockSpec(  # noqa: E731
        (None, None, num_groups, size), lambda b, n, i: (b, n, 0, 0)
    )
    columns = pl.next_power_of_2(length)
    return pl.pallas_call(
        functools.partial(_select, top_k=top_k),
        grid=(batch, heads, pl.cdiv(num_groups, _SELECTED)),
        in_specs=[rows(length)],
        out_specs=[rows(top_k + 1), rows(length)],
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, num_groups, top_k + 1), jnp.int32),
            jax.ShapeDtypeStruct(scores.shape, jnp.int16),
        ],
        compiler_params=plt.CompilerParams(num_warps=max(columns // 512, 1), num_stages=1),
        interpret=interpret,
        name="select_keys",
    )(scores)


def _select(scores_ref, keys_ref, places_ref, *, top_k):
    num_groups, length = scores_ref.shape
    group = range_of(pl.program_id(2) * _SELECTED, _SELECTED)[:, None]
    key = range_of(0, pl.next_power_of_2(length))[None]
    inside = (group < num_groups) & (key < length)
    scores = plt.load(scores_ref.at[group, key], mask=inside, other=0)
    selected = largest(scores, length, top_k, axis=1)
    place = jnp.where(selected, jnp.cumsum(selected.astype(jnp.int32), axis=1) - 1, -1)
    plt.store(places_ref.at[group, key], place.astype(jnp.int16), mask=inside)
    at = jnp.where(selected, place, top_k)  # as in `_sort`
    plt.store(keys_ref.at[group, at], key + jnp.zeros_like(at), mask=inside & selected)


def _select_by_top_k(scores, top_k, interpret):
    del interpret
    keys = lax.top_k(jnp.where(scores == 0, 0.0, scores), top_k)[1]
    at = jax.vmap(jax.vmap(jax.vmap(lambda empty, keys: empty.at[keys].set(
        jnp.arange(top_k, dtype=jnp.int16), unique_indices=True, mode="promise_in_bounds"
    ))))  # fmt: skip
    places = at(jnp.full(scores.shape, -1, jnp.int16), keys)
    return jnp.pad(keys, ((0, 0), (0, 0), (0, 0), (0, 1))), places


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attend_sorted(
    q: Float[Array, "B L N D"],
    k: Float[Array, "B L N D"],
    v: Float[Array, "B L N D"],
    routing: SortedGroups,
    scale: float,
    interpret: bool = False,
) -> Float[Array, "B L N D"]:
    """Attends from each query to the keys that its group selected.

    Args:
      q: queries (B, L, N, D).
      k: keys (B, L, N, D).
      v: values (B, L, N, D).
      routing: the queries and keys of every group, by :func:`sort_groups`.
      scale: factor of the logits.
      interpret: whether to run without a GPU, for tests.

    Returns:
      (B, L, N, D) in the type of ``v``.
    """
    return _forward(q, k, v, routing, scale, interpret)[0]


def _forward(q, k, v, routing, scale, interpret):
    batch, length, heads, _ = q.shape
    num_groups = routing.keys.shape[2]
    splits = _num_splits(batch * heads * num_groups)
    tokens, per_query, of_routing = _specs(q, routing)
    output, log_total = pl.pallas_call(
        functools.partial(_attend_group, splits=splits, scale=scale),
        grid=(batch, heads, num_groups * splits),
        in_specs=[tokens, tokens, tokens, *of_routing],
        out_specs=[tokens, per_query],
        out_shape=[
            jax.ShapeDtypeStruct(v.shape, v.dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ],
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="sorted_group_attention",
    )(q, k, v, *routing[:3])
    return output, (q, k, v, routing, output, log_total)


def _backward(scale, interpret, residuals, d_output):
    q, k, v, routing, output, log_total = residuals
    batch, _, heads, dim = q.shape
    num_groups, top_k = routing.keys.shape[2], routing.keys.shape[3] - 1
    chunks = pl.cdiv(top_k, _CHUNK)
    splits = _num_splits(batch * heads * num_groups * chunks)
    tokens, per_query, of_routing = _specs(q, routing)
    sums = (splits, num_groups, top_k, dim)
    d_q, d_keys, d_values = pl.pallas_call(
        functools.partial(_differentiate_group, splits=splits, chunks=chunks, scale=scale),
        grid=(batch, heads, num_groups * splits * chunks),
        in_specs=[tokens, tokens, tokens, *of_routing, tokens, per_query, tokens],
        out_specs=[tokens]
        + [pl.BlockSpec((None, None, *sums), lambda b, n, i: (b, n, 0, 0, 0, 0))] * 2,
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype)]
        + [jax.ShapeDtypeStruct((batch, heads, *sums), jnp.float32)] * 2,
        compiler_params=plt.CompilerParams(num_warps=8, num_stages=2),
        interpret=interpret,
        name="sorted_group_attention_gradient",
    )(q, k, v, *routing[:3], output, log_total, d_output)
    rows = [x.sum(2) if splits > 1 else x[:, :, 0] for x in (d_keys, d_values)]
    return d_q, *_collect(rows, routing.places, k, interpret), None


attend_sorted.defvjp(_forward, _backward)


def _num_splits(programs):
    """Returns among how many programs the tiles of a group are divided."""
    return pl.next_power_of_2(pl.cdiv(_PROGRAMS, programs))


def _specs(q, routing):
    """Returns the specs of tokens (B, L, N, D), (B, N, L), and of order, starts and keys."""
    _, length, _, dim = q.shape
    tokens = pl.BlockSpec((None, length, None, dim), lambda b, n, i: (b, 0, n, 0))
    row = lambda size: pl.BlockSpec((None, None, size), lambda b, n, i: (b, n, 0))  # noqa: E731
    keys = pl.BlockSpec((None, None, *routing.keys.shape[2:]), lambda b, n, i: (b, n, 0, 0))
    of_routing = [row(routing.order.shape[2]), row(routing.starts.shape[2]), keys]
    return tokens, row(length), of_routing


class _Rows:
    """Rows of refs (L, ...) at an index each; those that are not wanted count as 0."""

    def __init__(self, index, wanted):
        self.index, self.wanted = index, wanted

    def matrix(self, ref):
        at = ref.at[self.index[:, None], range_of(0, ref.shape[1])[None]]
        return plt.load(at, mask=self.wanted[:, None], other=0)

    def vector(self, ref):
        return plt.load(ref.at[self.index], mask=self.wanted, other=0)

    def store(self, ref, matrix):
        at = ref.at[self.index[:, None], range_of(0, ref.shape[1])[None]]
        plt.store(at, matrix.astype(ref.dtype), mask=self.wanted[:, None])

    def store_vector(self, ref, vector):
        plt.store(ref.at[self.index], vector, mask=self.wanted)


def _queries(order_ref, start, end, number):
    """Returns the rows of a tile of queries; unwanted ones lie beyond the end."""
    place = range_of(start + number * _TILE, _TILE)
    wanted = place < end
    length = order_ref.shape[0] - 1
    return _Rows(plt.load(order_ref.at[place], mask=wanted, other=length), wanted)


def _keys(keys_ref, group, number):
    """Returns the rows of a chunk of the keys that a group selected."""
    place = range_of(number * _CHUNK, _CHUNK)
    wanted = place < keys_ref.shape[1] - 1
    return _Rows(plt.load(keys_ref.at[group, place], mask=wanted, other=0), wanted)


def _tiles_of(starts_ref, group, part, parts):
    """Returns start, end and the number of tiles of a part of a group."""
    start, end = starts_ref[group], starts_ref[group + 1]
    tiles = lax.div(end - start + (_TILE - 1), jnp.int32(_TILE))
    return start, end, lax.div(tiles - part + (parts - 1), jnp.int32(parts))


def _split_id(splits):
    """Returns the group and the split of this program."""
    group = lax.div(pl.program_id(2), jnp.int32(splits))
    return group, pl.program_id(2) - group * splits


def _attend_group(
    q_ref, k_ref, v_ref, order_ref, starts_ref, keys_ref, output_ref, total_ref, *, splits, scale
):  # fmt: skip
    group, part = _split_id(splits)
    start, end, tiles = _tiles_of(starts_ref, group, part, splits)
    chunks = pl.cdiv(keys_ref.shape[1] - 1, _CHUNK)

    def attend_tile(i, _):
        rows = _queries(order_ref, start, end, part + i * splits)
        q = rows.matrix(q_ref)

        def attend_chunk(j, attended):
            keys = _keys(keys_ref, group, j)
            k, v = keys.matrix(k_ref), keys.matrix(v_ref)
            products = jnp.where(keys.wanted[None], dot(q, k, (1, 1)), MASKED)
            return attended.and_to(products, scale * LOG2_E, v)

        nothing = Attended.to_none(*q.shape)
        output, log_total = lax.fori_loop(0, chunks, attend_chunk, nothing).normalised()
        rows.store(output_ref, output)
        rows.store_vector(total_ref, log_total)

    lax.fori_loop(0, tiles, attend_tile, None)


def _differentiate_group(
    q_ref, k_ref, v_ref, order_ref, starts_ref, keys_ref, output_ref, total_ref, d_output_ref,
    d_q_ref, d_keys_ref, d_values_ref, *, splits, chunks, scale,
):  # fmt: skip
    """Computes gradients of a chunk of keys over a part of the tiles, and of a part of the tiles.

    A group has ``splits * chunks`` programs: the first gradient is summed over every
    ``splits``-th tile, the second computed for every ``splits * chunks``-th.
    """
    dim = q_ref.shape[1]
    group, part = _split_id(splits * chunks)
    split = lax.div(part, jnp.int32(chunks))
    chunk = part - split * chunks

    def load_tile(number, start, end):
        """Returns rows, queries, d output, log-normaliser, and d output times output."""
        rows = _queries(order_ref, start, end, number)
        d_output = rows.matrix(d_output_ref)
        delta = d_output.astype(jnp.float32) * rows.matrix(output_ref).astype(jnp.float32)
        return rows, rows.matrix(q_ref), d_output, rows.vector(total_ref), jnp.sum(delta, 1)

    start, end, tiles = _tiles_of(starts_ref, group, split, splits)
    own = _keys(keys_ref, group, chunk)
    own_k, own_v = own.matrix(k_ref), own.matrix(v_ref)

    def add_to_keys(i, carry):
        d_k, d_v = carry
        _, q, d_output, total, delta = load_tile(split + i * splits, start, end)
        weights = exp2(fma(dot(own_k, q, (1, 1)), scale * LOG2_E, -total[None]))  # (k, q)
        d_v += dot(weights.astype(d_output.dtype), d_output)
        d_logits = weights * (dot(own_v, d_output, (1, 1)) - delta[None])
        return d_k + dot(d_logits.astype(q.dtype), q), d_v

    zero = jnp.zeros((_CHUNK, dim), jnp.float32)
    d_k, d_v = lax.fori_loop(0, tiles, add_to_keys, (zero, zero))
    at = (split, group, range_of(chunk * _CHUNK, _CHUNK)[:, None], range_of(0, dim)[None])
    plt.store(d_keys_ref.at[at], d_k * scale, mask=own.wanted[:, None])
    plt.store(d_values_ref.at[at], d_v, mask=own.wanted[:, None])

    start, end, tiles = _tiles_of(starts_ref, group, part, splits * chunks)

    def differentiate_tile(i, _):
        rows, q, d_output, total, delta = load_tile(part + i * splits * chunks, start, end)

        def add_to_queries(j, d_q):
            keys = _keys(keys_ref, group, j)
            k, v = keys.matrix(k_ref), keys.matrix(v_ref)
            logits = fma(dot(q, k, (1, 1)), scale * LOG2_E, -total[:, None])  # (q, k)
            weights = jnp.where(keys.wanted[None], exp2(logits), 0)
            d_logits = weights * (dot(d_output, v, (1, 1)) - delta[:, None])
            return d_q + dot(d_logits.astype(k.dtype), k)

        d_q = lax.fori_loop(0, chunks, add_to_queries, jnp.zeros((_TILE, dim), jnp.float32))
        rows.store(d_q_ref, d_q * scale)

    lax.fori_loop(0, tiles, differentiate_tile, None)


def _collect(rows, places, k, interpret):
    """Sums the gradients (B, N, G, k, D) of the selected keys and values for every key."""
    batch, heads, num_groups, length = places.shape
    selected = pl.BlockSpec((None, None, *rows[0].shape[2:]), lambda b, n, i: (b, n, 0, 0, 0))
    block = pl.BlockSpec((None, None, num_groups, length), lambda b, n, i: (b, n, 0, 0))
    tokens = pl.BlockSpec((None, length, None, k.shape[3]), lambda b, n, i: (b, 0, n, 0))
    return pl.pallas_call(
        _add_rows,
        grid=(batch, heads, pl.cdiv(length, _COLLECTED)),
        in_specs=[selected, selected, block],
        out_specs=[tokens, tokens],
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype)] * 2,
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="collect_key_gradients",
    )(*rows, places)


def _add_rows(d_keys_ref, d_values_ref, places_ref, d_k_ref, d_v_ref):
    """Adds for every key the rows of the groups that selected it, few of all groups, in order."""
    num_groups, length = places_ref.shape
    key = range_of(pl.program_id(2) * _COLLECTED, _COLLECTED)
    column = range_of(0, d_k_ref.shape[1])[None]
    bit = range_of(0, _WORD)[:, None]

    def add(first, carry):
        remaining, d_k, d_v = carry
        wanted = remaining != 0
        lowest = first + 31 - lax.clz(remaining & -remaining)
        group = jnp.where(wanted, lowest, 0)
        place = plt.load(places_ref.at[group, key], mask=wanted, other=0).astype(jnp.int32)
        at, mask = (group[:, None], place[:, None], column), wanted[:, None]
        load = lambda ref: plt.load(ref.at[at], mask=mask, other=0)  # noqa: E731
        return remaining & (remaining - 1), d_k + load(d_keys_ref), d_v + load(d_values_ref)

    sums = [jnp.zeros((_COLLECTED, d_k_ref.shape[1]), jnp.float32)] * 2
    for first in range(0, num_groups, _WORD):
        exists = (first + bit < num_groups) & (key < length)[None]
        place = plt.load(places_ref.at[first + bit, key[None]], mask=exists, other=-1)
        selected = jnp.sum(jnp.where(place >= 0, jnp.int32(1) << bit, 0), 0, dtype=jnp.int32)
        any_left = lambda carry: jnp.max((carry[0] != 0).astype(jnp.int32)) > 0  # noqa: E731
        carry = lax.while_loop(any_left, functools.partial(add, first), (selected, *sums))
        sums = carry[1:]
    rows = _Rows(key, key < length)
    for ref, total in zip((d_k_ref, d_v_ref), sums, strict=True):
        rows.store(ref, total)
