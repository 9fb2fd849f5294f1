"""Any image dataset that tensorflow_datasets has prepared: `tfds:NAME[/CONFIG][:VERSION]`.

The records need an image and a `ClassLabel`, or an image and a label map (`LabeledImage`, or an
`Image` with one channel). Classes, splits and names come from the metadata beside the files. A
version may be a pattern such as `3.*`, also as the last part of the name: `tfds:NAME/3.*`; the
highest prepared version that matches is read.
"""

import dataclasses
import fnmatch
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from tokenvit_jax.data.class_names import different_names, labels_by_value
from tokenvit_jax.data.datasets import none
from tokenvit_jax.data.files import list_folders
from tokenvit_jax.data.held_out import held_out, num_held_out
from tokenvit_jax.data.label_maps import decode_label_map, label_table
from tokenvit_jax.data.record import IGNORED, DatasetInfo, Record, label_field
from tokenvit_jax.data.tfds_files import TfdsSource, list_versions, open_metadata, read_split
from tokenvit_jax.errors import UserError

_VERSION = re.compile(r"[\d*]+(\.[\d*]+)*")
_TRAIN = "train"
_EVAL = ("validation", "val", "valid", "test")  # in this order: test labels may be secret
# Words in the names of label maps.
_MAP_WORDS = ("segmentation", "mask", "label", "annotation")


def read_info(config: ConfigDict) -> DatasetInfo:
    """Returns the facts that the dataset's metadata hold; those of the run if it is not there.

    Args:
      config: reads `task`, `dataset`, `data.data_dir`, `data.split` and `data.classes`.

    Raises:
      UserError: the dataset is not prepared, has no feature that the task reads, or its classes
        have no names.
    """
    label_field(config)  # refuses tasks that cannot use it, before any file is read
    info = dataclasses.replace(none.read_info(config), name=config.dataset)
    if info.classes and not _versions(config):
        return info
    builder = _builder(config)
    classes = info.classes or _features(builder, config).classes
    if not classes:
        feature = _features(builder, config).truth
        raise UserError(
            f"feature {feature!r} of {config.dataset} has no names of classes; valid: "
            "--config.data.classes=\"('a', 'b')\", the names of the values 0, 1, ..."
        )
    if len(classes) == 1 and not info.classes:
        raise UserError(f"{config.dataset} has one class, {classes[0]!r}; valid: two or more")
    train, evaluation = _split_names(config, builder)
    sizes = {name: split.num_examples for name, split in builder.info.splits.items()}
    if config.data.split:
        kept = num_held_out(sizes[_TRAIN], config.data.split)
        sizes = {train: sizes[_TRAIN] - kept, evaluation: kept}
    return dataclasses.replace(
        info,
        splits=sizes,
        train_split=train,
        eval_split=evaluation,
        fields=frozenset({"image", label_field(config)}),
        num_classes=len(classes),
        classes=classes,
    )


def open_split(config: ConfigDict, split: str) -> "MetadataSource":
    """Opens a split for reading.

    Args:
      config: as for :func:`read_info`, and `seed`.
      split: name of a split in the metadata; with `data.split` "train" or "val", parts of "train".

    Raises:
      UserError: as for :func:`read_info`, or the dataset has other classes than the configuration.
    """
    builder = _builder(config)
    features, classes = _features(builder, config), read_info(config).classes
    if features.classes and set(features.classes) != set(classes):
        raise UserError(
            f"the classes of {config.dataset} differ from config.data.classes: "
            f"{different_names(classes, features.classes)}"
        )
    if features.is_map and len(classes) > IGNORED:
        raise UserError(f"{config.dataset} has {len(classes)} classes; valid: up to {IGNORED}")
    undecoded = features.image, *(() if label_field(config) == "label" else (features.truth,))
    stored = _TRAIN if config.data.split else split
    try:
        records = read_split(builder, stored, undecoded)
    except NotImplementedError as error:
        raise UserError(
            f"{config.dataset} in data.data_dir={config.data.data_dir} is not in the array_record "
            f"format; into another folder, {_how_to_prepare(config)}"
        ) from error
    indices = _part(len(records), split, config) if config.data.split else range(len(records))
    return MetadataSource(config.dataset, split, records, indices, features, classes)


class _Features(NamedTuple):
    """The features of a dataset that a task reads.

    Attributes:
      image: name of the image.
      truth: name of the class or of the label map.
      classes: names of its classes; () if the metadata have none.
      is_map: whether it is a label map.
    """

    image: str
    truth: str
    classes: tuple[str, ...]
    is_map: bool


class MetadataSource(TfdsSource):
    """Images with a class or a label map each, from the features that the metadata name."""

    def __init__(
        self,
        name: str,
        split: str,
        records: Any,
        indices: Sequence[int],
        features: _Features,
        classes: Sequence[str],
    ):
        super().__init__(name, split, records)
        self.image = features.image
        self._indices = indices
        self._truth = features.truth
        self._is_map = features.is_map
        # The label in training of every value, in the order of the names of the run.
        labels = self._labels = labels_by_value(features.classes or classes, classes)
        self._table = label_table(labels | {IGNORED: IGNORED}) if self._is_map else None

    def __len__(self) -> int:
        return len(self._indices)

    def stored(self, index: int) -> dict[str, Any]:
        """See :class:`tokenvit_jax.data.tfds_files.TfdsSource`."""
        return self._records[int(self._indices[index])]

    def ground_truth(self, features: dict[str, Any], image: Image.Image) -> Record:
        """See :class:`tokenvit_jax.data.tfds_files.TfdsSource`."""
        truth = features[self._truth]
        if self._is_map:
            return Record(label_map=decode_label_map(truth, self._table, image.size))
        if int(truth) not in self._labels:
            raise UserError(f"{self._truth}={truth}; valid: 0 to {len(self._labels) - 1}")
        return Record(label=self._labels[int(truth)])


def _split_names(config: ConfigDict, builder: Any) -> tuple[str, str]:
    """Returns the names of the splits for training and evaluation."""
    found = list(builder.info.splits)
    if _TRAIN not in found:
        splits = ", ".join(found)
        raise UserError(f"{config.dataset} has the splits {splits}; valid: one is 'train'")
    if config.data.split:
        return _TRAIN, "val"
    for name in _EVAL:
        if name in found:
            return _TRAIN, name
    raise UserError(
        f"{config.dataset} has no split for evaluation ({', '.join(_EVAL)}); valid: "
        "--config.data.split=0.1 keeps a part of 'train'"
    )


def _part(size: int, split: str, config: ConfigDict) -> np.ndarray:
    """Returns the indices of the records that belong to "train" or "val"."""
    kept = held_out(list(map(str, range(size))), config.data.split, config.seed)
    part = [index for index in range(size) if (str(index) in kept) == (split == "val")]
    if not part:
        raise UserError(f"config.data.split={config.data.split} leaves no record for {split!r}")
    return np.array(part)


# ------------------------------------------------------------------------------------------------
# Features
# ------------------------------------------------------------------------------------------------


def _features(builder: Any, config: ConfigDict) -> _Features:
    """Finds the image, and the class or the label map, among the features of a dataset."""
    import tensorflow_datasets as tfds

    features = dict(builder.info.features)
    keys = builder.info.supervised_keys or ()
    images = {n: f for n, f in features.items() if isinstance(f, tfds.features.Image)}
    maps = {name for name, feature in images.items() if _is_map(name, feature)}
    image = _choose(config, "image", "an image", images.keys() - maps, keys, features)
    if label_field(config) == "label_map":
        truth = _choose(config, "segmentation_mask", "a label map", maps, keys, features)
        names = getattr(features[truth], "names", None)
        return _Features(image, truth, tuple(names or ()), is_map=True)
    labels = {n for n, f in features.items() if isinstance(f, tfds.features.ClassLabel)}
    truth = _choose(config, "label", "a ClassLabel", labels, keys, features)
    return _Features(image, truth, tuple(features[truth].names or ()), is_map=False)


def _is_map(name: str, feature: Any) -> bool:
    if type(feature).__name__ == "LabeledImage":
        return True
    return feature.shape[-1] == 1 and any(word in name for word in _MAP_WORDS)


def _choose(
    config: ConfigDict,
    usual: str,
    kind: str,
    candidates: set[str],
    keys: Sequence[Any],
    features: dict[str, Any],
) -> str:
    """Returns the usual name, a supervised key, or the only candidate."""
    if usual in candidates:
        return usual
    supervised = [key for key in keys if isinstance(key, str) and key in candidates]
    if len(found := supervised or sorted(candidates)) == 1:
        return found[0]
    have = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
    several = f"{len(found)} features that may be {kind}" if found else f"no feature that is {kind}"
    raise UserError(
        f"{config.dataset} has {several}, which config.task={config.get('task')!r} reads; it has "
        f"{have}"
    )


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------


def _builder(config: ConfigDict) -> Any:
    """Opens the metadata of the highest prepared version that matches `config.dataset`."""
    if folders := _versions(config):
        return open_metadata(folders[-1])
    name, _ = _parse(config.dataset)
    data_dir, folder = config.data.data_dir, _root(config) / name
    inside = list_folders(folder) if folder.is_dir() else ()
    configs = [found for found in inside if list_versions(folder / found)]
    if configs and "/" not in name:
        raise UserError(
            f"{config.dataset} has configurations in data.data_dir={data_dir}; valid: "
            f"{', '.join(f'tfds:{name}/{found}' for found in configs)}"
        )
    raise UserError(
        f"{config.dataset} not found in data.data_dir={data_dir}; {_how_to_prepare(config)}"
    )


def _how_to_prepare(config: ConfigDict) -> str:
    return (
        'prepare it with: python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{_parse(config.dataset)[0]}', data_dir='{config.data.data_dir}', "
        "file_format='array_record').download_and_prepare()\""
    )


def _parse(dataset: str) -> tuple[str, str]:
    """Splits `tfds:NAME[/CONFIG][:VERSION]` into the name with its configuration, and the version.

    Raises:
      UserError: it has another form.
    """
    name = dataset.removeprefix("tfds:").replace(":", "/")
    *parts, last = name.split("/")
    version = "*"
    if parts and _VERSION.fullmatch(last):
        version = last
    else:
        parts.append(last)
    if len(parts) > 2 or not all(re.fullmatch(r"[\w\-+.]+", part) for part in parts):
        raise UserError(
            f"config.dataset={dataset!r} is not valid; valid: tfds:NAME or tfds:NAME/CONFIG, also "
            "with a version, such as tfds:NAME:3.0.1 or tfds:NAME/3.*"
        )
    return "/".join(parts), version


def _root(config: ConfigDict) -> Path:
    return Path(os.path.expanduser(config.data.data_dir))


def _versions(config: ConfigDict) -> list[Path]:
    """Returns the folders of the prepared versions that match, the highest last."""
    name, wanted = _parse(config.dataset)
    folders = list_versions(_root(config) / name)
    return [folder for folder in folders if fnmatch.fnmatch(folder.name, wanted)]
