"""Fashion-MNIST from its four IDX files: grey images of clothes, 28 x 28 pixels, 10 classes.

The result has the name, version and features of tensorflow_datasets' own `fashion_mnist`, so each
project can read what the other prepared (in the array_record format).

References:
  Xiao et al., "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms"
  (2017).
"""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from tokenvit_jax.data.record import DatasetInfo
from tokenvit_jax.data.tfds_files import LabelSource, Pairs, is_prepared, open_records, write_splits
from tokenvit_jax.errors import UserError

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
    "Ankle boot",
)  # fmt: skip

INFO = DatasetInfo(
    name="fashion_mnist",
    splits={"train": 60_000, "test": 10_000},
    train_split="train",
    eval_split="test",
    fields=frozenset({"image", "label"}),
    num_classes=len(CLASSES),
    classes=CLASSES,
)
VERSION = "3.0.1"
SIDE = 28  # [pixels]

_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_HOW_TO_GET = "download the four files of https://github.com/zalandoresearch/fashion-mnist there"
_BYTES = 8  # type code of IDX: unsigned bytes


def open_split(config: ConfigDict, split: str) -> LabelSource:
    """Opens a split for reading.

    Raises:
      UserError: the dataset has not been prepared in `config.data.data_dir`.
    """
    records = open_records(INFO.name, split, config.data.data_dir, folder=INFO.name)
    return LabelSource(INFO, split, records)


def prepare(manual_dir: Path, data_dir: Path) -> Path:
    """Writes Fashion-MNIST as ArrayRecord files; does nothing if they exist.

    Args:
      manual_dir: folder with the four IDX files, compressed with gzip or not.
      data_dir: receives the folder `fashion_mnist/3.0.1`.

    Returns:
      The folder with the files.

    Raises:
      UserError: a file is missing, damaged or has other contents.
    """
    folder = data_dir / INFO.name / VERSION
    if is_prepared(folder):
        return folder
    arrays = {split: _read_split(manual_dir, *names) for split, names in _FILES.items()}
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Image(shape=(SIDE, SIDE, 1)),
        "label": tfds.features.ClassLabel(names=CLASSES),
    }
    splits = {split: _examples(*pair) for split, pair in arrays.items()}
    info = {"supervised_keys": ("image", "label")}
    write_splits(data_dir, INFO.name, VERSION, features, splits, **info)
    return folder


def _examples(images: np.ndarray, labels: np.ndarray) -> Pairs:
    for index, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        yield index, {"image": Image.fromarray(pixels), "label": int(label)}


def _read_split(folder: Path, images_name: str, labels_name: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads the images (N, 28, 28) and the labels (N,) of a split, uint8."""
    images, labels = _read_idx(folder, images_name), _read_idx(folder, labels_name)
    highest = labels.max(initial=0)
    num = labels.size
    if labels.shape != (num,) or images.shape != (num, SIDE, SIDE) or not num or highest >= 10:
        raise UserError(
            f"{folder / images_name} holds an array {images.shape} and {labels_name} labels "
            f"{labels.shape} up to {highest}; valid: (N, 28, 28), and (N,) from 0 to 9"
        )
    return images, labels


def _read_idx(folder: Path, name: str) -> np.ndarray:
    """Reads an IDX file of unsigned bytes, NAME or NAME.gz."""
    paths = [path for path in (folder / name, folder / f"{name}.gz") if path.is_file()]
    if not paths:
        raise UserError(f"{name}[.gz] not found in --manual_dir={folder}; {_HOW_TO_GET}")
    try:
        content = paths[0].read_bytes()
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{paths[0]} is damaged ({error}); download it again") from error
    # Two zeros, the type, the number of axes, and the length of each axis in four bytes.
    num_axes = content[3] if len(content) > 3 else 0
    start = 4 + 4 * num_axes
    shape = tuple(np.frombuffer(content[4:start], ">u4").tolist()) if len(content) >= start else ()
    if content[:3] != bytes((0, 0, _BYTES)) or len(content) - start != math.prod(shape):
        raise UserError(f"{paths[0]} is no complete IDX file of bytes; download it again")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
