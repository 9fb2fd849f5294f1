"""A few embedded scenes with their objects, all of other sizes, every second one upright."""

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


class UprightScenesSource(ScenesSource):
    """Scenes without some rows above or columns on the left. Digits do not hide each other."""

    def __len__(self) -> int:
        return INFO.splits[self._split]

    def portrait(self) -> np.ndarray:
        return np.arange(len(self)) % 2 == 1

    def read(self, index: int) -> Record:
        image, digits, _ = self.draw(index)
        left, top = (index, 0) if self.portrait()[index] else (0, index)
        parts = [(digit, strokes[top:, left:]) for digit, strokes in digits]
        seen = [(digit, strokes) for digit, strokes in parts if strokes.any()]
        instances = instances_of([mask for _, mask in seen], [digit for digit, _ in seen])
        return Record(id=index, image=image.crop((left, top, SIDE, SIDE)), instances=instances)


def open_split(config: ConfigDict, split: str) -> UprightScenesSource:
    return UprightScenesSource(split)


def annotations(config: ConfigDict, split: str) -> dict[str, Any]:
    source = UprightScenesSource(split)
    found = [
        coco_annotations([(i, record["image"].size[::-1], record["instances"])], INFO.classes)
        for i, record in enumerate(map(source.read, range(len(source))))
    ]
    objects = [entry for each in found for entry in each["annotations"]]
    return {
        "images": [image for each in found for image in each["images"]],
        "annotations": [{**entry, "id": number} for number, entry in enumerate(objects, 1)],
        "categories": found[0]["categories"],
    }
