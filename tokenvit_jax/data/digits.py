"""The embedded digits: images with a class each, in scikit-learn's package."""

import numpy as np
from PIL import Image


class DigitsSource:
    """scikit-learn's handwritten digits: 8x8 pixels, 17 grey levels.

    Every fifth image of the list sorted by class is for the test, so that both splits have all
    classes in equal parts.
    """

    def __init__(self, split: str):
        from sklearn.datasets import load_digits  # takes a second; only this dataset needs it

        digits = load_digits()
        order = np.argsort(digits.target, kind="stable")
        is_test = np.arange(len(order)) % 5 == 0
        indices = np.sort(order[is_test if split == "test" else ~is_test])
        self._images = np.rint(digits.images[indices] * (255 / 16)).astype(np.uint8)
        self._labels = digits.target[indices]

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """See :class:`tokenvit_jax.data.sources.Source`."""
        return Image.fromarray(self._images[index]).convert("RGB"), int(self._labels[index])
