"""The embedded scenes with their digits as objects, each with a box and a mask.

The images are those of "scenes". The classes are the digits 0 to 3; there is no background class.
In the maps of stuff, the photographs behind the digits have classes of their own.
"""

import functools
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from tokenvit_jax.data.datasets import scenes
from tokenvit_jax.data.datasets.scenes import DIGITS, PHOTOGRAPHS, Drawing, ScenesSource
from tokenvit_jax.data.instances import coco_annotations, instances_of
from tokenvit_jax.data.record import DatasetInfo, Instances, Record

NUM_STUFF = DIGITS + len(PHOTOGRAPHS)  # classes of the maps of stuff
INFO = DatasetInfo(
    name="scene_instances",
    splits=scenes.INFO.splits,
    train_split="train",
    eval_split="test",
    fields=frozenset({"image", "instances", "stuff_map"}),
    num_classes=DIGITS,
    classes=tuple(map(str, range(DIGITS))),
)


def open_split(config: ConfigDict, split: str) -> "SceneInstancesSource":
    """Opens a split for reading; `config` is not used."""
    del config
    return SceneInstancesSource(split)


def annotations(config: ConfigDict, split: str) -> dict[str, Any]:
    """Returns the objects of a split in COCO's format; `config` is not used.

    Args:
      config: ignored.
      split: name of the split.

    Returns:
      "images", in the order of the split, "annotations" and "categories".
    """
    del config
    return _annotations(split)


@functools.cache
def _annotations(split: str) -> dict[str, Any]:
    source = SceneInstancesSource(split)
    size = scenes.SIDE, scenes.SIDE
    images = ((index, size, source.read_objects(index)) for index in range(len(source)))
    return coco_annotations(images, INFO.classes)


class SceneInstancesSource(ScenesSource):
    """Scenes of 128 x 128 pixels; the mask of a digit is the part of its strokes that is seen."""

    def name(self, index: int) -> str:
        """See :class:`tokenvit_jax.data.record.Source`."""
        return f"scene_instances split {self._split!r}, record {index}"

    def read(self, index: int) -> Record:
        """See :class:`tokenvit_jax.data.record.Source`."""
        scene = self.draw(index)
        return Record(
            id=index, image=scene.image, instances=objects_of(scene), stuff_map=_stuff_map(scene)
        )

    def portrait(self) -> np.ndarray:
        """See :class:`tokenvit_jax.data.record.Source`."""
        return np.zeros(len(self), bool)  # they are square

    def read_objects(self, index: int) -> Instances:
        """Returns the objects of a scene."""
        return objects_of(self.draw(index))


def objects_of(scene: Drawing) -> Instances:
    """Returns the digits of a scene as objects."""
    seen = visible(scene)
    return instances_of([mask for _, mask in seen], [digit for digit, _ in seen])


def _stuff_map(scene: Drawing) -> np.ndarray:
    labels = np.full((scenes.SIDE, scenes.SIDE), DIGITS + scene.photograph, np.uint8)
    for digit, mask in visible(scene):
        labels[mask] = digit
    return labels


def visible(scene: Drawing) -> list[tuple[int, np.ndarray]]:
    """Returns the digits of a scene with the part of their strokes that is seen, if there is one.

    Args:
      scene: a scene, whose later digits hide earlier ones.
    """
    hidden = np.zeros_like(scene.digits[0][1])
    seen = []
    for digit, strokes in reversed(scene.digits):
        seen.append((digit, strokes & ~hidden))
        hidden |= strokes
    return [(digit, mask) for digit, mask in reversed(seen) if mask.any()]
