"""Turns records into examples for classification: crops, classes and labels of their cells."""

import numpy as np
from ml_collections import ConfigDict

from tokenvit_jax.data.datasets import open_split
from tokenvit_jax.data.images import draw_view, eval_image, train_image, whole_image
from tokenvit_jax.data.record import DatasetInfo, Record, Spec
from tokenvit_jax.data.token_labels import TokenLabelFiles, grid_size

Example = dict[str, np.ndarray]


def eval_crop(config: ConfigDict, info: DatasetInfo) -> float:
    """Returns the side of the centre crop over the resized shorter side; 1: the whole side.

    Args:
      config: reads `data.eval_crop`.
      info: facts about the dataset; `center_crop` says whether the crop is used.
    """
    return config.data.eval_crop if info.center_crop else 1.0


class ClassificationExamples:
    """Images with one class each: `image` (S, S, 3) uint8 and `label` () int32.

    In training the image is an augmented crop; `token_labels.files` adds `token_classes` and
    `token_scores`, see :class:`tokenvit_jax.data.token_labels.TokenLabelFiles`. In evaluation the
    image is the centre crop, or the whole image if the dataset has `center_crop=False`.

    Args:
      config: provides `image_size`; in training `augment` and `token_labels`, in evaluation
        `data.eval_crop` and `data.eval_interpolation`.
      info: facts about the dataset; label files must have as many records as its training split.
      train: whether the examples are for training.

    Raises:
      UserError: the label files do not fit the dataset.
    """

    def __init__(self, config: ConfigDict, info: DatasetInfo, *, train: bool):
        self._size = config.image_size
        self._augment = config.augment
        self._crop = eval_crop(config, info)
        self._interpolation = config.data.eval_interpolation
        self._train = train
        self._token_labels = None
        self.specs = {
            "image": Spec((self._size, self._size, 3), np.uint8),
            "label": Spec((), np.int32),
        }
        labels = config.token_labels
        if train and labels.weight and labels.files:
            # The facts about a folder do not count its images.
            num_records = info.splits.get(info.train_split)
            num_records = num_records or len(open_split(config, info.train_split))
            self._token_labels = TokenLabelFiles(labels.files, num_records, info.num_classes)
            self.specs |= self._token_labels.specs(grid_size(self._size))

    def __call__(self, record: Record, rng: np.random.Generator | None) -> Example:
        """See :class:`tokenvit_jax.data.record.Examples`."""
        if self._train:
            return self._train_example(record, rng)
        pixels = eval_image(record["image"], self._size, self._crop, self._interpolation)
        return {"image": pixels, "label": np.int32(record["label"])}

    def empty(self) -> Example:
        """See :class:`tokenvit_jax.data.record.Examples`."""
        return {name: np.zeros(*spec) for name, spec in self.specs.items()}

    def _train_example(self, record: Record, rng: np.random.Generator) -> Example:
        image = record["image"]
        view = draw_view(*image.size, self._augment, rng)
        pixels = train_image(image, self._size, self._augment, rng, view)
        example = {"image": pixels, "label": np.int32(record["label"])}
        if self._token_labels:
            grid = grid_size(self._size)
            example |= self._token_labels.read(record["id"], view, *image.size, grid)
        return example


class WholeImages(ClassificationExamples):
    """Whole images, squeezed into squares, for `label`."""

    def __init__(self, config: ConfigDict, info: DatasetInfo):
        super().__init__(config, info, train=False)

    def __call__(self, record: Record, rng: np.random.Generator | None) -> Example:
        """See :class:`tokenvit_jax.data.record.Examples`."""
        del rng
        pixels = whole_image(record["image"], self._size)
        return {"image": pixels, "label": np.int32(record["label"])}
