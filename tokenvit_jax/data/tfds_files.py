"""Reads and writes ArrayRecord files in the layout of tensorflow_datasets, without TensorFlow.

`tensorflow_datasets` is imported inside the functions that use it: the import takes half a second,
and the embedded datasets do not need it.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from tokenvit_jax.data.images import decode_image
from tokenvit_jax.data.record import Record
from tokenvit_jax.errors import UserError
from tokenvit_jax.output import writing
from tokenvit_jax.progress import progress

Pairs = Iterable[tuple[str, dict[str, Any]]]  # keys and examples, as in tensorflow_datasets


class TfdsSource:
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
            image = decode_image(features[self.image])
            return Record(id=index, image=image) | self.ground_truth(features, image)
        except Exception as error:
            raise UserError(f"{self._name_with(index, file)}: {error}") from error

    def stored(self, index: int) -> dict[str, Any]:
        """Returns the stored record with an index; images are still encoded."""
        return self._records[index]

    def ground_truth(self, features: dict[str, Any], image: Image.Image) -> Record:
        """Returns the fields of a record besides "id" and "image".

        Args:
          features: the stored record.
          image: the decoded image of the record.
        """
        raise NotImplementedError

    def _name_with(self, index: int, file: str) -> str:
        return f"{self._name} split {self._split!r}, record {index}{f' ({file})' if file else ''}"


class LabelSource(TfdsSource):
    """Images with one class each, in the feature "label"."""

    def ground_truth(self, features: dict[str, Any], image: Image.Image) -> Record:
        """See :class:`TfdsSource`."""
        return Record(label=int(features["label"]))


def _file_of(features: dict[str, Any]) -> str:
    """Returns the name of a record's file; "" if the dataset does not store it."""
    return features.get("file_name", b"").decode()


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
      UserError: the dataset has not been prepared in `data_dir`.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.read_only_builder import builder_from_files

    data_dir = Path(data_dir).expanduser()
    how_to_prepare = (
        f"prepare it with: python -m tokenvit_jax.prepare {name} --manual_dir=DOWNLOADS "
        f"--data_dir={data_dir}"
    )
    try:
        return read_split(builder_from_files(folder, data_dir=str(data_dir)), split, undecoded)
    except tfds.core.DatasetNotFoundError as error:
        reason = f"dataset {name} not found in data.data_dir={data_dir}"
        raise UserError(f"{reason}; {how_to_prepare}") from error
    except NotImplementedError as error:
        reason = f"dataset {name} in data.data_dir={data_dir} is not in the array_record format"
        raise UserError(f"{reason}; into another folder, {how_to_prepare}") from error


def read_split(builder: Any, split: str, undecoded: Sequence[str]) -> Sequence[dict[str, Any]]:
    """Returns the records of a split, read when they are needed.

    Args:
      builder: a builder of `tensorflow_datasets` whose files exist.
      split: one of its splits.
      undecoded: features that are read as the bytes of their files.

    Raises:
      NotImplementedError: the files are not in the array_record format.
    """
    import tensorflow_datasets as tfds

    decoders = {feature: tfds.decode.SkipDecoding() for feature in undecoded}
    return builder.as_data_source(split, decoders=decoders)


def is_prepared(folder: Path) -> bool:
    """Returns whether :func:`write_splits` has written a dataset into this folder."""
    return (folder / "dataset_info.json").is_file()


def count_records(folder: Path) -> dict[str, int]:
    """Returns the number of records in each split of a prepared dataset."""
    splits = json.loads((folder / "dataset_info.json").read_text())["splits"]
    return {split["name"]: sum(map(int, split.get("shardLengths", ()))) for split in splits}


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
    """
    import tensorflow_datasets as tfds

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
            return {
                split: progress(pairs, f"preparing {dataset} {split}", "example")
                for split, pairs in splits.items()
            }

        def _generate_examples(self):
            raise NotImplementedError  # `_split_generators` returns the generators themselves

    builder = Builder(config=config or None, data_dir=str(data_dir), file_format="array_record")
    with writing(data_dir / folder, kinds=(RuntimeError,)):  # also of the writer in C++
        builder.download_and_prepare()
