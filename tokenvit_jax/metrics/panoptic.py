"""Panoptic quality of maps of segments, as panopticapi computes it.

References:
  Kirillov et al. 2019, "Panoptic Segmentation", section 4.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tokenvit_jax.data.record import Segments
from tokenvit_jax.errors import UserError

VOID = 0  # identifier of pixels without a segment
GROUPS = ("all", "things", "stuff")


class Quality(NamedTuple):
    """Means over classes, as fractions; nan without classes.

    Attributes:
      pq: panoptic quality.
      sq: segmentation quality, mean IoU of matched segments.
      rq: recognition quality.
      classes: number of classes that occur.
    """

    pq: float
    sq: float
    rq: float
    classes: int


def panoptic_counts(truth: Segments, found: Segments, num_classes: int) -> np.ndarray:
    """Returns the sum of IoU, and the true positives, false positives and false negatives, (K, 4).

    A true and a predicted segment of one class match if their IoU is above 1/2, where predicted
    pixels without a true segment do not count. An unmatched prediction is no false positive if more
    than half of it lies where no true segment is, or on the crowd of its class (of several, on the
    last one). Counts of images are float64 and add up.

    Args:
      truth: true segments.
      found: predicted segments of the same image; their crowd and areas are not read.
      num_classes: K.

    Raises:
      ValueError: the maps differ in size, or the predicted map has an identifier without a segment.
    """
    if truth.ids.shape != found.ids.shape:
        sizes = (" x ".join(map(str, x.ids.shape)) for x in (found, truth))
        raise ValueError("found.ids has {} pixels; valid: {} as truth.ids".format(*sizes))
    pairs = _shared_pixels(truth, found)
    if pairs[:, -1].any():
        raise ValueError(
            "found.ids has identifiers that are not in found.numbers; valid: those of the segments,"
            f" and {VOID} for none"
        )
    areas = pairs.sum(0)[1:-1]
    void, shared = pairs[0, 1:-1], pairs[1:-1, 1:-1]
    same_class = np.equal.outer(truth.classes, found.classes)
    candidates = same_class & ~truth.crowd[:, None] & (shared > 0)
    union = truth.areas[:, None] + areas - shared - void
    iou = np.where(candidates, shared / np.where(candidates, union, 1), 0.0)
    matches = iou > 0.5

    on_crowd = np.zeros(len(found.numbers), np.int64)
    for place in np.flatnonzero(truth.crowd):  # later ones replace earlier ones
        on_crowd = np.where(same_class[place], shared[place], on_crowd)
    forgiven = void + on_crowd > 0.5 * areas

    def count(classes, weights):
        return np.bincount(classes, weights, minlength=num_classes)

    return np.stack(
        [
            count(truth.classes, iou.sum(1, where=matches)),
            count(truth.classes, matches.any(1)),
            count(found.classes, ~matches.any(0) & ~forgiven),
            count(truth.classes, ~matches.any(1) & ~truth.crowd),
        ],
        1,
    )


def _shared_pixels(truth, found):
    """Returns the pixels that true (rows) and predicted segments (columns) share.

    The first row and column are those of void, the last ones those of unknown identifiers.
    """
    places, sizes = zip(*(_places(x.ids, x.numbers) for x in (truth, found)), strict=True)
    pairs = np.bincount(places[0] * sizes[1] + places[1], minlength=sizes[0] * sizes[1])
    return pairs.reshape(sizes)


def _places(ids, numbers):
    """Returns the place of the segment of every pixel, flat, and the number of places."""
    known = np.concatenate([[VOID], numbers.astype(np.int64)])
    order = np.argsort(known)
    pixels = ids.astype(np.int64).ravel()
    near = order[np.searchsorted(known, pixels, sorter=order).clip(max=len(known) - 1)]
    return np.where(known[near] == pixels, near, len(known)), len(known) + 1


def qualities(counts: np.ndarray) -> np.ndarray:
    """Returns PQ, SQ and RQ of every class (K, 3), as fractions; nan for classes without segments.

    Args:
      counts: sums of :func:`panoptic_counts` over images (K, 4).
    """
    iou, right, wrong, missed = np.asarray(counts, np.float64).T
    total = right + wrong / 2 + missed / 2
    occurs = total > 0
    total = np.where(occurs, total, np.nan)
    sq = np.where(occurs, iou / np.maximum(right, 1), np.nan)
    return np.stack([iou / total, sq, right / total], 1)


class PanopticMeter:
    """Adds up the counts of images over a pass.

    Args:
      is_thing: whether each class is of things; the others are of stuff (K,).

    Attributes:
      counts: as of :func:`panoptic_counts` (K, 4); those of several meters add up.
    """

    def __init__(self, is_thing: Sequence[bool]):
        self._is_thing = np.asarray(is_thing, bool)
        self.counts = np.zeros((len(self._is_thing), 4))

    def add(self, truth: Segments, found: Segments) -> None:
        """Adds an image."""
        self.counts += panoptic_counts(truth, found, len(self._is_thing))

    def summary(self) -> dict[str, Quality]:
        """Returns the means over the classes of each of :data:`GROUPS` that occur."""
        by_class = qualities(self.counts)
        occurs = ~np.isnan(by_class[:, 0])
        every = np.ones_like(self._is_thing)
        found = {}
        for name, group in zip(GROUPS, (every, self._is_thing, ~self._is_thing), strict=True):
            own = by_class[group & occurs]
            means = own.mean(0) if len(own) else np.full(3, np.nan)
            found[name] = Quality(*map(float, means), len(own))
        return found

    def result(self) -> dict[str, float]:
        """Returns the metrics of the pass.

        Returns:
          "eval/pq", "eval/sq", "eval/rq", then "eval/pq_things", ... and "eval/pq_stuff", ..., as
          fractions; nan: no such class occurs.

        Raises:
          UserError: no segment was seen.
        """
        summary = self.summary()
        if not summary["all"].classes:
            raise UserError(
                "nothing was evaluated: no image of the split can be read, or none has segments"
            )
        return {
            f"eval/{metric}{'' if name == 'all' else f'_{name}'}": getattr(quality, metric)
            for name, quality in summary.items()
            for metric in ("pq", "sq", "rq")
        }

    def per_class(self) -> dict[str, np.ndarray]:
        """Returns "pq", "sq" and "rq" of every class (K,), as fractions; nan without segments."""
        return dict(zip(("pq", "sq", "rq"), qualities(self.counts).T, strict=True))
