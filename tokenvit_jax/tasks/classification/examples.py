"""Turns records into examples for classification: crops, classes and labels of their cells."""

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from tokenvit_jax.config import input_shape
from tokenvit_jax.data.datasets import open_split
from tokenvit_jax.data.images import (
    draw_view,
    eval_image,
    train_image,
    whole_image,
    with_channels,
)
from tokenvit_jax.data.record import DatasetInfo, Record, Spec
from tokenvit_jax.data.token_labels import TokenLabelFiles

Example = dict[str, np.ndarray]


def eval_crop(config: ConfigDict, info: DatasetInfo) -> float:
    """Returns the height of the centre crop over the height that the resized image covers.

    Args:
      config: reads `data.eval_crop`.
      info: facts about the dataset; `center_crop` says whether the crop is used.
    """
    return config.data.eval_crop if info.center_crop else 1.0


class ClassificationExamples:
    """Images with one class each: `image` (H, W, C) uint8 and `label` () int32.

    In training the image is an augmented crop; `token_labels.files` adds `token_classes` and
    `token_scores`, see :class:`tokenvit_jax.data.token_labels.TokenLabelFiles`. In evaluation the
    image is the centre crop, or the whole image if the dataset has `center_crop=False`.

    Args:
      config: provides `image_size` and `in_channels`; in training `augment` and `token_labels`, in
        evaluation `data.eval_crop` and `data.eval_interpolation`.
      info: facts about the dataset; label files must have as many records as its training split.
      train: whether the examples are for training.

    Raises:
      UserError: the label files do not fit the dataset.
    """

    def __init__(self, config: ConfigDict, info: DatasetInfo, *, train: bool):
        self._shape = input_shape(config)
        self._augment = config.augment
        self._crop = eval_crop(config, info)
        self._interpolation = config.data.eval_interpolation
        self._train = train
        self._token_labels = None
        self.specs = {
            "image": Spec(self._shape, np.uint8),
            "label": Spec((), np.int32),
        }
        labels = config.token_labels
        if train and labels.weight and labels.files:
            # The facts about a folder do not count its images.
            num_records = info.splits.get(info.train_split)
            num_records = num_records or len(open_split(config, info.train_split))
            self._token_labels = TokenLabelFiles(labels.files, num_records, info.num_classes)
            self.specs |= self._token_labels.specs(self._shape[:2])

    def __call__(self, record: Record, rng: np.random.Generator | None) -> Example:
        """See :class:`tokenvit_jax.data.record.Examples`."""
        if self._train:
            return self._train_example(record, rng)
        pixels = eval_image(self._image(record), self._shape[:2], self._crop, self._interpolation)
        return {"image": pixels, "label": np.int32(record["label"])}

    def empty(self) -> Example:
        """See :class:`tokenvit_jax.data.record.Examples`."""
        return {name: np.zeros(*spec) for name, spec in self.specs.items()}

    def _image(self, record: Record) -> Image.Image:
        return with_channels(record["image"], self._shape[-1])

    def _train_example(self, record: Record, rng: np.random.Generator) -> Example:
        image, size = self._image(record), self._shape[:2]
        view = draw_view(image.size, size, self._augment, rng)
        pixels = train_image(image, size, self._augment, rng, view)
        example = {"image": pixels, "label": np.int32(record["label"])}
        if self._token_labels:
            example |= self._token_labels.read(record["id"], view, image.size, size)
        return example


class WholeImages(ClassificationExamples):
    """Whole images, squeezed into the shape of the input, for `label`."""

    def __init__(self, config: ConfigDict, info: DatasetInfo):
        super().__init__(config, info, train=False)

    def __call__(self, record: Record, rng: np.random.Generator | None) -> Example:
        """See :class:`tokenvit_jax.data.record.Examples`."""
        del rng
        pixels = whole_image(self._image(record), self._shape[:2])
        return {"image": pixels, "label": np.int32(record["label"])}
