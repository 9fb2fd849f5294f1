"""Turns records into examples for depth: crops, or resized frames, with depth maps."""

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from tokenvit_jax.config import input_shape
from tokenvit_jax.data.dense_transforms import pad
from tokenvit_jax.data.depth_transforms import frame_box, train_depth_scene
from tokenvit_jax.data.images import mean_pixel, resize_pixels, with_channels
from tokenvit_jax.data.record import Record, Spec
from tokenvit_jax.errors import UserError
from tokenvit_jax.metrics.depth import CROPS, comparable
from tokenvit_jax.tasks.depth.settings import depth_size, eval_size

Example = dict[str, np.ndarray]


class DepthExamples:
    """Images with depth maps.

    A training example is an augmented crop: `image` (H, W, C) uint8 and `depth` (H, W) float32
    [metres], 0 where unknown. An evaluation example holds the frame of the image, resized to
    `data.eval_size`: `image` (H, W, C) uint8; the depth map, at its own size, at the top left of a
    buffer of `data.depth_size`: `depth` (h, w) float32 [metres], 0 at all pixels that are not
    compared; and the place of the frame in the depth map: `frame` (4,) int32, left, top, right,
    bottom.

    Args:
      config: provides `image_size`, `in_channels` and `data.normalization`; in training `augment`,
        in evaluation `data.eval_size`, `data.depth_size`, `data.frame`, `depth.limits` and
        `depth.crop`.
      train: whether the examples are for training.
    """

    def __init__(self, config: ConfigDict, *, train: bool):
        self._train = train
        self._channels = config.in_channels
        if train:
            self._size, self._augment = input_shape(config)[:2], config.augment
            self._fill = mean_pixel(config.data.normalization, self._channels)
            self.specs = {"depth": Spec(self._size, np.float32)}
        else:
            self._size, self._frame = eval_size(config), config.data.frame
            self._limits, self._crop = tuple(config.depth.limits), config.depth.crop
            self.specs = {
                "depth": Spec(depth_size(config), np.float32),
                "frame": Spec((4,), np.int32),
            }
        self.specs["image"] = Spec((*self._size, self._channels), np.uint8)

    def __call__(self, record: Record, rng: np.random.Generator | None) -> Example:
        """See :class:`tokenvit_jax.data.record.Examples`.

        Raises:
          UserError: the depth map has another size than the image, or does not fit into its buffer.
        """
        image, depth = with_channels(record["image"], self._channels), record["depth"]
        if depth.shape[::-1] != image.size:
            raise UserError(
                f"depth map has {_by(depth.shape[::-1])} pixels, its image {_by(image.size)} "
                "(width x height)"
            )
        if self._train:
            image, depth = train_depth_scene(
                image, depth, self._size, self._augment, self._fill, rng
            )
            return {"image": image, "depth": depth}
        return self._eval_example(image, depth)

    def empty(self) -> Example:
        """See :class:`tokenvit_jax.data.record.Examples`."""
        example = {name: np.zeros(*spec) for name, spec in self.specs.items()}
        if not self._train:  # a frame without area would divide by 0
            example["frame"][2:] = self.specs["depth"].shape[::-1]
        return example

    def _eval_example(self, image: Image.Image, depth: np.ndarray) -> Example:
        buffer = self.specs["depth"].shape
        if np.any(np.array(depth.shape) > buffer):
            raise UserError(
                f"depth map of {_by(depth.shape)} pixels does not fit into {_by(buffer)}; valid: "
                "config.data.depth_size=(height, width) of the largest depth map of the split"
            )
        frame = frame_box(self._frame, *depth.shape)
        kept = comparable(depth, self._limits, [CROPS[self._crop](*depth.shape), frame])
        return {
            "image": resize_frame(image, frame, self._size),
            "depth": pad(kept, buffer, 0),
            "frame": np.array(frame, np.int32),
        }


def resize_frame(
    image: Image.Image, frame: tuple[int, int, int, int], size: tuple[int, int]
) -> np.ndarray:
    """Returns a part of an image, resized to (height, width) with a bicubic filter, uint8."""
    return resize_pixels(image, size[::-1], Image.Resampling.BICUBIC, crop=frame)


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
