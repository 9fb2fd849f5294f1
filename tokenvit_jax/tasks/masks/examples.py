"""Turns records into examples for segmentation by masks."""

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from tokenvit_jax.config import height_and_width
from tokenvit_jax.data.box_transforms import View
from tokenvit_jax.data.images import with_channels
from tokenvit_jax.data.record import Record, Spec
from tokenvit_jax.data.segment_transforms import (
    LAYERS,
    NO_SEGMENT,
    cropped_view,
    jittered_view,
    view_canvas,
    view_instances,
    view_segments,
)
from tokenvit_jax.data.segments import class_segments, label_map_of
from tokenvit_jax.errors import UserError
from tokenvit_jax.tasks.masks.settings import INSTANCE, PANOPTIC, eval_canvas, result_size

Example = dict[str, np.ndarray]
_FAR = 2**30  # no limit of a side [pixels]


class MaskExamples:
    """Images with segments.

    A training example holds `image` (H, W, C) uint8, a view at the top left of a grey canvas,
    `classes` (M,) int32, `NO_SEGMENT` at the end, and `segments_left_out` () int32, the number of
    segments beyond M. `segments` (L, H, W) int16 has the place of every pixel's segment in the
    list, from 1 on: one map, or for objects, which may overlap, `LAYERS` maps, each object in one
    of them. Crowds, void and padding are background.

    An evaluation example holds the whole image on a square canvas that has room for both
    orientations, `image_size` (2,) int32, its height and width there, and `original_size` (2,).

    Args:
      config: provides `image_size`, `in_channels`, `inference.kind`, `data.normalization` and the
        entries of the task.
      train: whether the examples are for training.
    """

    def __init__(self, config: ConfigDict, *, train: bool):
        self._train, self._channels = train, config.in_channels
        self._kind, self._augment = config.inference.kind, config.augment
        self._size = height_and_width(config.image_size)
        self._eval_canvas, self._room = eval_canvas(config), result_size(config)
        count = self._max_segments = config.data.max_segments
        size = self._size if train else self._eval_canvas.square
        self.specs = {"image": Spec((*size, self._channels), np.uint8)}
        if not train:
            sizes = ("image_size", "original_size")
            self.specs |= {name: Spec((2,), np.int32) for name in sizes}
            return
        layers = LAYERS if self._kind == INSTANCE else 1
        self.specs["segments"] = Spec((layers, *size), np.int16)
        self.specs["classes"] = Spec((count,), np.int32)
        self.specs["segments_left_out"] = Spec((), np.int32)

    def __call__(self, record: Record, rng: np.random.Generator | None) -> Example:
        """See :class:`tokenvit_jax.data.record.Examples`."""
        image = with_channels(record["image"], self._channels)
        if not self._train:
            return self._whole(image)
        view = self._draw(image, rng)
        color_rng = rng if self._augment.photometric else None
        pixels = view_canvas(image, view, self._size, color_rng=color_rng)
        targets = self._targets(record, image.size, view)
        segments = targets["segments"].reshape(self.specs["segments"].shape)
        return {"image": pixels} | targets | {"segments": segments}

    def empty(self) -> Example:
        """See :class:`tokenvit_jax.data.record.Examples`."""
        example = {name: np.zeros(*spec) for name, spec in self.specs.items()}
        if self._train:
            example["classes"][:] = NO_SEGMENT
        else:
            example["image_size"][:] = self.specs["image"].shape[:2]
            example["original_size"][:] = 1
        return example

    def _whole(self, image: Image.Image) -> Example:
        height, width = image.size[::-1]
        if height > self._room[0] or width > self._room[1]:
            raise UserError(
                f"image has {width} x {height} pixels (width x height); valid: at most "
                f"{self._room[1]} x {self._room[0]}, config.data.result_size"
            )
        pixels, size = self._eval_canvas.place(image, self._eval_canvas.square)
        original = np.array((height, width), np.int32)
        return {"image": pixels, "image_size": size, "original_size": original}

    def _draw(self, image: Image.Image, rng: np.random.Generator) -> View:
        flip, augment = self._augment.flip, self._augment
        if augment.jitter:
            return jittered_view(image.size, self._size, augment.jitter, flip=flip, rng=rng)
        sides = tuple(augment.short_sides) or (min(self._size),)
        long_side = augment.long_side or _FAR
        return cropped_view(image.size, self._size, sides, long_side, flip=flip, rng=rng)

    def _targets(self, record: Record, size: tuple[int, int], view: View) -> Example:
        room = self._size, self._max_segments
        if self._kind == INSTANCE:
            return view_instances(record["instances"], size, view, *room)
        if self._kind == PANOPTIC:
            return view_segments(record["segments"], view, *room, keep_empty=True)
        return view_segments(class_segments(label_map_of(record)), view, *room)
