"""One photograph with measured depth, from scikit-image's package: Middlebury's Motorcycle.

Training sees columns 0 to 479, evaluation columns 512 to 740.

References:
  Scharstein et al. 2014, "High-Resolution Stereo Datasets with Subpixel-Accurate Ground Truth".
"""

import importlib.util
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from tokenvit_jax.data.decoding import read_image
from tokenvit_jax.data.record import DatasetInfo, Record
from tokenvit_jax.errors import UserError

INFO = DatasetInfo(
    name="motorcycle",
    splits={"train": 1, "test": 1},
    train_split="train",
    eval_split="test",
    fields=frozenset({"image", "depth"}),
    num_classes=0,
    classes=None,
)

_COLUMNS = {"train": (0, 480), "test": (512, 741)}
_FOCAL_LENGTH, _BASELINE = 994.978, 0.193001  # [pixels], [m]
_OFFSET = 31.086  # of the principal points of the two cameras [pixels]


def open_split(config: ConfigDict, split: str) -> "MotorcycleSource":
    """Opens a split for reading; `config` is not used.

    Raises:
      UserError: scikit-image is not installed.
    """
    del config
    return MotorcycleSource(split)


class MotorcycleSource:
    """A part of the photograph, with depth where the disparity is known: 93 % of the pixels."""

    def __init__(self, split: str):
        self._split = split
        folder = _data_folder()
        left, right = _COLUMNS[split]
        image = read_image(folder / "motorcycle_left.png")
        self._image = image.crop((left, 0, right, image.height))
        with np.load(folder / "motorcycle_disp.npz") as arrays:
            disparity = arrays["arr_0"].astype(np.float64)  # (500, 741), not finite where unknown
        depth = _BASELINE * _FOCAL_LENGTH / (disparity + _OFFSET)
        known = np.where(np.isfinite(disparity), depth, 0).astype(np.float32)
        self._depth = known[:, left:right]

    def __len__(self) -> int:
        return INFO.splits[self._split]

    def name(self, index: int) -> str:
        """See :class:`tokenvit_jax.data.record.Source`."""
        return f"motorcycle split {self._split!r}, record {index}"

    def read(self, index: int) -> Record:
        """See :class:`tokenvit_jax.data.record.Source`."""
        return Record(id=index, image=self._image, depth=self._depth)


def _data_folder() -> Path:
    """Returns the folder of the files, without importing scikit-image."""
    found = importlib.util.find_spec("skimage")
    if found is None:
        raise UserError(
            "dataset motorcycle needs a package that is not installed; valid: pip install "
            "scikit-image"
        )
    (package,) = found.submodule_search_locations
    return Path(package) / "data"
