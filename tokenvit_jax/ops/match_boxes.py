"""Matches anchors with the objects of an image, and samples some of the matches.

References:
  Ren et al. 2015, "Faster R-CNN", section 3.1.2; MMDetection Contributors, "MMDetection" (2018),
  whose order of rules this is.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, Key

from tokenvit_jax.kernels.platforms import by_platform
from tokenvit_jax.ops.boxes import box_iou

OBJECTS = 10  # compared at a time
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
    best, found, forced = by_platform(
        "matching",
        anchors,
        valid,
        boxes,
        present,
        cpu=functools.partial(_compare_present, least=least),
        default=functools.partial(_compare, least=least, block=OBJECTS),
    )
    matches = jnp.where(best < negative, NEGATIVE, IGNORED)
    matches = jnp.where(best >= positive, found, matches)
    matches = jnp.where(forced >= 0, forced, matches)
    return jnp.where(valid, matches, IGNORED)


def _compare(anchors, valid, boxes, present, least, block):
    """Compares anchors with some objects after others.

    Returns:
      The largest IoU of every anchor (A,), the first object with it, or `NEGATIVE`, and the last
      object that takes the anchor, or `NEGATIVE`.
    """

    def step(found, some):
        return _update(found, anchors, valid, *some, least), None

    count = len(boxes)
    boxes, present = (
        jnp.pad(x, ((0, -count % block), (0, 0))).reshape(-1, block, 1, x.shape[1])
        for x in (boxes, present[:, None])
    )
    numbers = jnp.arange(present.size, dtype=jnp.int32).reshape(-1, block, 1)
    return lax.scan(step, _nothing(valid), (numbers, boxes, present[..., 0]))[0]


def _compare_present(anchors, valid, boxes, present, least):
    """Returns the result of :func:`_compare`; images have as many turns as they have objects."""

    @jax.custom_batching.sequential_vmap  # or all images would have the turns of the fullest one
    def compare(anchors, valid, boxes, present):
        def step(i, found):
            some = i[None, None], boxes[i][None, None], present[i][None, None]
            return _update(found, anchors, valid, *some, least)

        places = jnp.arange(1, len(present) + 1, dtype=jnp.int32)
        last = jnp.where(present, places, 0).max(initial=0)
        return lax.fori_loop(0, last, step, _nothing(valid))

    return compare(anchors, valid, boxes, present)


def _nothing(valid):
    none = jnp.full(valid.shape, NEGATIVE, jnp.int32)
    return jnp.zeros(valid.shape, jnp.float32), none, none


def _update(found, anchors, valid, numbers, boxes, exists, least):
    """Returns the best IoU (A,), its object and the object that takes the anchor, after some more.

    Args:
      found: the same of the objects before.
      anchors: (A, 4).
      valid: (A,).
      numbers: numbers of the objects (n, 1).
      boxes: (n, 1, 4).
      exists: whether there is an object (n, 1).
      least: as in :func:`match_boxes`.
    """
    best, first, forced = found
    iou = jnp.where(valid & exists, box_iou(anchors, boxes), -1.0)
    highest, largest = iou.max(0), iou.max(1, keepdims=True)
    now = jnp.where(iou == highest, numbers, jnp.iinfo(jnp.int32).max).min(0)
    takes = (iou == largest) & (largest >= least) & exists
    taken = jnp.where(takes, numbers, NEGATIVE).max(0)
    return (
        jnp.maximum(highest, best),
        jnp.where(highest > best, now, first),
        jnp.maximum(forced, taken),
    )


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
