"""Assignment of targets to queries at the least total cost, in the graph.

Targets enter one after another. Each finds the shortest augmenting path to a free query, by
Dijkstra's algorithm on costs reduced by potentials, and the targets on the path change their
queries. Only valid targets take a turn, so that padding costs nothing.

References:
  Jonker and Volgenant 1987, "A shortest augmenting path algorithm for dense and sparse linear
  assignment problems"; Crouse 2016, "On implementing 2D rectangular assignment algorithms".
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from tokenvit_jax.kernels.assignment import assign_of_images, assignment_misfit
from tokenvit_jax.kernels.platforms import by_platform, num_devices, on_each_device

UNKNOWN = 1e6  # cost in place of those that are no usable numbers
LARGEST = 1e30  # of usable costs, whose sums are finite


class _Tree(NamedTuple):
    """Shortest paths from a target to queries, as far as they are known.

    Attributes:
      row: target that was reached last ().
      distance: length of the path to it ().
      free: free query at the end of the shortest path (); -1: not reached yet.
      shortest: lengths of the shortest paths to the queries (Q,).
      reached: queries whose path is final (Q,).
      before: target in front of each query on its path (Q,).
    """

    row: Int32[Array, ""]
    distance: Float[Array, ""]
    free: Int32[Array, ""]
    shortest: Float[Array, " Q"]
    reached: Bool[Array, " Q"]
    before: Int32[Array, " Q"]


class _State(NamedTuple):
    """An optimal assignment of the targets that have entered.

    Attributes:
      query_of: query of each target (M,); -1: none.
      target_of: target of each query (Q,); -1: none.
      target_potential: (M,).
      query_potential: (Q,); the potentials of a pair sum up to its cost, of others at most to it.
    """

    query_of: Int32[Array, " M"]
    target_of: Int32[Array, " Q"]
    target_potential: Float[Array, " M"]
    query_potential: Float[Array, " Q"]


def assign_targets(costs: Float[Array, "B Q M"], valid: Bool[Array, "B M"]) -> Int32[Array, "B M"]:
    """Returns the query of every target, (B, M): different queries, at the least total cost.

    The result has no gradient.

    Args:
      costs: cost of every query for every target (B, Q, M), M at most Q. NaN, and numbers beyond
        :data:`LARGEST`, count as :data:`UNKNOWN`.
      valid: targets that take part (B, M).

    Returns:
      Numbers of queries; -1 for targets that do not take part.

    Raises:
      ValueError: there are more places for targets than queries.
    """
    queries, targets = costs.shape[1:]
    if targets > queries:
        raise ValueError(
            f"costs has {targets} places for targets (axis 2), but only {queries} queries (axis 1);"
            " valid: at most as many targets as queries"
        )
    costs = lax.stop_gradient(costs).astype(jnp.float32).swapaxes(1, 2)
    costs = jnp.where(abs(costs) <= LARGEST, costs, UNKNOWN)

    def on_device(costs, valid):
        return by_platform(
            "assignment",
            costs,
            valid,
            cpu=lambda costs, valid: lax.map(lambda image: _assign(*image), (costs, valid)),
            cuda=assign_of_images,
            default=jax.vmap(_assign),
            misfits={"cuda": assignment_misfit(queries)},
        )

    # Every device has its own turns: else all devices would agree on each.
    return (on_device if len(costs) % num_devices() else on_each_device(on_device))(costs, valid)


def _assign(costs, valid):
    """Returns the query of every target (M,) for costs (M, Q)."""
    targets, queries = costs.shape
    # The valid targets come first.
    order = jnp.argsort(~valid, stable=True)

    def enter(turn, state):
        target = order[turn]
        tree = _shortest_paths(costs, state, target)
        return _augment(_move_potentials(state, tree, target), tree, target)

    none = jnp.full(targets, -1, jnp.int32), jnp.full(queries, -1, jnp.int32)
    start = _State(*none, *(jnp.zeros(n, jnp.float32) for n in costs.shape))
    return lax.fori_loop(0, valid.sum(), enter, start).query_of


def _shortest_paths(costs, state, target):
    """Returns the paths from a target up to the nearest free query."""
    queries = costs.shape[1]

    def step(tree):
        reduced = costs[tree.row] - state.target_potential[tree.row] - state.query_potential
        length = tree.distance + reduced
        shorter = ~tree.reached & (length < tree.shortest)
        shortest = jnp.where(shorter, length, tree.shortest)
        before = jnp.where(shorter, tree.row, tree.before)
        nearest = jnp.argmin(jnp.where(tree.reached, jnp.inf, shortest)).astype(jnp.int32)
        row = state.target_of[nearest]
        return _Tree(
            row=jnp.maximum(row, 0),
            distance=shortest[nearest],
            free=jnp.where(row < 0, nearest, -1),
            shortest=shortest,
            reached=tree.reached.at[nearest].set(True),
            before=before,
        )

    start = _Tree(
        row=target.astype(jnp.int32),
        distance=jnp.float32(0),
        free=jnp.int32(-1),
        shortest=jnp.full(queries, jnp.inf, jnp.float32),
        reached=jnp.zeros(queries, bool),
        before=jnp.full(queries, -1, jnp.int32),
    )
    return lax.while_loop(lambda tree: tree.free < 0, step, start)


def _move_potentials(state, tree, target):
    """Returns the state with potentials for which all pairs on the path cost nothing."""
    change = jnp.where(tree.reached, tree.distance - tree.shortest, 0.0)
    # The targets on known paths: those of the reached queries, and the one that enters.
    own = jnp.where(state.query_of >= 0, change[state.query_of], 0.0)
    return state._replace(
        target_potential=(state.target_potential + own).at[target].add(tree.distance),
        query_potential=state.query_potential - change,
    )


def _augment(state, tree, target):
    """Returns the state in which the targets on the path have moved on to the next query."""

    def move(carry):
        query, query_of, target_of = carry
        row = tree.before[query]
        following = query_of[row]
        return following, query_of.at[row].set(query), target_of.at[query].set(row)

    start = tree.free, state.query_of, state.target_of
    # Only the target that enters has had no query.
    _, query_of, target_of = lax.while_loop(lambda carry: carry[0] >= 0, move, start)
    return state._replace(query_of=query_of, target_of=target_of)
