"""NYU Depth v2: photographs of rooms, and depth from a structured-light camera.

`prepare` reads either the images that BTS lists, or the 1,449 labelled images of one MATLAB file.

References:
  Silberman et al. 2012, "Indoor Segmentation and Support Inference from RGBD Images"; Lee et al.
  2019, "From Big to Small" (BTS), whose lists name 24,231 training and 654 test images.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from tokenvit_jax.data.datasets import depth_files
from tokenvit_jax.data.datasets.depth_files import FOLDER, VERSION, DepthSource, Layout
from tokenvit_jax.data.files import error_text
from tokenvit_jax.data.record import DatasetInfo
from tokenvit_jax.data.tfds_files import Pairs, is_prepared
from tokenvit_jax.errors import UserError

INFO = DatasetInfo(
    name="nyu_depth_v2",
    splits={"train": 24_231, "test": 654},
    train_split="train",
    eval_split="test",
    fields=frozenset({"image", "depth"}),
    num_classes=0,
    classes=None,
)

LABELED, SPLITS = "nyu_depth_v2_labeled.mat", "splits.mat"
LAYOUT = Layout(
    lists={
        "train": "nyudepthv2_train_files_with_gt.txt",
        "test": "nyudepthv2_test_files_with_gt.txt",
    },
    folders=("", "sync", "official_splits/test"),
    steps=1000,
    how_to_get=(
        "unpack the synchronised training images (sync) and the test images (official_splits/test) "
        "there, and copy the lists nyudepthv2_*_files_with_gt.txt, all as github.com/cleinc/bts "
        f"describes; or put {LABELED} and {SPLITS} of cs.nyu.edu/~silberman there"
    ),
)
# Rows and columns of the labelled images that show something; BTS makes the others black.
_SHOWN = slice(7, 474), slice(7, 632)


def open_split(config: ConfigDict, split: str) -> DepthSource:
    """Opens a split for reading.

    Raises:
      UserError: the dataset has not been prepared in `config.data.data_dir`.
    """
    return DepthSource(INFO, LAYOUT, split, config.data.data_dir)


def prepare(manual_dir: Path, data_dir: Path) -> Path:
    """See :func:`tokenvit_jax.data.datasets.depth_files.prepare`.

    Without the lists, the labelled images are taken, with their raw depth.
    """
    listed = any((manual_dir / name).exists() for name in LAYOUT.lists.values())
    folder = data_dir / FOLDER / INFO.name / VERSION
    if listed or is_prepared(folder) or not (manual_dir / LABELED).exists():
        return depth_files.prepare(INFO.name, LAYOUT, manual_dir, data_dir)
    indices = _read_splits(manual_dir / SPLITS)
    with _open_labeled(manual_dir / LABELED) as file:
        splits = {split: _examples(file, numbers) for split, numbers in indices.items()}
        depth_files.write(INFO.name, splits, data_dir)
    return folder


def _open_labeled(path: Path) -> Any:
    try:
        import h5py
    except ImportError as error:
        raise UserError(
            f"{path} is an HDF5 file, which needs a package that is not installed; valid: pip "
            "install h5py, or the files that BTS lists"
        ) from error
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise UserError(f"{path}: {error_text(error)}") from error
    for name in ("images", "rawDepths"):
        if name not in file:
            raise UserError(f"{path} has no {name!r}; valid: {LABELED} of NYU Depth v2")
    return file


def _read_splits(path: Path) -> dict[str, list[int]]:
    """Returns the indices of the images of each split, from 0."""
    from scipy.io import loadmat

    try:
        found = loadmat(path)
        names = {"train": "trainNdxs", "test": "testNdxs"}
        return {split: (found[name].ravel().astype(int) - 1).tolist()
                for split, name in names.items()}  # fmt: skip
    except Exception as error:  # errors of scipy, also of damaged files
        raise UserError(f"{path}: {error_text(error)}; valid: {SPLITS} of NYU Depth v2") from error


def _examples(file: Any, numbers: Sequence[int]) -> Pairs:
    """Yields images and raw depth; MATLAB stores columns first."""
    for number in numbers:
        pixels = np.asarray(file["images"][number]).transpose(2, 1, 0)  # (480, 640, 3)
        shown = np.zeros_like(pixels)
        shown[_SHOWN] = pixels[_SHOWN]
        metres = np.asarray(file["rawDepths"][number]).T
        values = (metres * LAYOUT.steps).clip(0, 65535).astype(np.uint16)
        name = f"{LABELED}, image {number + 1}"
        if not values.any():
            raise UserError(f"{name}: depth map has no known pixel: all values are 0")
        yield name, {"image": _png(shown), "depth": _png(values), "file_name": name}


def _png(pixels: np.ndarray) -> io.BytesIO:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    buffer.seek(0)
    return buffer
