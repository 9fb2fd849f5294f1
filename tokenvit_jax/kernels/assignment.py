"""Assignment of targets to queries on NVIDIA GPUs, one program per image through all turns.

XLA's loops would be launches, and the host would look after each round whether it was the last. A
single warp needs no shared memory to find a minimum. Registers cannot be indexed, so everything is
kept by query: where a path comes from is a query, and the potential of a target lies at its query.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Bool, Float, Int32

from tokenvit_jax.kernels.pieces import range_of

MAX_QUERIES = 512  # 16 per thread, of six vectors
_NONE = 2**31 - 1  # index of nothing


class _Matched(NamedTuple):
    """An optimal assignment of the targets that have entered.

    Attributes:
      target: of each query (Q,); -1: none.
      potential: of each query (Q,).
      target_potential: potential of the target of each query (Q,).
    """

    target: Int32[Array, " Q"]
    potential: Float[Array, " Q"]
    target_potential: Float[Array, " Q"]


class _Paths(NamedTuple):
    """Shortest paths from a target to queries, as far as they are known.

    Attributes:
      last: query that was reached last (); -1: none.
      target: its target, which has not been looked at (); -1: the query is free, and the end.
      distance: length of the path to it ().
      shortest: lengths of the shortest paths to the queries (Q,).
      reached: 1 for queries whose path is final (Q,).
      before: query in front of each query on its path (Q,); -1: none.
    """

    last: Int32[Array, ""]
    target: Int32[Array, ""]
    distance: Float[Array, ""]
    shortest: Float[Array, " Q"]
    reached: Int32[Array, " Q"]
    before: Int32[Array, " Q"]


def assignment_misfit(num_queries: int) -> str | None:
    """Returns why the kernel cannot assign targets to ``num_queries`` queries, or None."""
    return f"{num_queries} queries; at most {MAX_QUERIES}" if num_queries > MAX_QUERIES else None


def assign_of_images(
    costs: Float[Array, "B M Q"], valid: Bool[Array, "B M"], *, interpret: bool = False
) -> Int32[Array, "B M"]:
    """Computes :func:`tokenvit_jax.ops.assign_targets`.

    Args:
      costs: finite costs of every query for every target (B, M, Q), M at most Q, Q at most
        :data:`MAX_QUERIES`.
      valid: targets that take part (B, M).
      interpret: whether to run without a GPU, for tests.

    Returns:
      Numbers of queries; -1 for targets that do not take part.
    """
    batch, targets, queries = costs.shape

    def program(costs, valid, query_of):
        _assign(costs, valid, query_of, interpret)

    block = lambda *size: pl.BlockSpec((None, *size), lambda b: (b,) + (0,) * len(size))  # noqa: E731
    return pl.pallas_call(
        program,
        grid=(batch,),
        in_specs=[block(targets, queries), block(targets)],
        out_specs=block(targets),
        out_shape=jax.ShapeDtypeStruct((batch, targets), jnp.int32),
        compiler_params=plt.CompilerParams(num_warps=1),
        interpret=interpret,
        name="assign_targets",
    )(costs, valid.astype(jnp.int32))


def _assign(costs, valid, query_of, interpret):
    targets, queries = costs.shape
    column = range_of(0, pl.next_power_of_2(queries))
    exists = column < queries

    def at(values, query):
        return jnp.where(column == query, values, 0).sum(dtype=values.dtype)

    def shortest_paths(matched, target):
        def step(paths):
            # The target that enters has no potential yet.
            potential = at(matched.target_potential, paths.last)
            cost = plt.load(costs.at[paths.target, column], mask=exists, other=jnp.inf)
            length = paths.distance + (cost - potential - matched.potential)
            shorter = (paths.reached == 0) & (length < paths.shortest)
            shortest = jnp.where(shorter, length, paths.shortest)
            left = jnp.where(paths.reached == 0, shortest, jnp.inf)
            distance = left.min()
            nearest = jnp.where(left == distance, column, _NONE).min()
            return _Paths(
                last=nearest,
                target=at(matched.target, nearest),
                distance=distance,
                shortest=shortest,
                reached=jnp.where(column == nearest, 1, paths.reached),
                before=jnp.where(shorter, paths.last, paths.before),
            )

        start = _Paths(
            last=jnp.int32(-1),
            target=target,
            distance=jnp.float32(0),
            shortest=jnp.full(column.shape, jnp.inf, jnp.float32),
            reached=jnp.zeros(column.shape, jnp.int32),
            before=jnp.full(column.shape, -1, jnp.int32),
        )
        # With NaN among the costs, no query may be left to reach.
        is_left = lambda paths: (paths.target >= 0) & (paths.distance < jnp.inf)  # noqa: E731
        return lax.while_loop(is_left, step, start)

    def enter(target, matched):
        """Returns the assignment with another target, in which all pairs on the path cost 0."""
        paths = shortest_paths(matched, target)
        change = jnp.where(paths.reached == 1, paths.distance - paths.shortest, 0.0)
        matched = matched._replace(
            potential=matched.potential - change,
            target_potential=matched.target_potential + change,
        )

        def move(carry):
            """Gives a query the target of the query in front of it."""
            query, of, potential_of = carry
            before = at(paths.before, query)
            is_first = before < 0
            moved = jnp.where(is_first, target, at(of, before))
            potential = jnp.where(is_first, paths.distance, at(potential_of, before))
            here = column == query
            return before, jnp.where(here, moved, of), jnp.where(here, potential, potential_of)

        start = paths.last, matched.target, matched.target_potential
        _, of, potential_of = lax.while_loop(lambda carry: carry[0] >= 0, move, start)
        return matched._replace(target=of, target_potential=potential_of)

    def turn(target, matched):
        takes_part = plt.load(valid.at[target]) > 0
        return lax.cond(takes_part, enter, lambda _, matched: matched, target, matched)

    zeros = jnp.zeros(column.shape, jnp.float32)
    start = _Matched(jnp.full(column.shape, -1, jnp.int32), zeros, zeros)
    found = lax.fori_loop(0, targets, turn, start).target
    row = range_of(0, pl.next_power_of_2(targets))
    plt.store(query_of.at[row], jnp.full(row.shape, -1, jnp.int32), mask=row < targets)
    if not interpret:
        plt.debug_barrier()  # other threads write the same places again
    # An interpreter writes masked entries, too, unless they lie outside.
    plt.store(query_of.at[jnp.where(found >= 0, found, targets)], column, mask=found >= 0)
