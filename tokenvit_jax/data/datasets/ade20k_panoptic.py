"""ADE20K with segments: the 150 classes of the scene parsing benchmark, 100 of which are things.

The benchmark's label maps give stuff, the files of its instance segmentation give things. Which of
the 150 classes are things is not known before the user's files have been read: it is in the table
`categoryMapping.txt` of the benchmark's code for instance segmentation.

References:
  Zhou et al., "Scene Parsing through ADE20K Dataset" (2017).
"""

import dataclasses
import io
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from tokenvit_jax.data.datasets import ade20k, label_map_files, panoptic_files
from tokenvit_jax.data.datasets.coco_json import Entries
from tokenvit_jax.data.datasets.panoptic_files import FOLDER, VERSION, PanopticSource
from tokenvit_jax.data.files import read_file, read_text
from tokenvit_jax.data.instances import coco_annotations
from tokenvit_jax.data.label_maps import decode_label_map, label_table
from tokenvit_jax.data.record import IGNORED, DatasetInfo, Instances, Record, Segments
from tokenvit_jax.data.segments import (
    class_segments,
    decode_pixels,
    encode_ids,
    segment_entries,
    thing_instances,
)
from tokenvit_jax.data.tfds_files import Pairs, is_prepared, list_versions, read_metadata
from tokenvit_jax.errors import UserError

NUM_THINGS = 100
TABLE = "categoryMapping.txt"
_FIRST_THING = 256  # identifier of the segment of instance number 0; stuff has class + 1

# `things` is None: `read_info` fills it in, for a prepared dataset.
INFO = dataclasses.replace(
    ade20k.INFO, name="ade20k_panoptic", fields=frozenset({"image", "label_map", "segments"})
)


def read_info(config: ConfigDict) -> DatasetInfo:
    """Returns the facts about the dataset, with the things if it is prepared.

    Args:
      config: reads `data.data_dir`.
    """
    things = read_things(config.data.data_dir)
    return dataclasses.replace(INFO, things=frozenset(things)) if things else INFO


def read_things(data_dir: str) -> tuple[int, ...]:
    """Returns the class of every instance class of the prepared dataset, () if there is none.

    Args:
      data_dir: the folder that `prepare` wrote into.
    """
    folder = f"{FOLDER}/{INFO.name}"
    if not list_versions(Path(os.path.expanduser(data_dir)) / folder):
        return ()
    return tuple(read_metadata(folder, data_dir)["things"])


class AdePanopticSource(PanopticSource):
    """Images with their segments and label maps."""

    def __init__(self, split: str, data_dir: str):
        super().__init__(INFO, split, data_dir, labels=("label",))
        self._table = label_table({label: label for label in (*range(INFO.num_classes), IGNORED)})

    def ground_truth(self, features: Entries, image: Image.Image) -> Record:
        """See :class:`tokenvit_jax.data.tfds_files.TfdsSource`."""
        labels = decode_label_map(features["label"], self._table, image.size)
        return super().ground_truth(features, image) | Record(label_map=labels)


def open_split(config: ConfigDict, split: str) -> AdePanopticSource:
    """Opens a split for reading.

    Raises:
      UserError: the dataset has not been prepared in `config.data.data_dir`.
    """
    return AdePanopticSource(split, config.data.data_dir)


def prepare(manual_dir: Path, data_dir: Path) -> Path:
    """Writes the dataset as ArrayRecord files; does nothing if they exist.

    Args:
      manual_dir: folder with ADEChallengeData2016, the folder annotations_instance inside it, and
        the table of classes.
      data_dir: receives the folder `panoptic/ade20k_panoptic/1.0.0`.

    Returns:
      The folder with the files.

    Raises:
      UserError: a file is missing, has another size or unknown values, or an instance has two
        classes; the message names the file.
    """
    folder = data_dir / FOLDER / INFO.name / VERSION
    if is_prepared(folder):
        return folder
    files = {split: _find(manual_dir, split) for split in INFO.splits}
    things = read_table(manual_dir / TABLE)
    classes = [ade20k.CLASSES[label] for label in things]
    objects = coco_annotations(_objects(files[INFO.eval_split], things), classes)
    sizes = {
        split: [label_map_files.read_size(image) for image, _, _ in found]
        for split, found in files.items()
    }
    splits = {split: _examples(manual_dir, found, things) for split, found in files.items()}
    panoptic_files.write(
        INFO.name, data_dir, splits, sizes, labels=("label",),
        things=list(things), ground_truth={INFO.eval_split: objects},
    )  # fmt: skip
    return folder


Files = list[tuple[Path, Path, Path]]  # of an image, its label map and its instances


def _find(manual_dir: Path, split: str) -> Files:
    found = []
    for image, label in label_map_files.find_images(ade20k.LAYOUT, manual_dir, split):
        inside = label.relative_to(manual_dir).as_posix()
        instances = manual_dir / inside.replace("/annotations/", "/annotations_instance/", 1)
        if not instances.is_file():
            raise UserError(
                f"{instances} not found, the instances of {image.name}; valid: "
                "annotations_instance.tar of the benchmark, unpacked in ADEChallengeData2016"
            )
        found.append((image, label, instances))
    return found


def read_table(path: Path) -> tuple[int, ...]:
    """Reads which of the 150 classes the instance classes 1, 2, ..., 100 are, counted from 0.

    Args:
      path: file with an instance class, a class from 1 to 150 and a name per line; lines that do
        not start with two numbers are titles.

    Raises:
      UserError: the file is missing, or is no such table.
    """
    if not path.is_file():
        raise UserError(
            f"{path} not found, the table of the {NUM_THINGS} instance classes of ADE20K; valid: "
            f"instancesegmentation/{TABLE} of CSAILVision/placeschallenge on GitHub"
        )
    rows = re.findall(r"^\s*(\d+)\s+(\d+)\b", read_text(path), re.MULTILINE)
    table = {int(instance): int(label) - 1 for instance, label in rows}
    for kind, values, wanted in (
        ("instance classes", [int(instance) for instance, _ in rows], range(1, NUM_THINGS + 1)),
        ("classes", [*table.values()], range(INFO.num_classes)),
    ):
        unknown = sorted(set(values) - set(wanted))
        if unknown or len(set(values)) != NUM_THINGS or len(rows) != NUM_THINGS:
            shift = 1 - wanted[0]
            found = (
                f"{unknown[0] + shift}" if unknown else f"{len(set(values))} in {len(rows)} lines"
            )
            raise UserError(
                f"{path}: {kind}: {found}; valid: {NUM_THINGS} lines, with {NUM_THINGS} of "
                f"1 to {wanted[-1] + shift}, each once"
            )
    return tuple(table[instance] for instance in range(1, NUM_THINGS + 1))


def panoptic_segments(labels: np.ndarray, instances: np.ndarray, things: Sequence[int]) -> Segments:
    """Returns the segments of an image: stuff of the label map, and instances pasted over it.

    Stuff has its area in the label map, as in the published preparation, and remains a segment
    where things cover all of it. Things of the label map that are no instance are void.

    Args:
      labels: (H, W) uint8, the class of every pixel; IGNORED: none.
      instances: (H, W, 2) uint8, instance class from 1 on, and number of the instance; 0: none.
      things: the classes of the instance classes.

    Raises:
      UserError: an instance class is unknown, or an instance has two.
    """
    stuff = class_segments(np.where(np.isin(labels, things), IGNORED, labels))
    ids, found = stuff.ids.copy(), []
    numbers = instances[..., 1]
    for number in np.unique(numbers[numbers > 0]).tolist():
        mask = numbers == number
        classes = np.unique(instances[mask, 0]).tolist()
        if len(classes) > 1 or not 1 <= classes[0] <= len(things):
            raise UserError(
                f"instance {number} has the class {', '.join(map(str, classes))}; valid: one of "
                f"1 to {len(things)}"
            )
        ids[mask] = _FIRST_THING + number
        found.append((_FIRST_THING + number, things[classes[0] - 1], False, mask.sum()))
    columns = zip(*found, strict=True) if found else ((),) * 4
    added = [
        np.append(old, np.array(column, old.dtype))
        for old, column in zip(stuff[1:], columns, strict=True)
    ]
    return Segments(ids, *added)


def _read(image: Path, label: Path, instances: Path, things: Sequence[int]):
    """Returns the label map and the segments of an image."""
    labels = label_map_files.read_label_map(image, label, label_table(ade20k.LAYOUT.labels))
    try:
        pixels = decode_pixels(instances, labels.shape[::-1])
        return labels, panoptic_segments(labels, pixels[..., :2], things)
    except UserError as error:
        raise UserError(f"{instances}: {error}") from error


def _examples(manual_dir: Path, files: Files, things: Sequence[int]) -> Pairs:
    for number, (image, label, instances) in enumerate(files):
        labels, segments = _read(image, label, instances, things)
        record = panoptic_files.stored(
            read_file(image), encode_ids(segments.ids), segment_entries(segments), number,
            image.relative_to(manual_dir).as_posix(),
        )  # fmt: skip
        yield number, record | {"label": io.BytesIO(label_map_files.encode_labels(labels))}


def _objects(
    files: Files, things: Sequence[int]
) -> Iterator[tuple[int, tuple[int, int], Instances]]:
    for number, paths in enumerate(files):
        labels, segments = _read(*paths, things)
        yield number, labels.shape, ade_instances(segments, things)


def ade_instances(segments: Segments, things: Sequence[int]) -> Instances:
    """Returns the things of an image as objects, whose classes are places in `things`."""
    found = thing_instances(segments, frozenset(things))
    return found._replace(classes=np.array([things.index(c) for c in found.classes], np.int32))
