"""Average precision of keypoints of body, feet, face and hands, by object keypoint similarity.

References:
  Jin et al. 2020, "Whole-Body Human Pose Estimation in the Wild"; Papandreou et al. 2017, "Towards
  Accurate Multi-person Pose Estimation in the Wild", the suppression of duplicates.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tokenvit_jax.errors import UserError
from tokenvit_jax.metrics.coco import evaluate

# COCO's ten numbers of keypoints: average precision over thresholds of the similarity from 0.5 to
# 0.95, at two of them, and of medium and large persons; and average recall, likewise.
NUMBERS = (
    "ap", "ap50", "ap75", "ap_medium", "ap_large", "ar", "ar50", "ar75", "ar_medium", "ar_large",
)  # fmt: skip
_MIN_SCORE = 0.2  # of keypoints that count in the score of a person
_MAX_SIMILARITY = 0.9  # of two persons that are not taken for the same
_HANDS = "left_hand", "right_hand"


class _Found(NamedTuple):
    """A predicted person: identifier of the image, score, area of the frame, and keypoints."""

    image: int
    score: float
    area: float
    keypoints: np.ndarray


class WholeBodyMeter:
    """Collects the keypoints of a pass, and compares them with all persons of the images.

    Persons of an image that are almost the same as one with a higher score are left out
    (suppression by similarity). The images of the split count, but for those whose records were not
    evaluated.

    Args:
      annotations: returns the persons in COCO's format: "images", "annotations", whose "keypoints"
        are all K, "categories", and "records", the identifier of the image of every record.
      sigmas: K falloffs of the similarity, relative to the person's size.
      parts: name of a part -> its keypoints; the first one is the body.
    """

    def __init__(
        self,
        annotations: Callable[[], dict[str, Any]],
        sigmas: Sequence[float],
        parts: Mapping[str, range],
    ):
        self._annotations = functools.cache(annotations)
        self._sigmas, self._parts = np.array(sigmas), dict(parts)
        self._found: list[_Found] = []
        self._seen: set[int] = set()

    def add(self, outcome: Any) -> None:
        """Adds an `Outcome` whose rows are the persons of a batch.

        The rows hold "keypoints" (B, K, 3), x, y [pixels of the original image] and score, "score"
        (B,) of the box, "area" (B,) of the frame around it [pixels], "index" (B,) in the split, and
        "mask" (B,), 0 for no record.
        """
        rows, images = outcome.rows, self._annotations()["records"]
        for i in np.flatnonzero(rows["mask"] > 0):
            index = int(rows["index"][i])
            self._seen.add(index)
            keypoints = np.asarray(rows["keypoints"][i], np.float64)
            score = float(rows["score"][i]) * mean_score(keypoints)
            self._found.append(_Found(images[index], score, float(rows["area"][i]), keypoints))

    def results(self) -> list[dict[str, Any]]:
        """Returns the persons in COCO's format of results; "keypoints" are all K."""
        category = self._category()
        return [
            {
                "image_id": person.image,
                "category_id": category,
                "score": person.score,
                "keypoints": person.keypoints.ravel().tolist(),
            }
            for person in self._kept()
        ]

    def result(self) -> dict[str, float]:
        """Returns COCO's ten numbers of all keypoints, and of every part.

        Returns:
          "eval/ap", "eval/ap50", ... of all keypoints together, "eval/body_ap", ..., as fractions,
          in the order of :data:`NUMBERS`; -1: there is no such person. With two hands also
          "eval/hand_ap", ..., the mean of both.

        Raises:
          UserError: no person was evaluated.
        """
        if not self._seen:
            raise UserError("nothing was evaluated: no person of the split can be read")
        kept = self._kept()
        found = {"": self._numbers(range(len(self._sigmas)), kept)}
        found |= {f"{name}_": self._numbers(part, kept) for name, part in self._parts.items()}
        if self._parts.keys() >= {*_HANDS}:
            found["hand_"] = _mean(np.stack([found[f"{name}_"] for name in _HANDS]))
        return {
            f"eval/{prefix}{name}": float(value)
            for prefix, values in found.items()
            for name, value in zip(NUMBERS, values, strict=True)
        }

    def per_class(self) -> dict[str, np.ndarray]:
        """Returns nothing: there is one class."""
        return {}

    def _category(self) -> int:
        (category,) = self._annotations()["categories"]
        return category["id"]

    def _kept(self) -> list[_Found]:
        """Returns the persons without duplicates, image by image, by falling score."""
        by_image: dict[int, list[_Found]] = {}
        for person in self._found:
            by_image.setdefault(person.image, []).append(person)
        return [
            persons[place]
            for persons in by_image.values()
            for place in suppress_duplicates(
                np.stack([person.keypoints for person in persons]),
                np.array([person.score for person in persons]),
                np.array([person.area for person in persons]),
                self._sigmas,
            )
        ]

    def _numbers(self, part: range, kept: Sequence[_Found]) -> np.ndarray:
        """Returns the numbers of the keypoints of a part; the size of a person is its body's."""
        annotations, category = self._annotations(), self._category()
        objects, results = [], []
        for entry in annotations["annotations"]:
            points = np.reshape(entry["keypoints"], (-1, 3))[part]
            labelled = int((points[:, 2] > 0).sum())
            objects.append({**entry, "keypoints": points.ravel(), "num_keypoints": labelled})
        body = next(iter(self._parts.values()))
        for person in kept:
            points, places = person.keypoints[part], person.keypoints[body, :2]
            if (points[:, 2] > 0).any():
                # pycocotools takes the area of a person from its box.
                box = [*places.min(0).tolist(), *np.ptp(places, axis=0).tolist()]
                results.append({
                    "image_id": person.image, "category_id": category, "score": person.score,
                    "bbox": box, "keypoints": points.ravel().tolist(),
                })  # fmt: skip
        sigmas = self._sigmas[part]
        listed = {**annotations, "annotations": objects}
        return evaluate(listed, results, "keypoints", self._images(), sigmas).stats

    def _images(self) -> set[int]:
        """Returns the images that count: those without records, and those that were evaluated."""
        annotations = self._annotations()
        records = annotations["records"]
        seen = {records[index] for index in self._seen}
        return {image["id"] for image in annotations["images"]} - ({*records} - seen)


def mean_score(keypoints: np.ndarray) -> float:
    """Returns the mean of the scores of keypoints above 0.2, by which a box's score is multiplied.

    Args:
      keypoints: (K, 3) x, y and score.

    Returns:
      The mean; 0 if no score is above 0.2.
    """
    scores = keypoints[:, 2]
    sure = scores[scores > _MIN_SCORE]
    return float(sure.mean()) if len(sure) else 0.0


def _mean(numbers: np.ndarray) -> np.ndarray:
    """Returns the mean of several rows; of a number without persons, -1, only the others count."""
    valid = numbers >= 0
    sums = np.where(valid, numbers, 0).sum(0)
    return np.where(valid.any(0), sums / valid.sum(0).clip(1), -1.0)


def suppress_duplicates(
    keypoints: np.ndarray, scores: np.ndarray, areas: np.ndarray, sigmas: np.ndarray
) -> list[int]:
    """Returns the persons of an image without those that are almost one with a higher score.

    Args:
      keypoints: (n, K, 3) x, y [pixels] and score.
      scores: (n,).
      areas: (n,) of the persons' frames [pixels].
      sigmas: (K,).

    Returns:
      Places of the persons that are kept, by falling score.
    """
    rest, kept = np.argsort(-scores, kind="stable"), []
    while len(rest):
        best, rest = rest[0], rest[1:]
        kept.append(int(best))
        distances = ((keypoints[rest, :, :2] - keypoints[best, :, :2]) ** 2).sum(-1)
        size = (areas[rest] + areas[best])[:, None] / 2 + np.spacing(1)
        similarity = np.exp(-distances / (2 * sigmas) ** 2 / size / 2).mean(-1)
        rest = rest[similarity <= _MAX_SIMILARITY]
    return kept
