"""Datasets in COCO's format: preparation, records, and messages for bad input."""

import copy
import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tokenvit_jax.data.box_transforms import MASK_SIDE, View, view_boxes, view_masks
from tokenvit_jax.data.datasets import coco, coco_files, coco_json, scene_instances
from tokenvit_jax.data.datasets.coco_files import CocoSource, Layout
from tokenvit_jax.data.record import DatasetInfo
from tokenvit_jax.errors import UserError
from tokenvit_jax.run_lengths import decode_mask

GOLDEN = Path(__file__).parent / "golden" / "coco"
LAYOUT = Layout(
    images={"train": "train", "val": "val"},
    annotations={"train": "train.json", "val": "val.json"},
    how_to_get="valid: a folder",
)


@functools.cache
def ground_truth():
    return json.loads((GOLDEN / "ground_truth.json").read_text())


INFO = dataclasses.replace(
    coco.INFO, name="few", num_classes=5,
    classes=tuple(entry["name"] for entry in ground_truth()["categories"]),
)  # fmt: skip


def write_files(folder: Path, content=None) -> Path:
    """Writes images of one colour, and both files of annotations; returns the folder."""
    content = content or ground_truth()
    for split in ("train", "val"):
        (folder / split).mkdir(parents=True)
        (folder / f"{split}.json").write_text(json.dumps(content))
        for number, image in enumerate(ground_truth()["images"]):
            size = image["width"], image["height"]
            Image.new("RGB", size, (number, 0, 0)).save(folder / split / image["file_name"], "PNG")
    return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    data_dir = folder / "data"
    coco_files.prepare(INFO, LAYOUT, write_files(folder / "manual"), data_dir)
    return data_dir


def test_training_records_are_those_of_the_reference(prepared):
    source = CocoSource(INFO, "train", str(prepared))
    expected = json.loads((GOLDEN / "loader.json").read_text())["training_images"]
    assert len(source) == len(expected)
    for index, wanted in enumerate(expected):
        record = source.read(index)
        instances = record["instances"]
        assert record["id"] == wanted["image_id"]
        assert record["image"].size == (wanted["width"], wanted["height"])
        boxes = np.array(wanted["boxes_xyxy"], np.float32).reshape(-1, 4)
        np.testing.assert_array_equal(instances.boxes, boxes)
        assert instances.classes.tolist() == wanted["labels"]
        assert instances.crowd.tolist() == list(map(bool, wanted["crowd"]))
    portrait = [image["height"] > image["width"] for image in expected]
    assert source.portrait().tolist() == portrait and True in portrait


def test_masks_are_those_of_pycocotools_bit_for_bit(prepared):
    source, golden = (
        CocoSource(INFO, "val", str(prepared)),
        np.load(GOLDEN / "annotation_masks.npz"),
    )
    compared = 0
    for index in range(len(source)):
        record = source.read(index)
        size = record["image"].size[::-1]
        entries = [e for e in ground_truth()["annotations"] if e["image_id"] == record["id"]]
        image = ground_truth()["images"][index]
        entries = [entry for entry in entries if not coco_json.box_fault(entry, image)]
        assert len(entries) == len(record["instances"].masks)
        for entry, counts in zip(entries, record["instances"].masks, strict=True):
            bits = np.unpackbits(golden[str(entry["id"])])[: size[0] * size[1]]
            np.testing.assert_array_equal(decode_mask(counts, size), bits.reshape(size))
            compared += 1
    assert compared > 30


def test_evaluation_compares_with_the_file_itself(prepared):
    found = coco_files.read_annotations(INFO.name, str(prepared), "val")
    assert found == {name: ground_truth()[name] for name in found}
    source = CocoSource(INFO, "val", str(prepared))
    images = [source.read(index)["id"] for index in range(len(source))]
    assert images == [image["id"] for image in found["images"]]


def test_a_prepared_dataset_is_left_as_it_is(prepared):
    assert coco_files.prepare(INFO, LAYOUT, Path("nowhere"), prepared).parent.parent.is_dir()


def changed(**changes):
    """Returns the annotations with other values in the first annotation, image or category."""
    content = copy.deepcopy(ground_truth())
    for name, (kind, key, value) in changes.items():
        content[kind][0 if name != "second" else 1][key] = value
    return content


BAD = {
    "category": (
        changed(a=("annotations", "category_id", 77)),
        "train.json: annotation 1 has category_id 77, which the file does not list",
    ),
    "image": (
        changed(a=("annotations", "image_id", 5)),
        "train.json: annotation 1 has image_id 5, which the file does not list",
    ),
    "twice": (
        changed(second=("annotations", "id", 1)),
        "train.json: annotations have the id 1 twice; valid: one each",
    ),
    "names": (
        changed(a=("categories", "name", "horse")),
        "train.json: the categories are not those of few: 'horse', not 'person'",
    ),
    "file": (changed(a=("images", "file_name", "none.jpg")), "none.jpg not found, image 1000 of "),
    "size": (
        changed(a=("images", "width", 161)),
        "has 160 x 120 pixels; image 1000 of the annotations has 161 x 120 (width x height)",
    ),
    "mask": (
        changed(a=("annotations", "segmentation", {"size": [9, 9], "counts": [81]})),
        "annotation 1 has a mask of 9 x 9 pixels; its image has 120 x 160 (height x width)",
    ),
    "runs": (
        changed(a=("annotations", "segmentation", {"size": [120, 160], "counts": [5, 6]})),
        "annotation 1: its mask cannot be read (its runs have another number of pixels",
    ),
    "format": (
        {**ground_truth(), "images": [{"width": 3}]},
        "train.json: images: entry at place 0 has no id; valid: a whole number",
    ),
    "list": (
        {**ground_truth(), "images": 3},
        "train.json is not in COCO's format (TypeError: 'int' object is not iterable); valid: ",
    ),
    "box": (
        changed(a=("annotations", "bbox", [1, 2, float("nan"), 4])),
        "annotations: entry 1 has bbox=[1, 2, nan, 4]; valid: x, y, width and height",
    ),
    "area": (changed(a=("annotations", "area", None)), "entry 1 has area=None; valid: a number"),
    "side": (changed(a=("images", "height", 0)), "images: entry 1000 has height=0; valid: a "),
    "no mask": (
        changed(a=("annotations", "segmentation", "x")),
        "entry 1 has segmentation='x'; valid: a list of polygons, or size and counts of run ",
    ),
    "far": (
        changed(a=("annotations", "segmentation", [[0, 0, 1e8, 0, 0, 1e8]])),
        "annotation 1: its mask cannot be read (a polygon lies far outside of the image)",
    ),
    "polygon": (
        changed(a=("annotations", "segmentation", [[1, 2]])),
        "annotation 1: its mask cannot be read (",
    ),
    "no polygon": (
        changed(a=("annotations", "segmentation", [])),
        "annotation 1: its mask cannot be read (",
    ),
}


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("images") / "manual")


@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_file_and_identifier(name, image_folder, tmp_path):
    content, message = BAD[name]
    (image_folder / "train.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        coco_files.prepare(INFO, LAYOUT, image_folder, tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "detection/few/1.0.0").exists()


def test_annotations_that_are_left_out_are_noted(image_folder, tmp_path, capsys):
    content = changed(
        a=("annotations", "bbox", [500, 0, 10, 10]), second=("annotations", "area", 0)
    )
    (image_folder / "train.json").write_text(json.dumps(content))
    coco_files.prepare(INFO, LAYOUT, image_folder, tmp_path)
    noted = "".join(capsys.readouterr())
    assert "train.json: annotation 1 has a box outside of its image: left out" in noted
    assert "train.json: annotation 2 has no area: left out" in noted
    instances = CocoSource(INFO, "train", str(tmp_path)).read(0)["instances"]
    assert len(instances.classes) == 5


def test_missing_annotations_say_what_is_needed(tmp_path):
    with pytest.raises(UserError, match=r"train.json not found in --manual_dir=.*valid: a folder"):
        coco_files.prepare(INFO, LAYOUT, tmp_path, tmp_path)


def test_scenes_written_as_coco_files_are_read_back(tmp_path):
    content = scene_instances.annotations(None, "test")
    few = {image["id"] for image in content["images"][:5]}
    content = {
        "categories": content["categories"],
        "images": [entry for entry in content["images"] if entry["id"] in few],
        "annotations": [entry for entry in content["annotations"] if entry["image_id"] in few],
    }
    scenes = scene_instances.SceneInstancesSource("test")
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
        for entry in content["images"]:
            scenes.read(entry["id"])["image"].save(tmp_path / split / entry["file_name"])
    info = DatasetInfo(
        name="scenes", splits={}, train_split="train", eval_split="val", fields=coco.INFO.fields,
        num_classes=4, classes=scene_instances.INFO.classes,
    )  # fmt: skip
    coco_files.prepare(info, LAYOUT, tmp_path, tmp_path)
    source = CocoSource(info, "train", str(tmp_path))
    for index in range(len(source)):
        found, wanted = source.read(index), scenes.read(index)
        np.testing.assert_array_equal(np.asarray(found["image"]), np.asarray(wanted["image"]))
        for a, b in zip(found["instances"], wanted["instances"], strict=True):
            np.testing.assert_array_equal(a, b)


def test_masks_of_a_view_are_those_of_the_moved_image():
    mask = np.zeros((40, 60), bool)
    mask[5:25, 10:40] = np.random.default_rng(0).random((20, 30)) < 0.5
    objects = scene_instances.instances_of([mask], [0])
    view = View((6.0, 3.0, 54.0, 39.0), (96, 72), flip=True)  # twice as large
    boxes = view_boxes(objects.boxes, view)
    np.testing.assert_allclose(boxes, [[96 - 2 * 34, 4, 96 - 2 * 4, 44]])
    bits = view_masks(objects.masks, (60, 40), boxes, view)
    found = np.unpackbits(bits[0], axis=1)[:, :MASK_SIDE].astype(bool)
    rows = 5 + ((np.arange(MASK_SIDE) + 0.5) / MASK_SIDE * 20).astype(int)
    columns = 10 + (30 - (np.arange(MASK_SIDE) + 0.5) / MASK_SIDE * 30).astype(int)
    np.testing.assert_array_equal(found, mask[rows[:, None], columns])
