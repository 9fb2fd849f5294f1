"""Turns records into examples for detection: images on a canvas, with their objects."""

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from tokenvit_jax.data import stuff_maps
from tokenvit_jax.data.box_transforms import (
    MASK_SIDE,
    View,
    random_view,
    view_boxes,
    view_masks,
    view_pixels,
)
from tokenvit_jax.data.dense_transforms import pad
from tokenvit_jax.data.images import with_channels
from tokenvit_jax.data.record import IGNORED, Instances, Record, Spec
from tokenvit_jax.data.segment_transforms import jittered_view
from tokenvit_jax.errors import UserError
from tokenvit_jax.tasks.detection.settings import (
    canvas,
    eval_canvas,
    long_side,
    train_short_sides,
)
from tokenvit_jax.tasks.detection.views import eval_views, place_views, view_specs

Example = dict[str, np.ndarray]
NO_OBJECT = -1  # class at places of the padded objects that hold none


class DetectionExamples:
    """Images with objects.

    An example holds the resized image at the top left of its canvas, `image` (H, W, C) uint8, on
    the mean colour, and `image_size` (2,) int32, its height and width. In training, it also holds
    the M largest objects: `boxes` (M, 4) float32 [x1 y1 x2 y2, pixels of the canvas], `classes`
    (M,) int32, `NO_OBJECT` at the end, `objects_left_out` () int32, the number of the others, and
    for detectors with masks `masks` (M, MASK_SIDE, MASK_SIDE / 8) uint8, rows of bits in the frame
    of the box. For detectors with a semantic branch, it holds `stuff_map` (ceil(H / 8),
    ceil(W / 8)) uint8, the class of every eighth pixel, or `IGNORED`. Crowds are background. In
    evaluation, it holds `original_size` (2,) int32, and the canvas is a square that has room for
    both orientations; with several views, the arrays of every `EvalView`.

    Args:
      config: provides `image_size`, `in_channels`, `data.normalization` and the entries of
        detection.
      has_masks: whether training reads masks.
      num_stuff: classes of the semantic branch; 0: there is none.
      train: whether the examples are for training.

    Attributes:
      canvases: in training, height and width of the canvas of images that are not higher than
        wide, and of the others if that differs.
    """

    def __init__(self, config: ConfigDict, *, has_masks: bool, train: bool, num_stuff: int = 0):
        self._train, self._channels = train, config.in_channels
        self._eval_canvas, self._long_side = eval_canvas(config), long_side(config)
        self._sides, self._augment = train_short_sides(config), config.augment
        low, high = canvas(config)
        self.canvases = ((low, high), (high, low)) if train and low < high else ()
        self._views = eval_views(config)
        if not train:
            self.specs = view_specs(self._views, self._channels)
            self.specs["original_size"] = Spec((2,), np.int32)
            return
        height, width = low, high
        self.specs = {
            "image": Spec((height, width, self._channels), np.uint8),
            "image_size": Spec((2,), np.int32),
        }
        self._max_objects = count = config.data.max_objects
        self.specs |= {
            "boxes": Spec((count, 4), np.float32),
            "classes": Spec((count,), np.int32),
            "objects_left_out": Spec((), np.int32),
        }
        if has_masks:
            self.specs["masks"] = Spec((count, MASK_SIDE, MASK_SIDE // 8), np.uint8)
        self._num_stuff = num_stuff
        if num_stuff:
            self.specs[stuff_maps.FIELD] = Spec(stuff_maps.map_shape((height, width)), np.uint8)

    def __call__(self, record: Record, rng: np.random.Generator | None) -> Example:
        """See :class:`tokenvit_jax.data.record.Examples`."""
        image = with_channels(record["image"], self._channels)
        if not self._train:
            original = np.array(image.size[::-1], np.int32)
            return place_views(self._views, image, square=True) | {"original_size": original}
        view = self._draw(image, rng)
        pixels = view_pixels(image, view)
        canvas = pad(pixels, (*self._canvas(image), self._channels), self._eval_canvas.fill)
        example = {"image": canvas, "image_size": np.array(pixels.shape[:2], np.int32)}
        if self._num_stuff:
            example[stuff_maps.FIELD] = self._stuff(record, view, self._canvas(image))
        return example | self._objects(record["instances"], image.size, view)

    def empty(self) -> Example:
        """See :class:`tokenvit_jax.data.record.Examples`."""
        example = {name: np.zeros(*spec) for name, spec in self.specs.items()}
        for name in [name for name in example if f"{name}_size" in example]:
            example[f"{name}_size"][:] = example[name].shape[:2]
        if self._train:
            example["classes"][:] = NO_OBJECT
            if self._num_stuff:
                example[stuff_maps.FIELD][:] = IGNORED
        else:
            example["original_size"][:] = example["image_size"]
        return example

    def _draw(self, image: Image.Image, rng: np.random.Generator) -> View:
        augment, canvas = self._augment, self._canvas(image)
        if augment.jitter:
            return jittered_view(image.size, canvas, augment.jitter, flip=augment.flip, rng=rng)
        return random_view(
            image.size, self._sides, self._long_side, room=canvas[::-1],
            crop=augment.detr_crop, flip=augment.flip, rng=rng,
        )  # fmt: skip

    def _stuff(self, record: Record, view: View, canvas: tuple[int, int]) -> np.ndarray:
        if stuff_maps.FIELD not in record:
            raise UserError(
                "it has no stuff_map, which the head reads: the dataset was prepared without maps "
                "of stuff; prepare it with them into another folder, or choose another config.head"
            )
        return stuff_maps.view_stuff(record[stuff_maps.FIELD], view, canvas, self._num_stuff)

    def _canvas(self, image: Image.Image) -> tuple[int, int]:
        """Returns height and width of the canvas of an image."""
        size = self.specs["image"].shape[:2]
        return size[::-1] if image.height > image.width else size

    def _objects(self, instances: Instances, size: tuple[int, int], view: View) -> Example:
        boxes = view_boxes(instances.boxes, view)
        sides = boxes[:, 2:] - boxes[:, :2]
        areas = np.where(instances.crowd, 0.0, sides.prod(1))
        found = np.flatnonzero(areas > 0)
        kept = np.sort(found[np.argsort(-areas[found], kind="stable")[: self._max_objects]])
        example = self.empty()
        for name in ("image", "image_size", stuff_maps.FIELD):
            example.pop(name, None)
        example["boxes"][: len(kept)] = boxes[kept]
        example["classes"][: len(kept)] = instances.classes[kept]
        example["objects_left_out"] = np.array(len(found) - len(kept), np.int32)
        if "masks" in example:
            masks = [instances.masks[i] for i in kept]
            example["masks"][: len(kept)] = view_masks(masks, size, boxes[kept], view)
        return example
