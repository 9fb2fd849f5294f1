"""The embedded scenes with a segment for every digit, and one for the photograph behind them.

Images and objects are those of "scene_instances". The digits 0 to 3 are things; each of the two
photographs is a class of stuff.
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from tokenvit_jax.data.datasets import scene_instances
from tokenvit_jax.data.datasets.scene_instances import SceneInstancesSource, objects_of, visible
from tokenvit_jax.data.datasets.scenes import DIGITS, PHOTOGRAPHS, Drawing
from tokenvit_jax.data.record import Record, Segments
from tokenvit_jax.data.segments import segments_of

INFO = dataclasses.replace(
    scene_instances.INFO,
    name="scene_segments",
    fields=frozenset({"image", "instances", "segments"}),
    num_classes=DIGITS + len(PHOTOGRAPHS),
    classes=scene_instances.INFO.classes + PHOTOGRAPHS,
    things=frozenset(range(DIGITS)),
)


def open_split(config: ConfigDict, split: str) -> "SceneSegmentsSource":
    """Opens a split for reading; `config` is not used."""
    del config
    return SceneSegmentsSource(split)


def annotations(config: ConfigDict, split: str) -> dict[str, Any]:
    """Returns the digits of a split in COCO's format; `config` is not used.

    The photographs are categories without objects, which evaluation passes over.
    """
    categories = [{"id": i, "name": name} for i, name in enumerate(INFO.classes, 1)]
    return scene_instances.annotations(config, split) | {"categories": categories}


class SceneSegmentsSource(SceneInstancesSource):
    """Scenes of 128 x 128 pixels; segments are the digits in their order, then the photograph."""

    def name(self, index: int) -> str:
        """See :class:`tokenvit_jax.data.record.Source`."""
        return f"scene_segments split {self._split!r}, record {index}"

    def read(self, index: int) -> Record:
        """See :class:`tokenvit_jax.data.record.Source`."""
        scene = self.draw(index)
        return Record(
            id=index, image=scene.image, instances=objects_of(scene), segments=_segments(scene)
        )


def _segments(scene: Drawing) -> Segments:
    seen = visible(scene)
    masks = [mask for _, mask in seen]
    classes = [digit for digit, _ in seen]
    rest = ~sum(masks).astype(bool)
    return segments_of([*masks, rest], [*classes, DIGITS + scene.photograph])
