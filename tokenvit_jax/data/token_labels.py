"""Reads labels for the cells of an image from files that :mod:`tokenvit_jax.label` writes.

References:
  Jiang et al., "All Tokens Matter", which crops precomputed label maps with RoIAlign, following Yun
  et al., "Re-labeling ImageNet".
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tokenvit_jax.config import height_and_width
from tokenvit_jax.data.images import View
from tokenvit_jax.data.record import Spec
from tokenvit_jax.errors import UserError

CELL_SIZE = 32  # stride of the last map of the backbones [pixels]
FILES = ("classes.npy", "scores.npy")


def grid_size(size: int | Sequence[int]) -> tuple[int, int]:
    """Returns rows and columns of the last map for images of a height and width [pixels]."""
    rows, columns = (-(-side // CELL_SIZE) for side in height_and_width(size))
    return rows, columns


class TokenLabelFiles:
    """Label maps, one per record of a split, which stay on disk until they are read.

    `classes.npy` (records, gh, gw, K) holds integer classes, `scores.npy` of the same shape their
    probabilities, float16 or float32. The grid (gh, gw) covers the whole, uncropped image.

    Args:
      folder: folder with both files.
      num_records: number of records in the split.
      num_classes: valid classes are 0 to num_classes - 1.

    Raises:
      UserError: a file is missing, or has another shape or type.
    """

    def __init__(self, folder: str, num_records: int, num_classes: int):
        self._args = folder, num_records, num_classes
        self._folder = Path(os.path.expanduser(folder))
        self._num_classes = num_classes
        self._classes, self._scores = (_open(self._folder / name) for name in FILES)
        shape = self._classes.shape
        if len(shape) != 4 or shape[0] != num_records or self._scores.shape != shape:
            raise UserError(
                f"token_labels.files={folder}: the shapes of classes.npy, {shape}, and scores.npy, "
                f"{self._scores.shape}, must both be ({num_records} records, height, width, "
                "classes per cell)"
            )
        if self._classes.dtype.kind not in "iu" or self._scores.dtype not in ("float16", "float32"):
            raise UserError(
                f"token_labels.files={folder}: classes.npy is {self._classes.dtype} and scores.npy "
                f"is {self._scores.dtype}; valid: integers, and float16 or float32"
            )

    def __reduce__(self):
        # Another process maps the files itself; pickling the arrays would copy them.
        return TokenLabelFiles, self._args

    def specs(self, size: tuple[int, int]) -> dict[str, Spec]:
        """Returns the shapes and types of the arrays that :meth:`read` returns."""
        shape = *grid_size(size), 4 * self._classes.shape[-1]
        return {"token_classes": Spec(shape, np.int32), "token_scores": Spec(shape, np.float32)}

    def read(
        self, record: int, view: View, image_size: tuple[int, int], size: tuple[int, int]
    ) -> dict[str, np.ndarray]:
        """Returns the labels for the part of a record that a training example shows.

        Args:
          record: index in the split.
          view: the part of the image that the example shows.
          image_size: width and height of the record's image [pixels], as Pillow gives them.
          size: height and width of the example [pixels].

        Returns:
          `token_classes` int32 and `token_scores` float32, (h, w, 4 K): for every cell, the four
          labels around its centre, K classes each, with their bilinear weights.

        Raises:
          UserError: a class is out of range.
        """
        classes = np.asarray(self._classes[record], np.int32)
        if classes.min() < 0 or classes.max() >= self._num_classes:
            raise UserError(
                f"{self._folder / FILES[0]}, record {record}: classes {classes.min()} to "
                f"{classes.max()}; valid: 0 to {self._num_classes - 1}"
            )
        scores = np.asarray(self._scores[record], np.float32)
        box = relative_box(view, image_size, size)
        return sample_labels(classes, scores, box, view.flip, grid_size(size))


def relative_box(
    view: View, image_size: tuple[int, int], size: tuple[int, int]
) -> tuple[float, float, float, float]:
    """Returns (left, top, right, bottom) of a view, relative to the image's width and height.

    Args:
      view: the part of the image that an example shows.
      image_size: width and height of the image [pixels], as Pillow gives them.
      size: height and width of the example [pixels].
    """
    width, height = image_size
    left, top, right, bottom = view.box or _centred_box(width, height, size)
    return left / width, top / height, right / width, bottom / height


def sample_labels(
    classes: np.ndarray,
    scores: np.ndarray,
    box: tuple[float, float, float, float],
    flip: bool,
    grid: tuple[int, int],
) -> dict[str, np.ndarray]:
    """Samples a label map bilinearly at the centres of the cells of a crop.

    Takes one sample per cell; beyond the outermost centres the map is constant.

    Args:
      classes: (gh, gw, K) int.
      scores: (gh, gw, K) float, probabilities.
      box: left, top, right, bottom of the crop, relative to the image's width and height.
      flip: whether the crop is mirrored, left to right.
      grid: rows and columns of cells of the crop.

    Returns:
      `token_classes` and `token_scores`, (h, w, 4 K), with the types of the arguments.

    References:
      He et al., "Mask R-CNN", section 3 (RoIAlign).
    """
    left, top, right, bottom = box
    rows, row_weights = _corners(top, bottom, grid[0], classes.shape[0])  # (h, 2)
    columns, column_weights = _corners(left, right, grid[1], classes.shape[1])  # (w, 2)
    if flip:
        columns, column_weights = columns[::-1], column_weights[::-1]
    corners = rows[:, None, :, None], columns[None, :, None, :]  # (h, w, 2, 2)
    weights = row_weights[:, None, :, None] * column_weights[None, :, None, :]
    weighted = scores[corners] * weights[..., None].astype(scores.dtype)  # (h, w, 2, 2, K)
    return {
        "token_classes": classes[corners].reshape(*grid, -1),
        "token_scores": weighted.reshape(*grid, -1),
    }


def _corners(start: float, end: float, cells: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the two map positions around each cell centre, (cells, 2), and their weights."""
    centres = start + (np.arange(cells) + 0.5) / cells * (end - start)
    position = np.clip(centres * size - 0.5, 0, size - 1)  # position i has its centre at i
    low = np.floor(position).astype(int)
    part = position - low
    return np.stack([low, np.minimum(low + 1, size - 1)], 1), np.stack([1 - part, part], 1)


def _centred_box(
    width: int, height: int, size: tuple[int, int]
) -> tuple[float, float, float, float]:
    """Returns the largest centred box of the shape of an example."""
    tall, wide = size
    shown = min(width, height * wide / tall), min(height, width * tall / wide)
    left, top = (width - shown[0]) / 2, (height - shown[1]) / 2
    return left, top, left + shown[0], top + shown[1]


def _open(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"token_labels.files: {path} cannot be read: {reason}") from error
