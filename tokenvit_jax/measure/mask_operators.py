"""Operators of queries that predict masks, at the shapes of Mask2Former, and their alternatives."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from tokenvit_jax import ops
from tokenvit_jax.measure.cases import Case
from tokenvit_jax.measure.timing import normal

# (queries, places for targets, targets): panoptic images with few and many segments; ADE20K.
ASSIGNMENT_SHAPES = ((200, 100, 20), (200, 100, 100), (100, 100, 20))
# (side, objects, points): all segments at the points of the matching.
OBJECT_SHAPES = ((640, 50, 12544), (1024, 100, 12544))


def assign_targets_cases(
    batch_size: int | None, dtype: jnp.dtype, shapes=ASSIGNMENT_SHAPES
) -> Iterator[Case]:
    """Yields assignment of the targets that there are against optax's of all places.

    Targets like similar queries, as at the start of a training. Costs are float32.
    """
    del dtype
    for queries, places, targets in shapes:
        batch = batch_size or 16
        pairs = normal(0, (batch, queries, places))
        costs = 0.3 * pairs + normal(1, (batch, queries, 1))
        valid = jnp.broadcast_to(jnp.arange(places) < targets, (batch, places))
        yield Case(
            shape={"queries": queries, "places": places, "targets": targets},
            inputs=(costs, valid),
            num_differentiated=0,
            contenders={"optax": _assign_by_optax, "assign_targets": ops.assign_targets},
        )


def _assign_by_optax(costs, valid):
    """Assigns padding, too, at no cost: (B, Q, M), (B, M) -> (B, M), -1 for padding."""
    import optax  # no other operator needs it

    def assign(costs, valid):
        rows, columns = optax.assignment.hungarian_algorithm(jnp.where(valid, costs, 0.0))
        found = jnp.zeros(len(valid), jnp.int32).at[columns].set(rows.astype(jnp.int32))
        return jnp.where(valid, found, -1)

    return jax.lax.map(lambda image: assign(*image), (costs, valid))  # faster than vmap on a CPU


def sample_objects_cases(
    batch_size: int | None, dtype: jnp.dtype, shapes=OBJECT_SHAPES
) -> Iterator[Case]:
    """Yields values of masks at points from a map of identifiers against a map for every mask.

    The batch is one image.
    """
    del batch_size, dtype
    for side, objects, points in shapes:
        draw = np.random.default_rng(0)
        id_map = np.kron(draw.integers(objects, size=(side // 8,) * 2), np.ones((8, 8), int))
        yield Case(
            shape={"side": side, "objects": objects, "points": points},
            inputs=(
                jnp.asarray(id_map[None], jnp.uint8),
                jnp.arange(objects),
                jnp.asarray(draw.uniform(size=(points, 2)), jnp.float32),
            ),
            num_differentiated=0,
            contenders={"bitmaps": _sample_bitmaps, "sample_objects": ops.sample_objects},
        )


def _sample_bitmaps(id_maps, ids, points):
    """Makes a map of every mask: (L, H, W), (M,), (P, 2) -> (M, P)."""
    masks = (id_maps == ids[:, None, None, None]).any(1)
    return ops.sample_maps(masks.astype(jnp.float32), points)


CASES = {"assign_targets": assign_targets_cases, "sample_objects": sample_objects_cases}
