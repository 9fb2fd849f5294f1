"""Predicts single images of any size, with pictures and a table."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from tokenvit_jax.data import to_array, with_channels
from tokenvit_jax.data.segments import numbered_segments
from tokenvit_jax.tasks.label_maps import label_map_prediction
from tokenvit_jax.tasks.masks.settings import INSTANCE, SEMANTIC, eval_canvas
from tokenvit_jax.tasks.task import Prediction, Predictor, Task

_ROOM_STEP = 128  # results have room for sides of multiples of it: few programs for many sizes


def predictor_of(task: Task, predict: Callable[..., Any], variables: Any) -> Predictor:
    """Returns a function from an image of any size to its prediction.

    Args:
      task: the task.
      predict: ``predict(variables, images, image_size, original_size, room=room)`` returns what
        :func:`tokenvit_jax.tasks.masks.inference.predict_masks` does.
      variables: variables of the model.
    """
    names, canvas, kind = task.class_names(), eval_canvas(task.config), task.config.inference.kind
    describe = {SEMANTIC: _label_map, INSTANCE: _objects}.get(kind, _segments)
    apply = jax.jit(predict, static_argnames="room")

    def predict_one(image):
        image = with_channels(image, task.config.in_channels)
        size = image.size[::-1]
        pixels, image_size = canvas.place(image, canvas.shape(size))
        room = tuple(-(-side // _ROOM_STEP) * _ROOM_STEP for side in size)
        arrays = pixels[None], image_size[None], np.array([size], np.int32)
        found = jax.device_get(apply(variables, *arrays, room=room))
        return describe({name: x[0] for name, x in found.items()}, to_array(image), names)

    return predict_one


def _label_map(found, image, names):
    from tokenvit_jax.pictures.label_maps import draw_label_map  # matplotlib: drawing only

    labels = found["labels"][: image.shape[0], : image.shape[1]]
    draw = functools.partial(draw_label_map, image, labels, names)
    return label_map_prediction(labels, names, draw)


def _segments(found, image, names):
    from tokenvit_jax.tasks.masks import pictures  # matplotlib: drawing only

    ids = found["ids"][: image.shape[0], : image.shape[1]]
    classes = found["classes"][found["classes"] >= 0]
    areas = numbered_segments(ids, classes).areas
    segments = [
        {"id": number, "class": names[label], "area": int(area)}
        for number, (label, area) in enumerate(zip(classes, areas, strict=True), 1)
    ]
    draw = functools.partial(pictures.pictures_of_segments, image, ids, classes, names)
    text = pictures.describe(names, classes)
    return Prediction({"ids": ids, "classes": classes}, {"segments": segments}, text, draw)


def _objects(found, image, names):
    from tokenvit_jax.tasks.masks import pictures  # matplotlib: drawing only

    count = int((found["classes"] >= 0).sum())
    masks = np.unpackbits(found["bits"][:count], axis=-1)[:, : image.shape[0], : image.shape[1]]
    arrays = {"masks": masks.astype(bool)} | {
        name: found[name][:count] for name in ("classes", "scores")
    }
    objects = [
        {"class": names[label], "score": float(f"{score:.4g}"), "area": int(mask.sum())}
        for mask, label, score in zip(*arrays.values(), strict=True)
    ]
    draw = functools.partial(pictures.pictures_of_objects, image, arrays, names)
    text = pictures.describe(names, arrays["classes"][pictures.shown_objects(arrays)])
    return Prediction(arrays, {"objects": objects}, text, draw)
