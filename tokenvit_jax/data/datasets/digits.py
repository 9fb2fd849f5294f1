"""The embedded digits: one class per image, from scikit-learn's package."""

import importlib.util
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from tokenvit_jax.data.record import DatasetInfo, Record

INFO = DatasetInfo(
    name="digits",
    splits={"train": 1437, "test": 360},
    train_split="train",
    eval_split="test",
    fields=frozenset({"image", "label"}),
    num_classes=10,
    classes=tuple("0123456789"),
)


def open_split(config: ConfigDict, split: str) -> "DigitsSource":
    """Opens a split for reading; `config` is not used."""
    del config
    return DigitsSource(split)


def installed_file(name: str) -> Path:
    """Returns the path of a file in scikit-learn's `datasets`, whose import takes seconds."""
    (package,) = importlib.util.find_spec("sklearn").submodule_search_locations
    return Path(package) / "datasets" / name


class DigitsSource:
    """scikit-learn's handwritten digits: 8 x 8 pixels, 17 grey levels.

    Every fifth image of the list sorted by class belongs to the test split, so that both splits
    hold the classes in the same proportions.
    """

    def __init__(self, split: str):
        rows = np.loadtxt(installed_file("data/digits.csv.gz"), delimiter=",").astype(np.int64)
        images, labels = rows[:, :-1].reshape(-1, 8, 8), rows[:, -1]
        order = np.argsort(labels, kind="stable")
        is_test = np.arange(len(order)) % 5 == 0
        indices = np.sort(order[is_test if split == "test" else ~is_test])
        self._split = split
        self._images = np.rint(images[indices] * (255 / 16)).astype(np.uint8)
        self._labels = labels[indices]

    def __len__(self) -> int:
        return len(self._labels)

    def name(self, index: int) -> str:
        """See :class:`tokenvit_jax.data.record.Source`."""
        return f"digits split {self._split!r}, record {index}"

    def read(self, index: int) -> Record:
        """See :class:`tokenvit_jax.data.record.Source`."""
        image = Image.fromarray(self._images[index]).convert("RGB")
        return Record(id=index, image=image, label=int(self._labels[index]))
