"""Routing of group attention on GPUs: one program per image, head and block of groups.

A program computes the products of its keys and queries with the centroids on the tensor cores, and
selects in registers: nothing as large as a score per key and group goes through memory.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Bool, Float, Int32

from tokenvit_jax.kernels.gpus import shared_memory
from tokenvit_jax.kernels.joined import Parts, inputs_of
from tokenvit_jax.kernels.pieces import dot, range_of, sortable

# Groups per program, which are the bits that a word of the selection uses.
WORD_BITS = 4
WORD = 1 << WORD_BITS
# Largest numbers of tokens and groups whose scores fit into the registers of a program.
MAX_LENGTH = 1024
MAX_GROUPS = 64
# Queries that are assigned at a time, and how often a program of :func:`assign` does so.
_QUERIES, _BLOCKS = 64, 4
_LOWEST, _HIGHEST = -(2**31), 2**31 - 1


def routing_misfit(q: Float[Array, "B L N D"], num_groups: int) -> str | None:
    """Returns why :func:`route` cannot take these queries, or None."""
    if q.shape[1] > MAX_LENGTH:
        return f"{q.shape[1]} tokens are more than {MAX_LENGTH}"
    misfit = assign_misfit(q, num_groups)
    if misfit is None:
        # The keys and the centroids of a word are operands of one product.
        needed = (_rows(q.shape[1]) + WORD) * q.shape[3] * q.dtype.itemsize
        if needed > shared_memory():
            return (
                f"{q.shape[1]} tokens with head dim {q.shape[3]} need {needed} bytes of shared"
                f" memory; there are {shared_memory()}"
            )
    return misfit


def assign_misfit(q: Float[Array, "B L N D"], num_groups: int) -> str | None:
    """Returns why :func:`assign` cannot take these queries, or None."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"{q.dtype}: the tensor cores would round the products"
    if q.shape[3] not in (16, 32, 64, 128):
        return f"head dim {q.shape[3]} is not a power of two from 16 to 128"
    if num_groups > MAX_GROUPS:
        return f"{num_groups} groups are more than {MAX_GROUPS}"
    return None


def route(
    parts: Parts,
    centroids: Float[Array, "N G D"],
    top_k: int,
    interpret: bool = False,
) -> tuple[Int32[Array, "B N L"], Int32[Array, "B N words L"]]:
    """Assigns queries to groups, and selects the keys of the groups.

    Args:
      parts: queries, keys and values (B, L, N, D).
      centroids: (N, G, D), unit norm.
      top_k: number of keys that each group selects, at most L.
      interpret: whether to run without a GPU, for tests.

    Returns:
      The group of each query (B, N, L), and words (B, N, words, L): bit i of word w of a key says
      whether group 16 w + i selected it.
    """
    batch, length = parts[0].shape[:2]
    heads, num_groups, dim = centroids.shape
    words = pl.cdiv(num_groups, WORD)
    tokens = pl.BlockSpec((None, length, None, dim), lambda b, n, j: (b, 0, n, 0))
    (q, k, _), (of_queries, of_keys, _) = inputs_of(parts, tokens)
    kernel = functools.partial(_route, length=length, num_groups=num_groups, top_k=top_k)
    return pl.pallas_call(
        kernel,
        grid=(batch, heads, words),
        in_specs=[
            of_queries,
            of_keys,
            pl.BlockSpec((None, num_groups, dim), lambda b, n, j: (n, 0, 0)),
        ],
        out_specs=[
            pl.BlockSpec((None, None, length), lambda b, n, j: (b, n, 0)),
            pl.BlockSpec((None, None, None, length), lambda b, n, j: (b, n, j, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, length), jnp.int32),
            jax.ShapeDtypeStruct((batch, heads, words, length), jnp.int32),
        ],
        compiler_params=plt.CompilerParams(num_warps=4 if length <= 256 else 8, num_stages=1),
        interpret=interpret,
        name="route",
    )(q, k, centroids.astype(q.dtype))


def assign(
    q: Float[Array, "B L N D"], centroids: Float[Array, "N G D"], interpret: bool = False
) -> Int32[Array, "B N L"]:
    """Assigns queries to the centroid with the first largest dot product.

    Args:
      q: queries (B, L, N, D).
      centroids: (N, G, D), unit norm.
      interpret: whether to run without a GPU, for tests.

    Returns:
      The group of each query (B, N, L).
    """
    batch, length, heads, dim = q.shape
    num_groups = centroids.shape[1]
    parts = pl.cdiv(length, _QUERIES * _BLOCKS)
    return pl.pallas_call(
        lambda *refs: _assign(*refs, pl.program_id(2), parts, length, num_groups),
        grid=(batch, heads, parts),
        in_specs=[
            pl.BlockSpec((None, length, None, dim), lambda b, n, j: (b, 0, n, 0)),
            pl.BlockSpec((None, num_groups, dim), lambda b, n, j: (n, 0, 0)),
        ],
        out_specs=pl.BlockSpec((None, None, length), lambda b, n, j: (b, n, 0)),
        out_shape=jax.ShapeDtypeStruct((batch, heads, length), jnp.int32),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="assign",
    )(q, centroids.astype(q.dtype))


def unpack(words: Int32[Array, "B N words L"], num_groups: int) -> Bool[Array, "B N L G"]:
    """Returns the mask (B, N, L, G) of the keys that each group selected, from its words."""
    bits = words[..., None] >> jnp.arange(WORD) & 1  # (B, N, words, L, WORD)
    bits = jnp.swapaxes(bits, 2, 3)
    return bits.reshape(*bits.shape[:3], -1)[..., :num_groups] != 0


def _route(q_ref, k_ref, centroids_ref, groups_ref, words_ref, *, length, num_groups, top_k):
    part, parts = pl.program_id(2), pl.cdiv(num_groups, WORD)
    _assign(q_ref, centroids_ref, groups_ref, part, parts, length, num_groups)
    rows = _rows(length)
    token, all_rows = range_of(0, rows), pl.ds(_zero(), rows)
    keys = plt.load(k_ref.at[all_rows, :], mask=token[:, None] < length, other=0)
    centroids = _load_centroids(centroids_ref, part * WORD, WORD)
    selected = largest(dot(keys, centroids, (1, 1)), length, top_k, axis=0)
    bits = selected.astype(jnp.int32) << range_of(0, WORD)[None]
    plt.store(words_ref.at[all_rows], jnp.sum(bits, 1, dtype=jnp.int32), mask=token < length)


def _assign(q_ref, centroids_ref, groups_ref, part, parts, length, num_groups):
    """Assigns the queries of every block of queries that is this program's part."""
    centroids = _load_centroids(centroids_ref, _zero(), max(WORD, pl.next_power_of_2(num_groups)))
    column = range_of(0, centroids.shape[0])[None]
    blocks = pl.cdiv(length, _QUERIES)

    def assign(i, _):
        start = (part + i * parts) * _QUERIES
        inside = range_of(start, _QUERIES) < length
        q = plt.load(q_ref.at[pl.ds(start, _QUERIES), :], mask=inside[:, None], other=0)
        scores = jnp.where(column < num_groups, dot(q, centroids, (1, 1)), -jnp.inf)
        is_best = scores == jnp.max(scores, 1)[:, None]
        first = jnp.min(jnp.where(is_best, column, num_groups), 1)
        group = jnp.minimum(first, num_groups - 1)  # NaN equals nothing: keep the index in range
        plt.store(groups_ref.at[pl.ds(start, _QUERIES)], group, mask=inside)

    lax.fori_loop(0, pl.cdiv(blocks, parts), assign, None)


def _rows(length):
    """Returns the number of keys that a program of :func:`route` holds."""
    return pl.next_power_of_2(max(length, 16))


def _zero():
    """Returns 0, unseen by jax: version 0.12 refuses slices that are known to end outside."""
    return pl.program_id(0) * 0


def _load_centroids(centroids_ref, start, count):
    """Loads rows of (G, D), 0 beyond the end."""
    inside = range_of(start, count) < centroids_ref.shape[0]
    return plt.load(centroids_ref.at[pl.ds(start, count), :], mask=inside[:, None], other=0)


def largest(scores: Float[Array, "..."], length: int, top_k: int, axis: int) -> Bool[Array, "..."]:
    """Returns a mask of the ``top_k`` largest of the first ``length`` scores along an axis.

    Inside a kernel; ties go to the lowest index. It selects like
    :func:`tokenvit_jax.ops.selection.largest_mask`: a threshold is found by bisection of integers
    that order like the floats, and then, where more scores are equal than are wanted, the index.
    The bisection ends when every threshold has the wanted number of scores: after 15 to 20 rounds
    for random scores, instead of 31.

    Args:
      scores: matrix in float32.
      length: number of scores; the others along the axis are padding.
      top_k: from 1 to ``length``.
      axis: 0 or 1.
    """
    index = lax.broadcasted_iota(jnp.int32, scores.shape, axis)
    ordered = sortable(jnp.where(scores == 0, 0.0, scores))
    lowest = jnp.expand_dims(jnp.min(jnp.where(index < length, ordered, _HIGHEST), axis), axis)
    ordered = jnp.where(index < length, ordered, _LOWEST)

    def count(mask):
        return jnp.sum(mask, axis, dtype=jnp.int32, keepdims=True)

    def is_left(carry):
        low, high, found = carry
        return jnp.max(((low < high) & (found > top_k)).astype(jnp.int32)) > 0

    def halve(carry):
        low, high, found = carry
        middle = (low | high) - ((low ^ high) >> 1)  # of low and high, rounded up
        above = count(ordered >= middle)
        enough = above >= top_k
        low, high = jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)
        return low, high, jnp.where(enough, above, found)

    # At least top_k scores are not below `low`, their number is `found`; fewer are above `high`.
    highest = jnp.expand_dims(jnp.max(ordered, axis), axis)
    carry = lowest, highest, jnp.full_like(lowest, length)
    threshold, _, found = lax.while_loop(is_left, halve, carry)
    wanted = top_k - count(ordered > threshold)

    def try_end(i, end):
        candidate = end + (jnp.int32(1) << (bits - 1 - i))
        ties = count((ordered == threshold) & (index < candidate))
        return jnp.where(ties <= wanted, candidate, end)

    bits = length.bit_length()
    has_surplus = (jnp.max(found) > top_k).astype(jnp.int32)
    # Without a surplus all ties are selected, and the loop has no rounds.
    end = jnp.full_like(threshold, length * (1 - has_surplus))
    end = lax.fori_loop(0, bits * has_surplus, try_end, end)
    return (ordered > threshold) | ((ordered == threshold) & (index < end))
