"""ADE20K with objects of 100 classes: the things of "ade20k_panoptic", from the same files."""

import dataclasses
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from PIL import Image

from tokenvit_jax.data.datasets import ade20k, ade20k_panoptic
from tokenvit_jax.data.datasets.ade20k_panoptic import (
    NUM_THINGS,
    AdePanopticSource,
    ade_instances,
    read_things,
)
from tokenvit_jax.data.datasets.coco_json import Entries
from tokenvit_jax.data.datasets.panoptic_files import FOLDER
from tokenvit_jax.data.record import DatasetInfo, Record
from tokenvit_jax.data.tfds_files import read_metadata

# `classes` is None: `read_info` fills it in, for a prepared dataset.
INFO = dataclasses.replace(
    ade20k.INFO, name="ade20k_instances", fields=frozenset({"image", "instances"}),
    num_classes=NUM_THINGS, classes=None,
)  # fmt: skip


def read_info(config: ConfigDict) -> DatasetInfo:
    """Returns the facts about the dataset, with the names of its classes if it is prepared.

    Args:
      config: reads `data.data_dir`.
    """
    names = tuple(ade20k.CLASSES[label] for label in read_things(config.data.data_dir))
    return dataclasses.replace(INFO, classes=names or None)


class AdeInstancesSource(AdePanopticSource):
    """Images with their objects."""

    def __init__(self, split: str, data_dir: str):
        super().__init__(split, data_dir)
        self._name, self._things = INFO.name, read_things(data_dir)

    def ground_truth(self, features: Entries, image: Image.Image) -> Record:
        """See :class:`tokenvit_jax.data.tfds_files.TfdsSource`."""
        record = super().ground_truth(features, image)
        return Record(id=record["id"], instances=ade_instances(record["segments"], self._things))


def open_split(config: ConfigDict, split: str) -> AdeInstancesSource:
    """Opens a split for reading.

    Raises:
      UserError: "ade20k_panoptic" has not been prepared in `config.data.data_dir`.
    """
    return AdeInstancesSource(split, config.data.data_dir)


def annotations(config: ConfigDict, split: str) -> dict[str, Any]:
    """Returns all objects of the evaluation split in COCO's format."""
    folder = f"{FOLDER}/{ade20k_panoptic.INFO.name}"
    return read_metadata(folder, config.data.data_dir)["ground_truth"][split]


def prepare(manual_dir: Path, data_dir: Path) -> Path:
    """See :func:`tokenvit_jax.data.datasets.ade20k_panoptic.prepare`."""
    return ade20k_panoptic.prepare(manual_dir, data_dir)
