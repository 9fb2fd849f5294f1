"""From a record to an example of a batch: what differs between the tasks.

An example is made by a function of its record's index, image and label, and, in training, of a
generator. Its `shapes` are those of the large arrays, of type uint8.
"""

from typing import NamedTuple, Protocol

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from tokenvit_jax.data import dense_transforms
from tokenvit_jax.data.label_maps import IGNORED
from tokenvit_jax.data.sources import DatasetInfo, LabelMapSource, Source
from tokenvit_jax.data.token_labels import TokenLabelFiles, grid_size
from tokenvit_jax.data.transforms import (
    NORMALIZATIONS,
    draw_view,
    eval_image,
    train_image,
    whole_image,
)
from tokenvit_jax.data.workers import Shapes
from tokenvit_jax.errors import UserError

Example = dict[str, np.ndarray]


class TrainMaker(Protocol):
    """Makes examples for training."""

    shapes: Shapes

    def __call__(
        self, index: int, image: Image.Image, label: int | np.ndarray, rng: np.random.Generator
    ) -> Example:
        """Returns an augmented example."""


class EvalMaker(Protocol):
    """Makes examples for evaluation."""

    shapes: Shapes

    def __call__(self, index: int, image: Image.Image, label: int | np.ndarray) -> Example:
        """Returns the example of a record."""

    def empty(self) -> Example:
        """Returns an example of the same shapes that stands for no record."""


class TrainImages:
    """A crop with its class, and the labels of its cells, if any."""

    def __init__(self, config: ConfigDict, info: DatasetInfo, source: Source):
        self._size = config.image_size
        self._augment = config.augment
        self._token_labels = None
        if config.token_labels.weight and config.token_labels.files:
            files = config.token_labels.files
            self._token_labels = TokenLabelFiles(files, len(source), info.num_classes)
        self.shapes = {"image": (self._size, self._size, 3)}

    def __call__(
        self, index: int, image: Image.Image, label: int, rng: np.random.Generator
    ) -> Example:
        view = draw_view(*image.size, self._augment, rng)
        pixels = train_image(image, self._size, self._augment, rng, view)
        example = {"image": pixels, "label": np.int32(label)}
        if self._token_labels:
            grid = grid_size(self._size)
            example |= self._token_labels.read(index, view, *image.size, grid)
        return example


class EvalImages:
    """The centre of an image with its class; `whole`: all of it, squeezed into a square."""

    def __init__(
        self, config: ConfigDict, info: DatasetInfo, source: Source, *, whole: bool = False
    ):
        self._size = config.image_size
        self._crop = config.data.eval_crop if info.center_crop else 1.0
        self._whole = whole
        self.shapes = {"image": (self._size, self._size, 3)}

    def __call__(self, index: int, image: Image.Image, label: int) -> Example:
        if self._whole:
            pixels = whole_image(image, self._size)
        else:
            pixels = eval_image(image, self._size, self._crop)
        return {"image": pixels, "label": np.int32(label)}

    def empty(self) -> Example:
        return {"image": np.zeros(self.shapes["image"], np.uint8), "label": np.int32(0)}


class TrainScenes:
    """A crop with its label map."""

    def __init__(self, config: ConfigDict, info: DatasetInfo, source: LabelMapSource):
        self._size = config.image_size
        self._augment = config.augment
        self._fill = _mean_pixel(config)
        self.shapes = {"image": (self._size, self._size, 3), "label": (self._size, self._size)}

    def __call__(
        self, index: int, image: Image.Image, label: np.ndarray, rng: np.random.Generator
    ) -> Example:
        image, label = dense_transforms.train_scene(
            image, label, self._size, self._augment, self._fill, rng
        )
        return {"image": image, "label": label}


class ImageBuffer:
    """Resizes images of any size into the top left of a buffer of one shape.

    Args:
        config: reads `image_size`, `data.eval_size`, `data.eval_short_side` and
            `data.normalization`.
    """

    def __init__(self, config: ConfigDict):
        square = (config.image_size, config.image_size)
        size = tuple(config.data.eval_size) if any(config.data.eval_size) else square
        self._short_side = config.data.eval_short_side or config.image_size
        self._fill = _mean_pixel(config)
        self.shape = (*size, 3)

    def __call__(self, image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
        """Returns the buffer (H, W, 3) uint8 and the rows and columns that are image (2,) int32."""
        pixels = dense_transforms.fit_image(image, self._short_side, *self.shape[:2])
        size = np.array(pixels.shape[:2], np.int32)
        return dense_transforms.pad(pixels, self.shape, self._fill), size


class EvalScenes:
    """A resized image and its label map as it is, each at the top left of a buffer."""

    def __init__(self, config: ConfigDict, info: DatasetInfo, source: LabelMapSource):
        self._source = source
        self._buffer = ImageBuffer(config)
        image_size = self._buffer.shape[:2]
        label_size = tuple(config.data.label_size) if any(config.data.label_size) else image_size
        self.shapes = {"image": self._buffer.shape, "label": label_size}

    def __call__(self, index: int, image: Image.Image, label: np.ndarray) -> Example:
        if np.any(np.array(label.shape) > self.shapes["label"]):
            raise UserError(
                f"{self._source.name(index)}: label map of {_by(label.shape)} pixels does not fit "
                f"into {_by(self.shapes['label'])}; valid: config.data.label_size=(height, width) "
                "of the largest label map of the split"
            )
        pixels, size = self._buffer(image)
        return {
            "image": pixels,
            "image_size": size,
            "label": dense_transforms.pad(label, self.shapes["label"], IGNORED),
            "label_size": np.array(label.shape, np.int32),
        }

    def empty(self) -> Example:
        # Of the whole buffer's size: whoever resizes by the sizes need not divide by zero.
        return {
            "image": np.zeros(self.shapes["image"], np.uint8),
            "image_size": np.array(self.shapes["image"][:2], np.int32),
            "label": np.full(self.shapes["label"], IGNORED, np.uint8),
            "label_size": np.array(self.shapes["label"], np.int32),
        }


class Makers(NamedTuple):
    """The makers of a task: of a config, the facts about its dataset, and a split."""

    train: type[TrainMaker]
    evaluate: type[EvalMaker]


MAKERS = {
    "classification": Makers(TrainImages, EvalImages),
    "segmentation": Makers(TrainScenes, EvalScenes),
}


def _mean_pixel(config: ConfigDict) -> dense_transforms.Pixel:
    """The colour that normalisation turns into zeros, nearly."""
    mean, _ = NORMALIZATIONS[config.data.normalization]
    return tuple(round(255 * level) for level in mean)


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
