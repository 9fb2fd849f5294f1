"""Compares predicted segments with the ground truth of the dataset, at its own size."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from tokenvit_jax.data.record import IGNORED, Record
from tokenvit_jax.data.segments import label_map_of, numbered_segments
from tokenvit_jax.metrics.coco import CocoMeter
from tokenvit_jax.metrics.confusion import ConfusionMeter
from tokenvit_jax.metrics.panoptic import PanopticMeter
from tokenvit_jax.run_lengths import encode_mask

Truth = Callable[[int], Record]  # the record of a place in the split


def seen_rows(outcome: Any) -> Iterator[tuple[int, tuple[int, int], dict[str, np.ndarray]]]:
    """Yields index, height and width, and the arrays of every record of an outcome."""
    rows = outcome.rows
    for i in np.flatnonzero(rows["mask"] > 0):
        height, width = map(int, rows["original_size"][i])
        yield int(rows["index"][i]), (height, width), {name: x[i] for name, x in rows.items()}


class LabelMapMeter(ConfusionMeter):
    """Adds up the confusion of the "labels" of images with their label maps.

    Args:
      truth: returns a record of the split.
      num_classes: K.
    """

    def __init__(self, truth: Truth, num_classes: int):
        super().__init__(num_classes)
        self._truth = truth
        self._found: list[dict[str, Any]] = []

    def add(self, outcome: Any) -> None:
        """Adds an `Outcome` with the rows of a batch."""
        for index, (height, width), row in seen_rows(outcome):
            record = self._truth(index)
            wanted, found = label_map_of(record), row["labels"][:height, :width]
            counted = wanted != IGNORED
            pairs = wanted[counted].astype(np.int64) * len(self._confusion) + found[counted]
            counts = np.bincount(pairs, minlength=self._confusion.size)
            self._confusion += counts.reshape(self._confusion.shape)
            ids = [(label, found == label) for label in np.unique(found)]
            self._found.append(_entry(record["id"], ids))

    def result(self) -> dict[str, float]:
        """Returns the metrics of :class:`ConfusionMeter` without the loss."""
        metrics = super().result()
        del metrics["eval/loss"]
        return metrics

    def results(self) -> list[dict[str, Any]]:
        """Returns the segments of every image: one for each class."""
        return self._found


class SegmentMeter(PanopticMeter):
    """Adds up panoptic quality over the "ids" and "classes" of images.

    Args:
      truth: returns a record of the split.
      is_thing: whether each class is of things (K,).
    """

    def __init__(self, truth: Truth, is_thing: Sequence[bool]):
        super().__init__(is_thing)
        self._truth = truth
        self._found: list[dict[str, Any]] = []

    def add(self, outcome: Any) -> None:
        """Adds an `Outcome` with the rows of a batch."""
        for index, (height, width), row in seen_rows(outcome):
            record = self._truth(index)
            ids, classes = row["ids"][:height, :width], row["classes"]
            found = numbered_segments(ids, classes[classes >= 0])
            super().add(record["segments"], found)
            masks = [(label, ids == number) for number, label in enumerate(found.classes, 1)]
            self._found.append(_entry(record["id"], masks))

    def result(self) -> dict[str, float]:
        """Returns the metrics of :class:`PanopticMeter` that are known.

        Things or stuff of which the images have no class are left out.
        """
        return {name: x for name, x in super().result().items() if not np.isnan(x)}

    def results(self) -> list[dict[str, Any]]:
        """Returns the segments of every image."""
        return self._found


def _entry(identifier, masks):
    """Returns the segments of an image: class and run-length encoding of each."""
    return {
        "image_id": identifier,
        "segments": [
            {
                "class": int(label),
                "segmentation": {"size": list(mask.shape), "counts": encode_mask(mask)},
            }
            for label, mask in masks
        ],
    }


class ObjectMeter(CocoMeter):
    """COCO's average precision of masks, and of the boxes around them.

    Args:
      annotations: as for :class:`CocoMeter`.
    """

    def __init__(self, annotations: Callable[[], dict[str, Any]]):
        super().__init__(annotations, has_masks=True)

    def add(self, outcome: Any) -> None:
        """Adds an `Outcome` whose rows hold "bits", "classes" and "scores" of the objects."""
        from pycocotools import mask as rle

        for index, (height, width), row in seen_rows(outcome):
            self.see(index)
            for place in np.flatnonzero(row["classes"] >= 0):
                mask = np.unpackbits(row["bits"][place], axis=-1)[:height, :width]
                if not mask.any():
                    continue
                segmentation = {"size": [height, width], "counts": encode_mask(mask)}
                box = rle.toBbox(segmentation).tolist()
                values = row["classes"][place], row["scores"][place]
                self.add_found(index, *values, bbox=box, segmentation=segmentation)
