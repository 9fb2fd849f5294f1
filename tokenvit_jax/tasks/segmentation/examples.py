"""Turns records into examples for segmentation: crops or buffers, with label maps."""

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from tokenvit_jax.config import input_shape
from tokenvit_jax.data.dense_transforms import (
    Pixel,
    fitted_size,
    pad,
    resize_image,
    train_scene,
)
from tokenvit_jax.data.images import mean_pixel, with_channels
from tokenvit_jax.data.record import IGNORED, Record, Spec
from tokenvit_jax.errors import UserError
from tokenvit_jax.tasks.segmentation.settings import (
    check_scales,
    eval_size,
    scaled_sides,
    short_side,
)

Example = dict[str, np.ndarray]


class ImageViews:
    """Resizes images of any size for evaluation, once for each of the scales.

    Sizes at other scales follow from the size at scale 1, so that images of one size have equal
    sizes at all scales. The pixels always come from the image itself.

    Args:
      config: provides `image_size`, `in_channels`, `inference`, `data.eval_size`,
        `data.eval_short_side` and `data.normalization`.

    Attributes:
      shapes: scale -> shape of the buffer (H, W, C), which holds every image at the top left; the
        first scale is 1.

    Raises:
      UserError: at one of the scales, images are smaller than a window.
    """

    def __init__(self, config: ConfigDict):
        check_scales(config)
        self._config, self._fill = config, _mean_pixel(config)
        self._size = eval_size(config)
        self.shapes = {
            scale: (*scaled_sides(config, self._size, scale), config.in_channels)
            for scale in dict.fromkeys((1.0, *map(float, config.inference.scales)))
        }

    def __call__(self, image: Image.Image) -> dict[float, np.ndarray]:
        """Returns scale -> the resized image (h, w, C) uint8."""
        image = with_channels(image, self.shapes[1.0][-1])
        size = fitted_size(*image.size, short_side(self._config), *self._size)
        sides = scaled_sides(self._config, size[::-1], 1.0)
        views = {}
        for scale in self.shapes:
            height, width = scaled_sides(self._config, sides, scale)
            views[scale] = resize_image(image, width, height)
        return views

    def in_buffer(self, scale: float, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the buffer (H, W, C) with an image, and the image's size (2,) int32."""
        size = np.array(pixels.shape[:2], np.int32)
        return pad(pixels, self.shapes[scale], self._fill), size


def image_key(scale: float) -> str:
    """Returns the name of the image at one of the scales in an example."""
    return "image" if scale == 1 else f"image_{float(scale)}"


def size_key(scale: float) -> str:
    """Returns the name of the image's size at one of the scales in an example."""
    return f"{image_key(scale)}_size"


class SegmentationExamples:
    """Images with label maps.

    A training example is an augmented crop: `image` (H, W, C) uint8 and `label` (H, W) uint8,
    `IGNORED` on padding. An evaluation example holds the resized image at the top left of a buffer
    of `data.eval_size`: `image` (H, W, C) uint8 and `image_size` (2,) int32, its height and width
    in the buffer; and so for every other scale, such as `image_0.5` and `image_0.5_size`. It also
    holds the label map, at its own size, at the top left of a buffer of `data.label_size`: `label`
    (h, w) uint8, `IGNORED` outside the map, and `label_size` (2,) int32.

    Args:
      config: provides `image_size`, `in_channels` and `data.normalization`; in training
        `augment`, in evaluation `inference`, `data.eval_size`, `data.eval_short_side` and
        `data.label_size`.
      train: whether the examples are for training.
    """

    def __init__(self, config: ConfigDict, *, train: bool):
        self._train = train
        self._shape = input_shape(config)
        self._augment = config.augment
        self._fill = _mean_pixel(config)
        if train:
            self.specs = {
                "image": Spec(self._shape, np.uint8),
                "label": Spec(self._shape[:2], np.uint8),
            }
        else:
            self._views = ImageViews(config)
            self.specs = {}
            for scale, shape in self._views.shapes.items():
                self.specs[image_key(scale)] = Spec(shape, np.uint8)
                self.specs[size_key(scale)] = Spec((2,), np.int32)
            label_size = config.data.label_size
            label_size = tuple(label_size) if any(label_size) else eval_size(config)
            self.specs |= {
                "label": Spec(label_size, np.uint8), "label_size": Spec((2,), np.int32)
            }  # fmt: skip

    def __call__(self, record: Record, rng: np.random.Generator | None) -> Example:
        """See :class:`tokenvit_jax.data.record.Examples`.

        Raises:
          UserError: the label map is larger than its buffer.
        """
        if self._train:
            image = with_channels(record["image"], self._shape[-1])
            image, label = train_scene(
                image, record["label_map"], self._shape[:2], self._augment, self._fill, rng
            )
            return {"image": image, "label": label}
        return self._eval_example(record)

    def empty(self) -> Example:
        """See :class:`tokenvit_jax.data.record.Examples`."""
        example = {name: np.zeros(*spec) for name, spec in self.specs.items()}
        example["label"][:] = IGNORED
        # The sizes of the whole buffers: with zeros, code that resizes by them would divide by 0.
        for name in self.specs:
            if f"{name}_size" in example:
                example[f"{name}_size"][:] = self.specs[name].shape[:2]
        return example

    def _eval_example(self, record: Record) -> Example:
        label, shape = record["label_map"], self.specs["label"].shape
        if np.any(np.array(label.shape) > shape):
            raise UserError(
                f"label map of {_by(label.shape)} pixels does not fit into {_by(shape)}; valid: "
                "config.data.label_size=(height, width) of the largest label map of the split"
            )
        example = {}
        for scale, pixels in self._views(record["image"]).items():
            buffer = self._views.in_buffer(scale, pixels)
            example[image_key(scale)], example[size_key(scale)] = buffer
        return example | {
            "label": pad(label, shape, IGNORED),
            "label_size": np.array(label.shape, np.int32),
        }


def _mean_pixel(config: ConfigDict) -> Pixel:
    return mean_pixel(config.data.normalization, config.in_channels)


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
