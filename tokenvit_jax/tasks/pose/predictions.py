"""Predicts the persons in boxes of single images, with pictures and a table."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from PIL import Image

from tokenvit_jax.data import to_array, with_channels
from tokenvit_jax.data.person_boxes import PERSON
from tokenvit_jax.data.whole_body import split_fields
from tokenvit_jax.metrics.whole_body import mean_score, suppress_duplicates
from tokenvit_jax.tasks.task import NUM_NAMED, Prediction, Predictor, Task

_MANY = 8  # boxes that are predicted at a time, unless there is only one


def predictor_of(task: Task, predict: Callable[..., jax.Array], variables: Any) -> Predictor:
    """Returns a function from an image of any size, and boxes, to the prediction.

    Args:
      task: the task.
      predict: ``predict(variables, images, to_image)`` returns the keypoints of crops (B, K, 3).
      variables: variables of the model.

    Returns:
      ``predictor(image, boxes=None)``. The boxes (n, 5) hold x1 y1 x2 y2 [pixels] and the score of
      each person; None: the whole image is the box of one person.
    """
    apply, examples = jax.jit(predict), task.examples(train=False)

    def keypoints_in(image, boxes):
        """Returns keypoints (n, K, 3) and areas (n,) of the frames of persons in boxes."""
        crops = [examples.eval_example(image, box) for *box, _ in boxes]
        size = 1 if len(crops) == 1 else _MANY
        found = [np.zeros((0, len(task.skeleton.names), 3), np.float32)]
        for start in range(0, len(crops), size):
            part = crops[start : start + size]
            part += [examples.empty()] * (size - len(part))
            arrays = (np.stack([crop[name] for crop in part]) for name in ("image", "to_image"))
            found.append(np.asarray(apply(variables, *arrays)))
        areas = np.array([crop["area"] for crop in crops])
        return np.concatenate(found)[: len(crops)], areas

    def predict_one(image, boxes=None):
        image = with_channels(image, task.config.in_channels)
        if boxes is None:
            boxes = np.array([[0, 0, *image.size, 1]])
        keypoints, areas = keypoints_in(image, boxes)
        scores = np.array([*map(mean_score, keypoints)]) * boxes[:, 4]
        sigmas = np.array(task.skeleton.sigmas)
        kept = suppress_duplicates(keypoints, scores, areas, sigmas)
        arrays = {"keypoints": keypoints, "boxes": boxes[:, :4], "scores": scores}
        arrays = {name: np.asarray(x, np.float32)[kept] for name, x in arrays.items()}
        persons = [_entry(*each) for each in zip(*arrays.values(), strict=True)]
        return Prediction(
            arrays, {"persons": persons}, _describe(arrays["scores"]),
            functools.partial(_draw, to_array(image), arrays["keypoints"], task.skeleton),
        )  # fmt: skip

    return predict_one


def _entry(keypoints, box, score):
    """Returns a person in COCO-WholeBody's format of results, without the image."""
    left, top, right, bottom = box.tolist()
    numbers = np.round(keypoints.astype(np.float64), 3)
    return split_fields({
        "category_id": PERSON,
        "score": float(f"{score:.4g}"),
        "bbox": [left, top, right - left, bottom - top],
        "keypoints": numbers.ravel().tolist(),
    })  # fmt: skip


def _describe(scores):
    shown = ", ".join(f"{score:.2f}" for score in scores[:NUM_NAMED])
    more = f" and {len(scores) - NUM_NAMED} more" if len(scores) > NUM_NAMED else ""
    if not len(scores):
        return "no person"
    return f"{len(scores)} person{'s' * (len(scores) > 1)} with score {shown}{more}"


def _draw(image, keypoints, skeleton, caption):
    from tokenvit_jax.pictures.skeletons import draw_skeletons  # matplotlib: drawing only

    del caption  # the picture is the image itself
    drawn = draw_skeletons(image, keypoints[::-1], skeleton.limbs, skeleton.names)
    return {"skeletons": Image.fromarray(drawn)}
