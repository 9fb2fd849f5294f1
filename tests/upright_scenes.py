"""A few of the embedded scenes with their objects; every second one is cut higher than wide."""

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from tokenvit_jax.data import DatasetInfo, Record
from tokenvit_jax.data.datasets import scene_instances
from tokenvit_jax.data.datasets.scenes import SIDE, ScenesSource
from tokenvit_jax.data.instances import coco_annotations, instances_of

INFO = DatasetInfo(
    name="upright_scenes",
    splits={"train": 32, "test": 24},
    train_split="train",
    eval_split="test",
    fields=scene_instances.INFO.fields,
    num_classes=scene_instances.INFO.num_classes,
    classes=scene_instances.INFO.classes,
)
LEFT, RIGHT = 24, 104  # columns of the upright scenes


class UprightScenesSource(ScenesSource):
    """Scenes whose upright half has 128 x 80 pixels. Digits do not hide each other."""

    def __len__(self) -> int:
        return INFO.splits[self._split]

    def portrait(self) -> np.ndarray:
        return np.arange(len(self)) % 2 == 1

    def read(self, index: int) -> Record:
        image, digits = self.draw(index)
        left, right = (LEFT, RIGHT) if self.portrait()[index] else (0, SIDE)
        parts = [(digit, strokes[:, left:right]) for digit, strokes in digits]
        seen = [(digit, strokes) for digit, strokes in parts if strokes.any()]
        instances = instances_of([mask for _, mask in seen], [digit for digit, _ in seen])
        return Record(id=index, image=image.crop((left, 0, right, SIDE)), instances=instances)


def open_split(config: ConfigDict, split: str) -> UprightScenesSource:
    return UprightScenesSource(split)


def annotations(config: ConfigDict, split: str) -> dict[str, Any]:
    source = UprightScenesSource(split)
    found = [
        coco_annotations([(i, source.read(i)["instances"])], size, INFO.classes)
        for i in range(len(source))
        for size in [(SIDE, source.read(i)["image"].width)]
    ]
    objects = [entry for each in found for entry in each["annotations"]]
    return {
        "images": [image for each in found for image in each["images"]],
        "annotations": [{**entry, "id": number} for number, entry in enumerate(objects, 1)],
        "categories": found[0]["categories"],
    }
