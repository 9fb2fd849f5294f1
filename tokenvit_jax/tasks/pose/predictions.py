"""Predicts the persons in boxes of single images, with pictures and a table."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from tokenvit_jax.data import to_array, with_channels
from tokenvit_jax.data.whole_body import split_fields
from tokenvit_jax.tasks.task import Prediction, Predictor, Task

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
        """Returns the keypoints (n, K, 3) of persons in boxes."""
        crops = [examples.eval_example(image, box) for *box, _ in boxes]
        size = 1 if len(crops) == 1 else _MANY
        found = [np.zeros((0, len(task.skeleton.names), 3), np.float32)]
        for start in range(0, len(crops), size):
            part = crops[start : start + size]
            part += [examples.empty()] * (size - len(part))
            arrays = (np.stack([crop[name] for crop in part]) for name in ("image", "to_image"))
            found.append(np.asarray(apply(variables, *arrays)))
        return np.concatenate(found)[: len(crops)]

    def predict_one(image, boxes=None):
        image = with_channels(image, task.config.in_channels)
        if boxes is None:
            boxes = np.array([[0, 0, *image.size, 1]])
        keypoints = keypoints_in(image, boxes)
        return _describe(task, to_array(image), np.asarray(boxes, np.float64), keypoints)

    return predict_one


def _describe(task, image, boxes, keypoints):
    return None
