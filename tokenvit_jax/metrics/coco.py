"""COCO's average precision of boxes and masks, by pycocotools."""

import contextlib
import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from tokenvit_jax.errors import UserError
from tokenvit_jax.run_lengths import encode_part

# COCO's twelve numbers: average precision, over IoU thresholds from 0.5 to 0.95, at two of them,
# and of small, medium and large objects; and average recall, likewise, and with at most 1 and 10
# detections of an image.
NUMBERS = (
    "ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large",
    "ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large",
)  # fmt: skip
KINDS = {"box": "bbox", "mask": "segm"}  # names in metrics -> names of pycocotools


class CocoMeter:
    """Collects the detections of a pass, and compares them with all objects of the seen images.

    Args:
      annotations: returns the objects in COCO's format: "images", in the order of the split,
        "annotations" and "categories". Class i is the category with the i-th lowest identifier.
      has_masks: whether the detections have masks.
    """

    def __init__(self, annotations: Callable[[], dict[str, Any]], *, has_masks: bool):
        self._annotations, self._has_masks = annotations, has_masks
        self._found: list[dict[str, Any]] = []
        self._seen: set[int] = set()
        self._evaluated: dict[str, Any] = {}

    def add(self, outcome: Any) -> None:
        """Adds an `Outcome` whose rows are the detections of a batch.

        The rows hold "boxes" (B, D, 4) [x1 y1 x2 y2, pixels of the original image], "classes"
        (B, D), -1 for no detection, "scores" (B, D), if there are any "masks" (B, D, m, m),
        probabilities in the frame of the box, "index" (B,) in the split, "mask" (B,), 0 for no
        record, and "original_size" (B, 2), height and width [pixels].
        """
        rows = outcome.rows
        for i in np.flatnonzero(rows["mask"] > 0):
            index = int(rows["index"][i])
            self.see(index)
            size = tuple(map(int, rows["original_size"][i]))
            for place in np.flatnonzero(rows["classes"][i] >= 0):
                box = np.asarray(rows["boxes"][i, place], np.float64)
                found = {"bbox": [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()]}
                if self._has_masks:
                    part = paste_part(rows["masks"][i, place], box, size)
                    counts = encode_part(*part, size)
                    found["segmentation"] = {"size": list(size), "counts": counts}
                values = (rows[name][i, place] for name in ("classes", "scores"))
                self.add_found(index, *values, **found)

    def see(self, index: int) -> None:
        """Notes that a record of the split was evaluated; it may have no detections."""
        self._seen.add(index)
        self._evaluated = {}

    def add_found(self, index: int, label: int, score: float, **found: Any) -> None:
        """Adds a detection.

        Args:
          index: its record in the split.
          label: its class.
          score: its score.
          **found: "bbox" [x, y, width, height, pixels], and "segmentation", a run-length encoding.
        """
        own = {"index": index, "class": int(label), "score": float(score)}
        self._found.append(own | found)

    def results(self) -> list[dict[str, Any]]:
        """Returns the detections in COCO's format of results, with its identifiers.

        Boxes are [x, y, width, height].
        """
        images, categories = self._identifiers()
        return [
            {
                "image_id": images[found["index"]],
                "category_id": categories[found["class"]],
                **{key: found[key] for key in found if key not in ("index", "class")},
            }
            for found in self._found
        ]

    def result(self) -> dict[str, float]:
        """Returns COCO's twelve numbers of boxes, and of masks if there are any.

        Returns:
          "eval/box_ap", "eval/box_ap50", ..., "eval/mask_ap", ... as fractions, in the order of
          :data:`NUMBERS`; -1: there is no such object.

        Raises:
          UserError: no image was evaluated.
        """
        if not self._seen:
            raise UserError("nothing was evaluated: no image of the split can be read")
        return {
            f"eval/{kind}_{name}": float(value)
            for kind in self._kinds()
            for name, value in zip(NUMBERS, self._evaluate(kind).stats, strict=True)
        }

    def per_class(self) -> dict[str, np.ndarray]:
        """Returns "box_ap", and "mask_ap" if there are masks, (num_classes,) as fractions.

        They are nan for classes without objects.
        """
        found = {}
        for kind in self._kinds():
            # (IoU thresholds, recalls, classes, areas, detections); -1 without objects.
            precision = self._evaluate(kind).eval["precision"][:, :, :, 0, -1]
            precision = np.where(precision < 0, np.nan, precision)
            valid = ~np.isnan(precision).all((0, 1))
            means = np.full(precision.shape[2], np.nan)
            means[valid] = np.nanmean(precision[:, :, valid], (0, 1))
            found[f"{kind}_ap"] = means
        return found

    def _kinds(self) -> Sequence[str]:
        return [kind for kind in KINDS if kind == "box" or self._has_masks]

    def _identifiers(self) -> tuple[list[int], list[int]]:
        truth = self._annotations()
        categories = sorted(category["id"] for category in truth["categories"])
        return [image["id"] for image in truth["images"]], categories

    def _evaluate(self, kind: str) -> Any:
        """Returns a `COCOeval` after its evaluation."""
        if kind not in self._evaluated:
            self._evaluated[kind] = self._run(kind)
        return self._evaluated[kind]

    def _run(self, kind: str) -> Any:
        keep = {"box": "bbox", "mask": "segmentation"}[kind]
        listed = [
            {name: found[name] for name in ("image_id", "category_id", "score", keep)}
            for found in self.results()
        ]
        images, _ = self._identifiers()
        seen = [images[index] for index in self._seen]
        return evaluate(self._annotations(), listed, KINDS[kind], seen)


def evaluate(
    annotations: dict[str, Any],
    results: list[dict[str, Any]],
    kind: str,
    images: Iterable[int],
    sigmas: Sequence[float] = (),
) -> Any:
    """Compares detections with objects by pycocotools.

    Args:
      annotations: the objects in COCO's format.
      results: the detections in COCO's format of results.
      kind: "bbox", "segm" or "keypoints".
      images: identifiers of the images that count.
      sigmas: falloffs of the similarity, one per keypoint.

    Returns:
      A `COCOeval` after its evaluation.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        truth = COCO()
        truth.dataset = _ground_truth(annotations)
        truth.createIndex()
        found = truth.loadRes(results) if results else _empty(truth, COCO)
        evaluation = COCOeval(truth, found, kind)
        evaluation.params.imgIds = sorted(images)
        if kind == "keypoints":
            evaluation.params.kpt_oks_sigmas = np.array(sigmas)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def _ground_truth(annotations: dict[str, Any]) -> dict[str, Any]:
    """Returns annotations that pycocotools may change, and without what it does not understand.

    It takes an object with the identifier 0 for no object, and needs to know which are crowds.
    """
    objects = [
        {**entry, "id": number, "iscrowd": int(bool(entry.get("iscrowd")))}
        for number, entry in enumerate(annotations["annotations"], 1)
    ]
    return {**annotations, "annotations": objects}


def _empty(truth: Any, make: Callable[[], Any]) -> Any:
    """Returns results without detections, which pycocotools cannot load."""
    found = make()
    found.dataset = {**truth.dataset, "annotations": []}
    found.createIndex()
    return found


def paste_mask(probabilities: np.ndarray, box: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns the pixels of an image that belong to an object, (H, W) bool.

    Args:
      probabilities: as in :func:`paste_part`.
      box: as in :func:`paste_part`.
      size: height and width of the image [pixels].
    """
    part, (left, top) = paste_part(probabilities, box, size)
    pixels = np.zeros(size, bool)
    pixels[top : top + part.shape[0], left : left + part.shape[1]] = part
    return pixels


def paste_part(
    probabilities: np.ndarray, box: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, tuple[int, int]]:
    """Returns the pixels of an object in the part of the image that its box covers.

    Probabilities are interpolated at the centres of the pixels (bilinear); a pixel belongs to the
    object from 0.5 on. :func:`tokenvit_jax.ops.instance_masks.paste_masks` does the same for whole
    images: outside of the box, it is below 0.5.

    Args:
      probabilities: (m, m), in the frame of the box.
      box: (4,) [x1 y1 x2 y2, pixels]; one without height or width has no pixels.
      size: height and width of the image [pixels].

    Returns:
      (h, w) bool, and the column and row of its top left pixel.
    """
    low = np.clip(np.floor(box[:2]), 0, size[::-1]).astype(int)
    high = np.clip(np.ceil(box[2:]), low, size[::-1]).astype(int)
    if (box[2:] <= box[:2]).any():
        high = low
    cells = np.pad(np.asarray(probabilities, np.float64), 1)
    for axis, place in ((0, 1), (1, 0)):  # rows from y, columns from x
        centres = np.arange(low[place], high[place]) + 0.5
        positions = (centres - box[place]) / (box[place + 2] - box[place])
        positions = (positions * len(probabilities) + 0.5).clip(0, len(probabilities) + 1)
        before = np.minimum(positions.astype(int), len(probabilities))
        weights = np.expand_dims(positions - before, 1 - axis)
        first, second = (cells.take(before + i, axis) for i in (0, 1))
        cells = first + weights * (second - first)
    return cells >= 0.5, (int(low[0]), int(low[1]))
