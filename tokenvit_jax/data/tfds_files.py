"""Reads and writes ArrayRecord files in the layout of tensorflow_datasets, without TensorFlow.

`tensorflow_datasets` is imported inside the functions that use it: the import takes half a second,
and the embedded datasets do not need it.
"""

import abc
import functools
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tokenvit_jax.data.decoding import open_image
from tokenvit_jax.data.files import error_text, list_folders, read_text
from tokenvit_jax.data.record import DatasetInfo, Record
from tokenvit_jax.errors import UserError
from tokenvit_jax.output import writing
from tokenvit_jax.progress import note, progress

Pairs = Iterable[tuple[str, dict[str, Any]]]  # keys and examples, as in tensorflow_datasets


class TfdsSource(abc.ABC):
    """Reads one split of a prepared dataset; a subclass decodes the ground truth.

    Attributes:
      image: name of the feature with the image.

    Args:
      name: name of the dataset.
      split: one of its splits.
      records: result of :func:`open_records` or :func:`read_split`.
    """

    image = "image"

    def __init__(self, name: str, split: str, records: Sequence[dict[str, Any]]):
        self._name = name
        self._split = split
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def name(self, index: int) -> str:
        """See :class:`tokenvit_jax.data.record.Source`."""
        return self._name_with(index, _file_of(self.stored(index)))

    def read(self, index: int) -> Record:
        """See :class:`tokenvit_jax.data.record.Source`."""
        file = "file unknown"
        try:
            features = self.stored(index)
            file = _file_of(features)
            image = open_image(features[self.image])
            return Record(id=index, image=image) | self.ground_truth(features, image)
        except Exception as error:
            raise UserError(f"{self._name_with(index, file)}: {error_text(error)}") from error

    def stored(self, index: int) -> dict[str, Any]:
        """Returns the stored record with an index; images are still encoded."""
        return self._records[index]

    @abc.abstractmethod
    def ground_truth(self, features: dict[str, Any], image: Image.Image) -> Record:
        """Returns the fields of a record besides "id" and "image".

        Args:
          features: the stored record.
          image: the decoded image of the record.
        """

    def _name_with(self, index: int, file: str) -> str:
        return f"{self._name} split {self._split!r}, record {index}{f' ({file})' if file else ''}"


class LabelSource(TfdsSource):
    """Images with one class each, in the feature "label", of a built-in dataset."""

    def __init__(self, info: DatasetInfo, split: str, records: Sequence[dict[str, Any]]):
        super().__init__(info.name, split, records)
        self._num_classes = info.num_classes

    def ground_truth(self, features: dict[str, Any], image: Image.Image) -> Record:
        """See :class:`TfdsSource`."""
        label = int(features["label"])
        if not 0 <= label < self._num_classes:
            raise UserError(f"label={label}; valid: 0 to {self._num_classes - 1}")
        return Record(label=label)


class SizedSource(TfdsSource):
    """Images whose sizes are in the metadata of their dataset: "sizes", split -> (width, height).

    The arguments are those of :func:`open_records`.
    """

    def __init__(self, name: str, split: str, data_dir: str, folder: str, undecoded: Sequence[str]):
        super().__init__(name, split, open_records(name, split, data_dir, folder, undecoded))
        width, height = np.array(read_metadata(folder, data_dir)["sizes"][split]).T
        self._portrait = height > width

    def portrait(self) -> np.ndarray:
        """See :class:`tokenvit_jax.data.record.Source`."""
        return self._portrait


def _file_of(features: dict[str, Any]) -> str:
    """Returns the name of a record's file; "" if the dataset does not store it."""
    return features.get("file_name", b"").decode(errors="backslashreplace")


# ------------------------------------------------------------------------------------------------
# Reading
# ------------------------------------------------------------------------------------------------


def open_records(
    name: str, split: str, data_dir: str, folder: str, undecoded: Sequence[str] = ("image",)
) -> Sequence[dict[str, Any]]:
    """Opens a split that `prepare` wrote.

    Args:
      name: name of the dataset.
      split: one of its splits.
      data_dir: the folder that `prepare` wrote into.
      folder: the dataset's folder in `data_dir`.
      undecoded: features that are read as the bytes of their files.

    Raises:
      UserError: the dataset has not been prepared in `data_dir`, or its files are damaged.
    """
    root = Path(os.path.expanduser(data_dir))
    how_to_prepare = (
        f"prepare it with: python -m tokenvit_jax.prepare {name} --manual_dir=DOWNLOADS "
        f"--data_dir={root}"
    )
    versions = list_versions(root / folder)
    if not versions:
        raise UserError(f"dataset {name} not found in data.data_dir={root}; {how_to_prepare}")
    try:
        return read_split(open_metadata(versions[-1]), split, undecoded)
    except NotImplementedError as error:
        reason = f"dataset {name} in data.data_dir={root} is not in the array_record format"
        raise UserError(f"{reason}; into another folder, {how_to_prepare}") from error


def list_versions(folder: Path) -> list[Path]:
    """Returns the folders of the prepared versions of a dataset, the highest last."""
    names = list_folders(folder) if folder.is_dir() else ()
    versions = [name for name in names if re.fullmatch(r"\d+\.\d+\.\d+", name)]
    return [folder / name for name in sorted(versions, key=lambda n: [*map(int, n.split("."))])]


@functools.lru_cache(maxsize=4)
def read_metadata(folder: str, data_dir: str) -> dict[str, Any]:
    """Returns what `prepare` wrote beside the records of a dataset, as `metadata`.

    Args:
      folder: the folder of a prepared dataset in `data_dir`.
      data_dir: the folder that `prepare` wrote into.
    """
    newest = list_versions(Path(os.path.expanduser(data_dir)) / folder)[-1]
    return json.loads(read_text(newest / "metadata.json"))


def open_metadata(folder: Path) -> Any:
    """Returns a builder of `tensorflow_datasets` for a prepared dataset.

    Args:
      folder: one of :func:`list_versions`.

    Raises:
      UserError: a file with metadata is missing or damaged.
    """
    import tensorflow_datasets as tfds

    checks = {  # a file -> a function that reads it
        "features.json": tfds.features.FeaturesDict.from_config,
        "dataset_info.json": tfds.builder_from_directory,  # reads the features, too
    }
    for name, read in checks.items():
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing; {_again(folder)}")
        try:
            json.loads((folder / name).read_text("utf-8"))
            builder = read(str(folder))
            splits = dict(builder.info.splits) if name == "dataset_info.json" else {}
            if any(length < 0 for split in splits.values() for length in split.shard_lengths):
                raise ValueError("a split has a negative number of records")
        except Exception as error:  # errors of json, protobuf and tensorflow_datasets
            raise _damaged(folder, folder / name, error_text(error)) from error
    return builder


def read_split(builder: Any, split: str, undecoded: Sequence[str]) -> Sequence[dict[str, Any]]:
    """Returns the records of a split, read when they are needed.

    Args:
      builder: result of :func:`open_metadata`.
      split: one of its splits.
      undecoded: features that are read as the bytes of their files.

    Raises:
      NotImplementedError: the files are not in the array_record format.
      UserError: there is no such split or feature, or a file is missing or damaged.
    """
    import tensorflow_datasets as tfds

    folder, splits = Path(builder.data_dir), list(builder.info.splits)
    for kind, names, found in (
        ("split", [split], splits),
        ("feature", undecoded, list(builder.info.features)),
    ):
        for name in names:
            if name not in found:
                has = ", ".join(sorted(found)) or "none"
                raise UserError(f"{folder} has no {kind} {name!r}; it has {has}")
    decoders = {feature: tfds.decode.SkipDecoding() for feature in undecoded}
    records = builder.as_data_source(split, decoders=decoders)
    _check_shards(builder, split)
    return records


def _check_shards(builder: Any, split: str) -> None:
    """Checks the files of a split: a fifth of a millisecond each.

    Raises:
      UserError: a file is missing, cut, or has another number of records than the metadata say.
    """
    from array_record.python.array_record_module import ArrayRecordReader

    folder, info = Path(builder.data_dir), builder.info.splits[split]
    for file, length in zip(info.filepaths, info.shard_lengths, strict=True):
        path = Path(file)
        if not path.is_file():
            raise UserError(f"{path} is missing; {_again(folder)}")
        try:
            reader = ArrayRecordReader(str(path))
            found = reader.num_records()
            reader.close()
        except Exception as error:
            raise _damaged(folder, path, error_text(error)) from error
        if found != length:
            raise _damaged(folder, path, f"{found:,} records, not {length:,}")


def _damaged(folder: Path, file: Path, reason: str) -> UserError:
    return UserError(f"{file} is damaged ({reason}); {_again(folder)}")


def _again(folder: Path) -> str:
    return f"delete {folder} and prepare the dataset again"


# ------------------------------------------------------------------------------------------------
# Writing
# ------------------------------------------------------------------------------------------------


def is_prepared(folder: Path) -> bool:
    """Returns whether :func:`write_splits` has written a dataset into this folder."""
    return folder.exists()  # it appears when all its files are complete


def count_records(folder: Path) -> dict[str, int]:
    """Returns the number of records in each split of a prepared dataset.

    Raises:
      UserError: a file is missing or damaged.
    """
    builder = open_metadata(folder)
    for split in builder.info.splits:
        _check_shards(builder, split)
    return {name: split.num_examples for name, split in builder.info.splits.items()}


def write_splits(
    data_dir: Path,
    folder: str,
    version: str,
    features: dict[str, Any],
    splits: dict[str, Pairs],
    **info: Any,
) -> None:
    """Writes a dataset as ArrayRecord files into `data_dir/folder/version`, whole or not at all.

    Args:
      data_dir: the folder of all datasets.
      folder: NAME or, for one of several datasets under a common name, NAME/CONFIG.
      version: version of the dataset, three numbers such as "1.0.0".
      features: name of a feature -> feature of `tensorflow_datasets`.
      splits: name of a split -> its keys and examples, generated while they are written.
      **info: further arguments of `tensorflow_datasets.core.DatasetInfo`.

    Raises:
      UserError: a split is empty, or the files cannot be written; nothing is left of them.
      OSError: a folder cannot be written.
    """
    import tensorflow_datasets as tfds

    for left in sorted((data_dir / folder).glob("incomplete.*")):
        note(f"{left} is left from an interrupted preparation: delete it unless one is running")
    tfds.disable_progress_bar()  # it also writes where there is no terminal
    dataset, _, config = folder.partition("/")

    # The builder is not registered: tensorflow_datasets has others with some of these names.
    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = dataset
        VERSION = tfds.core.Version(version)
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)] if config else []
        # Nothing is downloaded. tensorflow_datasets' own lookup of checksums imports a package,
        # importlib_resources, that it does not require.
        url_infos = None

        def _info(self):
            all_features = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=all_features, **info)

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split, pairs) for split, pairs in splits.items()}

        def _generate_examples(self, split, pairs):
            return progress(_some(pairs, split), f"preparing {folder} {split}", "example")

    builder = Builder(config=config or None, data_dir=str(data_dir), file_format="array_record")
    with writing(data_dir / folder, kinds=(RuntimeError,)):  # also of the writer in C++
        builder.download_and_prepare()


def _some(pairs: Pairs, split: str) -> Pairs:
    """Yields the pairs; UserError if there is none."""
    empty = True
    for pair in pairs:
        empty = False
        yield pair
    if empty:
        raise UserError(f"there is no image for the split {split!r} among the original files")
