"""Greedy non-maximum suppression with static shapes, exact, without a matrix of all pairs.

Boxes are visited by falling score, the first of equal ones first; a box is kept unless its IoU with
a kept one is above the threshold. Visited in blocks, a box waits only for its block: inside, the
rule is repeated until nothing changes, which is at most as often as boxes suppress each other in a
chain; then the block's kept boxes suppress all later ones.

References:
  Girshick et al. 2014, "Rich feature hierarchies for accurate object detection and semantic
  segmentation".
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from tokenvit_jax.kernels.platforms import by_platform
from tokenvit_jax.ops.boxes import box_iou

CPU_BLOCK = 128  # boxes of a block


def nms(
    boxes: Float[Array, "n 4"],
    scores: Float[Array, " n"],
    threshold: float,
    *,
    labels: Int32[Array, " n"] | None = None,
    valid: Bool[Array, " n"] | None = None,
) -> Bool[Array, " n"]:
    """Returns which boxes are kept, (n,) bool.

    Args:
      boxes: (n, 4) [x1 y1 x2 y2, pixels].
      scores: (n,).
      threshold: IoU above which the lower of two scores is suppressed.
      labels: only boxes of the same label suppress each other (n,); None: all.
      valid: boxes that take part (n,); None: all. The others are not kept.
    """
    count = len(scores)
    labels = None if labels is None else jnp.asarray(labels)
    valid = jnp.ones(count, bool) if valid is None else jnp.asarray(valid)
    order = jnp.argsort(jnp.where(valid, -scores, jnp.inf), stable=True)
    sorted_args = jax.tree.map(lambda x: x[order], (jnp.asarray(boxes), labels, valid))
    kept = by_platform(
        "non-maximum suppression",
        *sorted_args,
        cpu=functools.partial(_in_blocks, threshold=threshold, block=min(CPU_BLOCK, count)),
        default=functools.partial(_in_blocks, threshold=threshold, block=count),
    )
    return jnp.zeros(count, bool).at[order].set(kept)


def _in_blocks(boxes, labels, valid, threshold, block):
    """Returns which boxes, in the order of their visit, are kept."""
    count = len(valid)
    padding = -count % block
    # Numbers that a loop reads one after another lie side by side.
    columns = jnp.pad(boxes.T, ((0, 0), (0, padding)))
    labels, alive = jax.tree.map(lambda x: jnp.pad(x, (0, padding)), (labels, valid))

    def visit(number, alive):
        start = number * block
        every = columns, labels
        own = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, block, -1), every)
        within = _suppresses(own, own, threshold)
        earlier = jnp.tri(block, k=-1, dtype=bool)  # row: the suppressed box
        kept = _settle(lax.dynamic_slice_in_dim(alive, start, block), within.T & earlier)
        if padding + count > block:
            later = jnp.arange(len(alive)) >= start + block
            hit = _suppresses(own, every, threshold) & kept[:, None]
            alive = alive & ~(later & hit.any(0))
        return lax.dynamic_update_slice_in_dim(alive, kept, start, 0)

    blocks = len(alive) // block
    alive = visit(0, alive) if blocks == 1 else lax.fori_loop(0, blocks, visit, alive)
    return alive[:count]


def _suppresses(first, second, threshold):
    """Returns whether the first boxes suppress the second ones, if these are later: (m, n).

    Both are columns (4, m) or (4, n), and labels (m,) or (n,), or None.
    """
    (boxes, labels), (others, other_labels) = first, second
    overlaps = box_iou(boxes.T[:, None], others.T) > threshold
    return overlaps if labels is None else overlaps & (labels[:, None] == other_labels)


def _settle(alive, suppressed_by):
    """Returns which boxes of a block are kept.

    Args:
      alive: boxes that no earlier block suppressed (m,).
      suppressed_by: whether the box of a row is suppressed by that of a column, if it is kept.
    """

    def step(state):
        kept, _ = state
        new = alive & ~(suppressed_by & kept).any(1)
        return new, (new != kept).any()

    kept, _ = lax.while_loop(lambda state: state[1], step, (alive, jnp.array(True)))
    return kept
