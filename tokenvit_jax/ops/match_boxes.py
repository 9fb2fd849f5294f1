"""Matches anchors with the objects of an image, and samples some of the matches.

References:
  Ren et al. 2015, "Faster R-CNN", section 3.1.2; MMDetection Contributors, "MMDetection" (2018),
  whose order of rules this is.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, Key

from tokenvit_jax.ops.boxes import box_iou

NEGATIVE, IGNORED = -1, -2  # matches of anchors that are background, or that do not count


class Sample(NamedTuple):
    """Some of the matches of an image, the positive ones first.

    Attributes:
      indices: numbers of the anchors (num,).
      positive: whether they match an object (num,).
      valid: whether there is a match at this place (num,); False if the image has too few.
    """

    indices: Int32[Array, " num"]
    positive: Bool[Array, " num"]
    valid: Bool[Array, " num"]


def match_boxes(
    anchors: Float[Array, "A 4"],
    valid: Bool[Array, " A"],
    boxes: Float[Array, "M 4"],
    present: Bool[Array, " M"],
    *,
    positive: float,
    negative: float,
    least: float,
) -> Int32[Array, " A"]:
    """Returns the object that every anchor matches, :data:`NEGATIVE` or :data:`IGNORED`.

    An anchor matches the object with the largest IoU, the first of equal ones, if the IoU is at
    least ``positive``; it is negative below ``negative``, and ignored between them. Then every
    object whose largest IoU is at least ``least`` takes all anchors with just this IoU, and later
    objects take them from earlier ones. Memory is O(A): no matrix of anchors and objects.

    Args:
      anchors: (A, 4) [x1 y1 x2 y2, pixels].
      valid: anchors that take part (A,); the others are ignored.
      boxes: objects (M, 4).
      present: places of ``boxes`` that hold an object (M,).
      positive: least IoU of a match.
      negative: IoU below which an anchor is background.
      least: least IoU of the best anchor of an object for it to match.
    """

    def step(carry, entry):
        best, found, forced = carry
        number, box, exists = entry
        iou = jnp.where(valid & exists, box_iou(anchors, box), -1.0)
        largest = iou.max()
        found = jnp.where(iou > best, number, found)
        takes = (iou == largest) & (largest >= least) & exists
        return (jnp.maximum(iou, best), found, jnp.where(takes, number, forced)), None

    none = jnp.full(valid.shape, NEGATIVE, jnp.int32)
    start = jnp.zeros(valid.shape, jnp.float32), none, none
    numbers = jnp.arange(len(boxes), dtype=jnp.int32)
    (best, found, forced), _ = lax.scan(step, start, (numbers, boxes, present))
    matches = jnp.where(best < negative, NEGATIVE, IGNORED)
    matches = jnp.where(best >= positive, found, matches)
    matches = jnp.where(forced >= 0, forced, matches)
    return jnp.where(valid, matches, IGNORED)


def sample_matches(
    key: Key[Array, ""], matches: Int32[Array, " A"], *, num: int, max_positive: int
) -> Sample:
    """Draws ``num`` matches of an image at random: positive ones, filled up with negative ones.

    Args:
      key: random key.
      matches: result of :func:`match_boxes`.
      num: number of matches.
      max_positive: largest number of positive ones among them.
    """
    priority = jax.random.uniform(key, matches.shape)
    # Uniform numbers are below 1, so that no candidate has the priority of those that are none.
    first, is_positive = _first(jnp.where(matches >= 0, priority, -1.0), max_positive)
    others, is_negative = _first(jnp.where(matches == NEGATIVE, priority, -1.0), num)
    place, taken = jnp.arange(num), is_positive.sum()
    positive = place < taken
    other = jnp.clip(place - taken, 0, num - 1)
    indices = jnp.where(positive, first[jnp.minimum(place, max_positive - 1)], others[other])
    return Sample(indices, positive, positive | is_negative[other])


def _first(priority, count):
    """Returns the places (count,) of the highest priorities, and whether they are at least 0."""
    kept = min(count, len(priority))
    values, places = lax.top_k(priority, kept)
    places = jnp.pad(places.astype(jnp.int32), (0, count - kept))
    return places, jnp.pad(values, (0, count - kept), constant_values=-1.0) >= 0
