"""Turns records into examples for segmentation: crops or buffers, with label maps."""

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from tokenvit_jax.config import input_shape
from tokenvit_jax.data.dense_transforms import Pixel, fit_image, pad, train_scene
from tokenvit_jax.data.images import mean_pixel, with_channels
from tokenvit_jax.data.record import IGNORED, Record, Spec
from tokenvit_jax.errors import UserError

Example = dict[str, np.ndarray]


class ImageBuffer:
    """Resizes images of any size into the top left corner of a buffer of fixed shape.

    Args:
      config: provides `image_size`, `in_channels`, `data.eval_size`, `data.eval_short_side` and
        `data.normalization`.

    Attributes:
      shape: shape of the buffer, (H, W, C).
    """

    def __init__(self, config: ConfigDict):
        *size, channels = input_shape(config)
        self._short_side = config.data.eval_short_side or min(size)
        self._fill = _mean_pixel(config)
        self.shape = (*(config.data.eval_size if any(config.data.eval_size) else size), channels)

    def __call__(self, image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
        """Returns the buffer (H, W, C) uint8 and the image's height and width in it (2,) int32."""
        image = with_channels(image, self.shape[-1])
        pixels = fit_image(image, self._short_side, *self.shape[:2])
        size = np.array(pixels.shape[:2], np.int32)
        return pad(pixels, self.shape, self._fill), size


class SegmentationExamples:
    """Images with label maps.

    A training example is an augmented crop: `image` (H, W, C) uint8 and `label` (H, W) uint8,
    `IGNORED` on padding. An evaluation example holds the resized image at the top left of a buffer
    of `data.eval_size`: `image` (H, W, C) uint8 and `image_size` (2,) int32, its height and width
    in the buffer. It also holds the label map, at its own size, at the top left of a buffer of
    `data.label_size`: `label` (h, w) uint8, `IGNORED` outside the map, and `label_size` (2,) int32.

    Args:
      config: provides `image_size`, `in_channels` and `data.normalization`; in training
        `augment`, in evaluation `data.eval_size`, `data.eval_short_side` and `data.label_size`.
      train: whether the examples are for training.
    """

    def __init__(self, config: ConfigDict, *, train: bool):
        self._train = train
        self._shape = input_shape(config)
        self._augment = config.augment
        self._fill = _mean_pixel(config)
        self._buffer = ImageBuffer(config)
        if train:
            self.specs = {
                "image": Spec(self._shape, np.uint8),
                "label": Spec(self._shape[:2], np.uint8),
            }
        else:
            image_size = self._buffer.shape[:2]
            label_size = config.data.label_size
            self.specs = {
                "image": Spec(self._buffer.shape, np.uint8),
                "image_size": Spec((2,), np.int32),
                "label": Spec(tuple(label_size) if any(label_size) else image_size, np.uint8),
                "label_size": Spec((2,), np.int32),
            }

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
        for name in ("image", "label"):
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
        pixels, size = self._buffer(record["image"])
        return {
            "image": pixels,
            "image_size": size,
            "label": pad(label, shape, IGNORED),
            "label_size": np.array(label.shape, np.int32),
        }


def _mean_pixel(config: ConfigDict) -> Pixel:
    return mean_pixel(config.data.normalization, config.in_channels)


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
