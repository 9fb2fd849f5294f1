"""The datasets: facts about each, and random access to its labelled images."""

import dataclasses
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from tokenvit_jax.config import IMAGENET_TRAIN_IMAGES
from tokenvit_jax.data import class_names, scenes
from tokenvit_jax.data.digits import DigitsSource
from tokenvit_jax.data.label_maps import IGNORED, decode_label_map, label_table
from tokenvit_jax.data.transforms import decode_image
from tokenvit_jax.errors import UserError, did_you_mean


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """Facts about a dataset.

    Attributes:
        name: in configs.
        task: what the labels are: "classification", one per image, or "segmentation", one per
            pixel.
        num_classes: labels are 0 to num_classes - 1.
        class_names: one per label, or None where the dataset gives none.
        splits: number of images of each split.
        train_split: the split to train on.
        eval_split: the split to evaluate on.
        center_crop: whether evaluation crops the centre; where the subject fills the image it
            shows the whole image.
    """

    name: str
    task: Literal["classification", "segmentation"]
    num_classes: int
    class_names: tuple[str, ...] | None
    splits: dict[str, int]
    train_split: str
    eval_split: str
    center_crop: bool


_DATASETS = {
    info.name: info
    for info in (
        DatasetInfo(
            name="digits",
            task="classification",
            num_classes=10,
            class_names=tuple("0123456789"),
            splits={"train": 1437, "test": 360},
            train_split="train",
            eval_split="test",
            center_crop=False,
        ),
        DatasetInfo(
            name="imagenet2012",
            task="classification",
            num_classes=1000,
            class_names=None,
            splits={"train": IMAGENET_TRAIN_IMAGES, "validation": 50_000},
            train_split="train",
            eval_split="validation",
            center_crop=True,
        ),
        DatasetInfo(
            name="scenes",
            task="segmentation",
            num_classes=scenes.DIGITS + 1,
            class_names=("background", *map(str, range(scenes.DIGITS))),
            splits=scenes.NUM_SCENES,
            train_split="train",
            eval_split="test",
            center_crop=False,
        ),
        DatasetInfo(
            name="ade20k",
            task="segmentation",
            num_classes=len(class_names.ADE20K),
            class_names=class_names.ADE20K,
            splits={"train": 20_210, "validation": 2000},
            train_split="train",
            eval_split="validation",
            center_crop=False,
        ),
        DatasetInfo(
            name="cityscapes",
            task="segmentation",
            num_classes=len(class_names.CITYSCAPES),
            class_names=class_names.CITYSCAPES,
            splits={"train": 2975, "validation": 500},
            train_split="train",
            eval_split="validation",
            center_crop=False,
        ),
        DatasetInfo(
            name="pascal_context",
            task="segmentation",
            num_classes=len(class_names.PASCAL_CONTEXT),
            class_names=class_names.PASCAL_CONTEXT,
            splits={"train": 4998, "validation": 5105},
            train_split="train",
            eval_split="validation",
            center_crop=False,
        ),
    )
}

# In `data_dir`: datasets for segmentation have names that tensorflow_datasets uses for others.
SEGMENTATION_FOLDER = "segmentation"
# They come with a package that is installed, so that there is nothing to prepare.
EMBEDDED = {"digits": DigitsSource, "scenes": scenes.ScenesSource}


def list_datasets() -> list[str]:
    """Returns the names that `config.dataset` can have."""
    return sorted(_DATASETS)


def dataset_info(name: str) -> DatasetInfo:
    """Returns the facts about a dataset, without reading it.

    Args:
        name: one of :func:`list_datasets`.

    Raises:
        UserError: if there is no such dataset.
    """
    if name not in _DATASETS:
        hint = did_you_mean(name, _DATASETS)
        raise UserError(f"no dataset {name!r}{hint}; valid: {', '.join(list_datasets())}")
    return _DATASETS[name]


class Source(Protocol):
    """Random access to the labelled images of one split; can be sent to another process."""

    def __len__(self) -> int:
        """Returns the number of records."""

    def read(self, index: int) -> tuple[Image.Image, int | np.ndarray]:
        """Returns the RGB image of a record and its label, or its label map, uint8 (H, W).

        Raises:
            UserError: if the image cannot be read; names dataset, split, index and file.
        """


class LabelMapSource(Source, Protocol):
    """A source of a dataset for segmentation."""

    def name(self, index: int) -> str:
        """Returns what messages call a record: dataset, split, index and file."""


def open_source(name: str, split: str, data_dir: str) -> Source:
    """Opens a split for reading.

    Args:
        name: one of :func:`list_datasets`.
        split: one of `dataset_info(name).splits`.
        data_dir: the folder that `prepare` wrote into; not used by the embedded datasets.

    Raises:
        UserError: if the dataset has not been prepared there.
    """
    if name in EMBEDDED:
        return EMBEDDED[name](split)
    return TfdsSource(name, split, data_dir)


class TfdsSource:
    """A dataset in tensorflow_datasets' layout and ArrayRecord files."""

    def __init__(self, name: str, split: str, data_dir: str):
        self._name = name
        self._split = split
        info = dataset_info(name)
        self._table = None
        if info.task == "segmentation":
            self._table = label_table(
                {label: label for label in (*range(info.num_classes), IGNORED)}
            )
        self._records = _open_records(info, split, Path(data_dir).expanduser())

    def __len__(self) -> int:
        return len(self._records)

    def name(self, index: int) -> str:
        """See :class:`LabelMapSource`."""
        return self._name_of(index, self._records[index]["file_name"].decode())

    def read(self, index: int) -> tuple[Image.Image, int | np.ndarray]:
        """See :class:`Source`."""
        file_name = "file unknown"
        try:
            record = self._records[index]
            file_name = record["file_name"].decode()
            image = decode_image(record["image"])
            if self._table is None:
                return image, int(record["label"])
            return image, decode_label_map(record["label"], self._table, image.size)
        except Exception as error:
            raise UserError(f"{self._name_of(index, file_name)}: {error}") from error

    def _name_of(self, index: int, file_name: str) -> str:
        return f"{self._name} split {self._split!r}, record {index} ({file_name})"


def _open_records(info: DatasetInfo, split: str, data_dir: Path) -> Any:
    # Takes half a second; only prepared datasets need it.
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.read_only_builder import builder_from_files

    files = {"image": tfds.decode.SkipDecoding()}
    folder = info.name
    if info.task == "segmentation":
        files["label"] = tfds.decode.SkipDecoding()
        folder = f"{SEGMENTATION_FOLDER}/{info.name}"
    try:
        builder = builder_from_files(folder, data_dir=str(data_dir))
        return builder.as_data_source(split, decoders=files)
    except tfds.core.DatasetNotFoundError as error:
        reason = f"dataset {info.name} not found in data.data_dir={data_dir}"
        raise UserError(f"{reason}; {_how_to_prepare(info.name, data_dir)}") from error
    except NotImplementedError as error:
        reason = (
            f"dataset {info.name} in data.data_dir={data_dir} is not in the array_record format"
        )
        raise UserError(
            f"{reason}; into another folder, {_how_to_prepare(info.name, data_dir)}"
        ) from error


def _how_to_prepare(name: str, data_dir: Path) -> str:
    return (
        f"prepare it with: python -m tokenvit_jax.prepare {name} --manual_dir=DOWNLOADS "
        f"--data_dir={data_dir}"
    )
