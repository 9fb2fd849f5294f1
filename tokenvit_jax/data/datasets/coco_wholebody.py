"""COCO-WholeBody: persons in COCO's photographs, with 133 keypoints each.

Every person is a record of its own. Image files are stored unchanged, once for all their persons.
Evaluation takes the annotated boxes, or those of a detector (`data.boxes`), and compares with all
persons of the evaluation split as they are in the file. Nothing is downloaded.

References:
  Jin et al. 2020, "Whole-Body Human Pose Estimation in the Wild".
"""

import functools
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from tokenvit_jax.data.datasets import coco
from tokenvit_jax.data.datasets.coco_files import Layout
from tokenvit_jax.data.datasets.coco_json import (
    AREA,
    BOX,
    CATEGORY_FIELDS,
    ID,
    IMAGE_FIELDS,
    Entries,
    Rule,
    are_finite,
    box_fault,
    category_labels,
    check_files,
    check_identifiers,
    check_size,
    note_faults,
    read_entries,
)
from tokenvit_jax.data.files import read_file
from tokenvit_jax.data.person_boxes import PersonBox, check_images, read_boxes
from tokenvit_jax.data.record import DatasetInfo, Person, Record
from tokenvit_jax.data.tfds_files import (
    Pairs,
    TfdsSource,
    is_prepared,
    open_records,
    read_metadata,
    write_splits,
)
from tokenvit_jax.data.whole_body import FIELDS, PARTS, WHOLE_BODY, join_fields

LAYOUT = Layout(
    images=coco.LAYOUT.images,
    annotations={
        "train": "annotations/coco_wholebody_train_v1.0.json",
        "val": "annotations/coco_wholebody_val_v1.0.json",
    },
    how_to_get="valid: the folder with the unpacked train2017.zip and val2017.zip of COCO, and "
    "with the files of COCO-WholeBody, annotations/coco_wholebody_train_v1.0.json and "
    "annotations/coco_wholebody_val_v1.0.json",
)
INFO = DatasetInfo(
    name="coco_wholebody",
    splits={"train": 149_813, "val": 6352},
    train_split="train",
    eval_split="val",
    fields=frozenset({"image", "person"}),
    num_classes=1,
    classes=("person",),
    skeleton=WHOLE_BODY,
)
FOLDER = "pose/coco_wholebody"
VERSION = "1.0.0"


def open_split(config: ConfigDict, split: str) -> "WholeBodySource":
    """Opens a split for reading; the evaluation split has the boxes of `data.boxes`, if given."""
    boxes = config.data.get("boxes", "") if split == INFO.eval_split else ""
    return WholeBodySource(split, config.data.data_dir, boxes)


def annotations(config: ConfigDict, split: str) -> dict[str, Any]:
    """Returns all persons of the evaluation split in COCO's format, with all their keypoints.

    Args:
      config: as in :func:`open_split`.
      split: the evaluation split.

    Returns:
      "images", "annotations", whose "keypoints" are all 133, "categories", and "records": the
      identifier of the image of every record.
    """
    truth = read_metadata(FOLDER, config.data.data_dir)["ground_truth"][split]
    return truth | {"records": open_split(config, split).image_ids()}


class WholeBodySource(TfdsSource):
    """Persons with their images.

    Args:
      split: "train" or "val".
      data_dir: the folder that `prepare` wrote into.
      boxes: a detector's results in COCO's format, which take the place of the annotated persons;
        "": none.
    """

    def __init__(self, split: str, data_dir: str, boxes: str = ""):
        records = open_records(INFO.name, split, data_dir, FOLDER)
        super().__init__(INFO.name, split, records)
        stored = read_metadata(FOLDER, data_dir)["stored"][split]
        self._ids = [entry["image_id"] for entry in stored]
        self._boxes: list[PersonBox] = read_boxes(boxes) if boxes else []
        if boxes:
            check_images(boxes, self._boxes, self._ids)
            places = {image: place for place, image in enumerate(self._ids)}
            self._images = np.array([places[box.image] for box in self._boxes])
        else:
            counts = np.array([entry["persons"] for entry in stored])
            self._images = np.repeat(np.arange(len(counts)), counts)
            self._first = np.cumsum(counts) - counts  # record of the first person of an image

    def __len__(self) -> int:
        return len(self._images)

    def image_ids(self) -> list[int]:
        """Returns the identifier of the image of every record."""
        return [self._ids[image] for image in self._images]

    def stored(self, index: int) -> Entries:
        """See :class:`tokenvit_jax.data.tfds_files.TfdsSource`."""
        return {**self._records[int(self._images[index])], "index": index}

    def ground_truth(self, features: Entries, image: Image.Image) -> Record:
        """See :class:`tokenvit_jax.data.tfds_files.TfdsSource`."""
        index, number = features["index"], int(features["image_id"])
        if self._boxes:
            return Record(id=number, person=self._boxes[index].person(len(WHOLE_BODY.names)))
        entry = json.loads(features["persons"])[index - self._first[self._images[index]]]
        keypoints = np.array(entry["keypoints"], np.float32).reshape(-1, 3)
        return Record(id=number, person=Person(np.array(entry["box"], np.float32), keypoints))


def prepare(manual_dir: Path, data_dir: Path) -> Path:
    """Writes the dataset as ArrayRecord files; does nothing if they exist.

    Records are the persons with a labelled body point who are no crowd. Boxes without area, thinner
    than a pixel, or outside of their image are left out; the others are clipped to the image.
    Training images without persons are left out; evaluation images are not, as a detector may find
    persons there.

    Args:
      manual_dir: folder with the unpacked archives.
      data_dir: receives the folder `pose/coco_wholebody/1.0.0`.

    Returns:
      The folder with the files.

    Raises:
      UserError: a file is missing or malformed, such as with another number of keypoints, an
        identifier occurs twice, a category is unknown, or an image has another size than the
        annotations say; the message names the file and the identifier.
    """
    folder = data_dir / FOLDER / VERSION
    if is_prepared(folder):
        return folder
    files = {split: _read(manual_dir, split) for split in LAYOUT.images}
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Image(),
        "image_id": np.int64,
        "persons": tfds.features.Text(),
        "file_name": tfds.features.Text(),
    }
    persons = {split: _persons(path, content) for split, (path, content) in files.items()}
    kept = {
        split: [
            image
            for image in content["images"]
            if split != INFO.train_split or image["id"] in persons[split]
        ]
        for split, (_, content) in files.items()
    }
    for split, (path, _) in files.items():
        check_files(manual_dir / LAYOUT.images[split], path, kept[split])
    metadata = {
        "stored": {
            split: [
                {"image_id": image["id"], "persons": len(persons[split].get(image["id"], ()))}
                for image in images
            ]
            for split, images in kept.items()
        },
        "ground_truth": {INFO.eval_split: _ground_truth(files[INFO.eval_split][1])},
    }
    splits = {
        split: _examples(manual_dir / LAYOUT.images[split], images, persons[split])
        for split, images in kept.items()
    }
    write_splits(
        data_dir, FOLDER, VERSION, features, splits,
        metadata=tfds.core.MetadataDict(metadata), disable_shuffling=True,
    )  # fmt: skip
    return folder


def _read(manual_dir: Path, split: str) -> tuple[Path, Entries]:
    """Returns a file of annotations and its content, which has been checked."""
    path = manual_dir / LAYOUT.annotations[split]
    content = read_entries(path, manual_dir, LAYOUT.how_to_get, _FIELDS)
    check_identifiers(path, content)
    category_labels(path, content["categories"], INFO)
    return path, content


def _points(part: str) -> Rule:
    count = len(PARTS[part])
    valid = f"x, y and visibility of {count} points, {3 * count} numbers"
    return functools.partial(are_finite, count=3 * count), valid


# Kind of an entry -> a field -> whether a value is right, and which ones are.
_FIELDS: dict[str, dict[str, Rule]] = {
    "images": IMAGE_FIELDS,
    "annotations": {
        "id": ID,
        "image_id": ID,
        "category_id": ID,
        "bbox": BOX,
        "area": AREA,
        **{field: _points(part) for field, part in FIELDS.items()},
    },
    "categories": CATEGORY_FIELDS,
}


def _persons(path: Path, content: Entries) -> dict[int, list[Entries]]:
    """Returns identifier of an image -> its persons: boxes x1 y1 x2 y2, and all keypoints."""
    images = {image["id"]: image for image in content["images"]}
    found: dict[int, list[Entries]] = {}
    faults: list[tuple[int, str]] = []
    for entry in content["annotations"]:
        if entry.get("iscrowd") or not any(v > 0 for v in entry["keypoints"][2::3]):
            continue
        image = images[entry["image_id"]]
        fault = box_fault(entry, image)
        if fault:
            faults.append((entry["id"], fault))
            continue
        left, top, width, height = entry["bbox"]
        box = [
            max(left, 0),
            max(top, 0),
            min(left + width, image["width"]),
            min(top + height, image["height"]),
        ]
        person = {"box": box, "keypoints": join_fields(entry)["keypoints"]}
        found.setdefault(image["id"], []).append(person)
    note_faults(path, faults)
    return found


def _ground_truth(content: Entries) -> Entries:
    """Returns what evaluation compares with."""
    names = "id", "image_id", "category_id", "bbox", "area", "keypoints"
    persons = [
        {name: entry[name] for name in names} | {"iscrowd": int(bool(entry.get("iscrowd")))}
        for entry in map(join_fields, content["annotations"])
    ]
    others = {
        kind: [{name: entry[name] for name in fields} for entry in content[kind]]
        for kind, fields in {"images": IMAGE_FIELDS, "categories": CATEGORY_FIELDS}.items()
    }
    return others | {"annotations": persons}


def _examples(folder: Path, images: list[Entries], persons: dict[int, list[Entries]]) -> Pairs:
    for number, image in enumerate(images):
        path = folder / image["file_name"]
        content = read_file(path)
        check_size(path, content, image)
        yield (
            number,
            {
                "image": io.BytesIO(content),
                "image_id": image["id"],
                "persons": json.dumps(persons.get(image["id"], [])),
                "file_name": image["file_name"],
            },
        )
