"""Selects the detections of an image: suppression per class, of which only the first are needed.

References:
  Bodla et al. 2017, "Soft-NMS: Improving Object Detection With One Line of Code".
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from tokenvit_jax.ops.boxes import box_iou


class Selection(NamedTuple):
    """The detections of an image, by falling score.

    Attributes:
      rows: rows of the boxes (num,); -1: there are fewer detections.
      classes: their classes (num,); -1 likewise.
      scores: their scores (num,); 0 likewise.
    """

    rows: Int32[Array, " num"]
    classes: Int32[Array, " num"]
    scores: Float[Array, " num"]


def select_detections(
    boxes: Float[Array, "n *K 4"],
    scores: Float[Array, "n K"],
    *,
    score_threshold: float,
    iou_threshold: float,
    num: int,
    soft: bool = False,
) -> Selection:
    """Returns the first ``num`` detections that greedy suppression per class keeps.

    Every turn takes the highest score of all rows and classes, the first of equal ones, and
    suppresses the boxes of its class that overlap it. So it is exact with any number of candidates.

    Args:
      boxes: (n, 4), or a box for every class (n, K, 4) [x1 y1 x2 y2, pixels].
      scores: score of every box for every class (n, K).
      score_threshold: only scores above it are detections.
      iou_threshold: IoU above which a box is suppressed; with ``soft``, from which it decays.
      num: number of detections.
      soft: whether overlapping boxes are kept with scores that are multiplied by 1 - IoU, unless
        these fall to ``score_threshold``.
    """
    count, num_classes = scores.shape
    scores = jnp.where(scores > score_threshold, scores, -1.0)
    per_class = jnp.broadcast_to(boxes.reshape(count, -1, 4), (count, num_classes, 4))
    by_class = per_class.swapaxes(0, 1), scores.T  # contiguous where a turn reads and writes

    def turn(carry, _):
        scores, best, rows = carry
        # The first of equal scores: by row, then by class.
        candidates = jnp.where(best == best.max(), rows, count)
        label = jnp.argmin(candidates)
        row, score = rows[label], best[label]
        own, own_boxes = scores[label], by_class[0][label]
        iou = box_iou(own_boxes[row], own_boxes)
        if soft:
            decayed = jnp.where(iou >= iou_threshold, own * (1 - iou), own)
            own = jnp.where(decayed > score_threshold, decayed, -1.0)
        else:
            own = jnp.where(iou > iou_threshold, -1.0, own)
        own = own.at[row].set(-1.0)
        row_of_best = jnp.argmax(own).astype(jnp.int32)
        carry = (
            scores.at[label].set(own),
            best.at[label].set(own[row_of_best]),
            rows.at[label].set(row_of_best),
        )
        exists = score > score_threshold
        found = [jnp.where(exists, x, -1).astype(jnp.int32) for x in (row, label)]
        return carry, Selection(*found, jnp.where(exists, score, 0.0))

    scores = by_class[1]
    start = scores, scores.max(1), jnp.argmax(scores, 1).astype(jnp.int32)
    return lax.scan(turn, start, length=num)[1]
