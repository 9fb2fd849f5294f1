"""COCO-WholeBody: preparation, records, boxes of a detector, and messages for bad input."""

import copy
import json

import numpy as np
import pytest
from make_task import open_dataset
from PIL import Image

from tokenvit_jax import prepare
from tokenvit_jax.config import base_config
from tokenvit_jax.data.datasets import builtin_info, coco_wholebody, figures, open_annotations
from tokenvit_jax.data.datasets.coco_wholebody import LAYOUT, WholeBodySource
from tokenvit_jax.data.datasets.figures import SIDE, FiguresSource
from tokenvit_jax.data.person_boxes import read_boxes
from tokenvit_jax.data.whole_body import FIELDS, PARTS, split_fields
from tokenvit_jax.errors import UserError

IMAGES = 9


def few(split):
    """Returns the first figures as a file of COCO-WholeBody; drawing all takes seconds."""
    source = FiguresSource(split)
    drawn = [source.draw(image) for image in range(IMAGES)]
    places = [source.place(index) for index in range(len(source))]
    entries = [
        {"id": number, "image_id": image, **figures._annotation(drawn[image], place)}
        for number, (image, place) in enumerate(places, 1)
        if image < IMAGES
    ]
    return {
        "images": [
            {"id": image, "height": SIDE, "width": SIDE, "file_name": f"{image}.png"}
            for image in range(IMAGES)
        ],
        "annotations": [split_fields(entry) for entry in entries],
        "categories": [{"id": 1, "name": "person", "supercategory": "person"}],
    }


def write_files(folder, contents):
    """Writes figures as COCO-WholeBody's files; returns the folder."""
    for split, source in {"train": "train", "val": "test"}.items():
        images = folder / LAYOUT.images[split]
        images.mkdir(parents=True, exist_ok=True)
        file = folder / LAYOUT.annotations[split]
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(contents[split]))
        for number in range(IMAGES):
            FiguresSource(source).draw(number).image.save(images / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def contents():
    return {"train": few("train"), "val": few("test")}


def edited(contents):
    """Returns files with a fraction of visibility, and with persons that are no records."""
    found = copy.deepcopy(contents)
    train, val = found["train"]["annotations"], found["val"]["annotations"]
    train[0]["foot_kpts"][2::3] = [0.3] * 6
    train[0]["bbox"] = [-10.5, 3.25, 500.0, 100.0]
    for name in FIELDS:
        train[1][name] = [0.0] * len(train[1][name])  # the only figure of image 1
    train[2]["iscrowd"] = 1  # the first one of image 2
    train[4]["bbox"] = [500, 0, 10, 10]  # image 3 has another one
    val[0]["keypoints"] = [0.0] * 51
    return found


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, contents):
    folder = tmp_path_factory.mktemp("wholebody")
    write_files(folder / "manual", edited(contents))
    coco_wholebody.prepare(folder / "manual", folder / "data")
    return str(folder / "data")


def test_records_are_the_figures_that_were_written(prepared, contents):
    source, original = WholeBodySource("val", prepared), FiguresSource("test")
    entries = contents["val"]["annotations"]
    assert len(source) == len(entries) - 1  # one has no body point
    for index in range(len(source)):
        found, wanted = source.read(index), original.read(index + 1)
        assert set(found) == {"id", *builtin_info("coco_wholebody").fields}
        assert found["id"] == wanted["id"] == source.image_ids()[index]
        np.testing.assert_array_equal(np.asarray(found["image"]), np.asarray(wanted["image"]))
        for a, b in zip(found["person"], wanted["person"], strict=True):
            np.testing.assert_array_equal(a, b)
            assert np.asarray(a).dtype == np.asarray(b).dtype
    assert source.name(2) == "coco_wholebody split 'val', record 2 (2.png)"


def test_training_records_are_persons_with_body_points_and_boxes(prepared, contents):
    source = WholeBodySource("train", prepared)
    entries = contents["train"]["annotations"]
    left = [entry for i, entry in enumerate(entries) if i not in (1, 2, 4)]
    assert source.image_ids() == [entry["image_id"] for entry in left]
    assert len(source._records) == len({*source.image_ids()}) == IMAGES - 2  # images 1 and 3
    for index, entry in enumerate(left):
        person = source.read(index)["person"]
        expected = np.concatenate([entry[name] for name in FIELDS]).reshape(133, 3)
        if index == 0:
            expected[PARTS["foot"], 2] = 0.3
            assert person.box.tolist() == [0, 3.25, SIDE, 103.25]
        np.testing.assert_array_equal(person.keypoints, expected.astype(np.float32))


def test_evaluation_compares_with_all_persons_of_the_file(prepared, contents):
    config = base_config()
    config.dataset, config.data.data_dir = "coco_wholebody", prepared
    found, wanted = open_annotations(config, "val"), contents["val"]
    assert [image["id"] for image in found["images"]] == list(range(IMAGES))
    assert len(found["annotations"]) == len(wanted["annotations"])
    for entry, other in zip(found["annotations"][1:], wanted["annotations"][1:], strict=True):
        assert entry["keypoints"] == [number for name in FIELDS for number in other[name]]
        assert entry["area"] == other["area"] and entry["iscrowd"] == 0
    assert found["records"] == WholeBodySource("val", prepared).image_ids()


def test_left_out_boxes_are_noted_and_a_prepared_dataset_is_left_as_it_is(
    tmp_path, contents, capsys
):
    folder = write_files(tmp_path / "manual", edited(contents))
    coco_wholebody.prepare(folder, tmp_path / "data")
    noted = "".join(capsys.readouterr())
    assert "train_v1.0.json: annotation 5 has a box outside of its image: left out (the" in noted
    assert noted.count("left out") == 1
    again = coco_wholebody.prepare(folder / "nowhere", tmp_path / "data")
    assert again == tmp_path / "data" / "pose/coco_wholebody/1.0.0" and again.is_dir()


def test_the_command_counts_persons(prepared, capsys):
    flag_values = copy.deepcopy(prepare.FLAGS)
    flag_values(["prepare", f"--data_dir={prepared}"])
    prepare.main(flag_values, "coco_wholebody")
    counts = {split: len(WholeBodySource(split, prepared)) for split in ("train", "val")}
    printed = capsys.readouterr().out
    assert f"train: {counts['train']} records, not 149,813" in printed
    assert f"val: {counts['val']} records, not 6,352" in printed
    assert counts["train"] > IMAGES - 2  # images with persons


def changed(content, kind, key, value):
    content = copy.deepcopy(content)
    content[kind][0][key] = value
    return content


BAD = {
    "body": (
        ("annotations", "keypoints", [1, 2, 2] * 16),
        "train_v1.0.json: annotations: entry 1 has keypoints=[1, 2, 2, 1, ",
    ),
    "feet": (
        ("annotations", "foot_kpts", [0] * 9),
        "entry 1 has foot_kpts=[0, 0, 0, 0, 0, 0, 0, 0, 0]; valid: x, y and visibility of 6 ",
    ),
    "face": (
        ("annotations", "face_kpts", [0] * 5),
        "has face_kpts=[0, 0, 0, 0, 0]; valid: x, y and visibility of 68 points, 204 numbers",
    ),
    "hand": (
        ("annotations", "righthand_kpts", None),
        "entry 1 has righthand_kpts=None; valid: x, y and visibility of 21 points, 63 numbers",
    ),
    "nan": (
        ("annotations", "foot_kpts", [float("nan")] * 18),
        "entry 1 has foot_kpts=[nan, nan, nan",
    ),
    "box": (
        ("annotations", "bbox", [1, 2, 3]),
        "annotations: entry 1 has bbox=[1, 2, 3]; valid: x, y, width and height",
    ),
    "image": (
        ("annotations", "image_id", 77),
        "train_v1.0.json: annotation 1 has image_id 77, which the file does not list",
    ),
    "category": (
        ("categories", "name", "horse"),
        "the categories are not those of coco_wholebody: 'horse', not 'person'",
    ),
    "file": (("images", "file_name", "none.png"), "none.png not found, image 0 of "),
    "size": (
        ("images", "width", SIDE + 1),
        "has 224 x 224 pixels; image 0 of the annotations has 225 x 224 (width x height)",
    ),
}


@pytest.fixture(scope="module")
def manual(tmp_path_factory, contents):
    return write_files(tmp_path_factory.mktemp("bad") / "manual", contents)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_file_and_identifier(name, manual, contents, tmp_path):
    change, message = BAD[name]
    (manual / LAYOUT.annotations["train"]).write_text(
        json.dumps(changed(contents["train"], *change))
    )
    with pytest.raises(UserError) as error:
        coco_wholebody.prepare(manual, tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert name != "body" or "; valid: x, y and visibility of 17 points, 51" in str(error.value)
    assert not (tmp_path / "pose/coco_wholebody/1.0.0").exists()


def test_keypoints_of_the_body_alone_are_refused(manual, contents, tmp_path):
    content = copy.deepcopy(contents["train"])
    for entry in content["annotations"]:
        del entry["face_kpts"]
    (manual / LAYOUT.annotations["train"]).write_text(json.dumps(content))
    with pytest.raises(UserError, match="annotations: entry 1 has no face_kpts; valid: x, y and"):
        coco_wholebody.prepare(manual, tmp_path)


def test_missing_annotations_say_what_is_needed(tmp_path):
    with pytest.raises(UserError, match=r"v1.0.json not found in --manual_dir=.*the files of"):
        coco_wholebody.prepare(tmp_path, tmp_path)


# ------------------------------------------------------------------------------------------------
# Boxes of a detector
# ------------------------------------------------------------------------------------------------

BOXES = [
    {"image_id": 5, "category_id": 1, "bbox": [10.5, 20, 30, 40], "score": 0.75},
    {"image_id": 2, "category_id": 18, "bbox": [0, 0, 0, 0], "score": 0.9},
    {"image_id": 1, "category_id": 1, "bbox": [-3, 1, 100, 300.5], "score": 0.5},
    {"image_id": 5, "category_id": 1, "bbox": [0, 0, 9, 9], "score": 0.25},
]
WANTED = [[10.5, 20, 40.5, 60], [-3, 1, 97, 301.5], [0, 0, 9, 9]]


def boxes_file(folder, content=None):
    file = folder / "boxes.json"
    file.write_text(json.dumps(BOXES if content is None else content))
    return str(file)


@pytest.mark.parametrize("dataset", ["coco_wholebody", "figures"])
def test_boxes_of_a_detector_take_the_place_of_persons(dataset, prepared, tmp_path):
    config = base_config()
    config.dataset, config.data.data_dir = dataset, prepared
    config.data.boxes = boxes_file(tmp_path)
    split = builtin_info(dataset).eval_split
    source, images = open_dataset(dataset, split, prepared), [5, 1, 5]
    annotated = {source.read(index)["id"]: source.read(index)["image"] for index in range(9)}
    module = {"coco_wholebody": coco_wholebody, "figures": figures}[dataset]
    source = module.open_split(config, split)
    assert len(source) == 3 and source.image_ids() == images
    for index, (box, score) in enumerate(zip(WANTED, (0.75, 0.5, 0.25), strict=True)):
        record = source.read(index)
        assert record["id"] == images[index]
        assert record["person"].box.tolist() == box and record["person"].score == score
        assert record["person"].keypoints.shape == (133, 3)
        assert not record["person"].keypoints.any()
        np.testing.assert_array_equal(np.asarray(record["image"]), annotated[record["id"]])
    assert open_annotations(config, split)["records"] == images
    train = module.open_split(config, "train")
    assert train.read(0)["person"].score == 1 and train.read(0)["person"].keypoints.any()


BAD_BOXES = {
    "area": (
        [{**BOXES[0], "bbox": [1, 2, 0, 4]}],
        "boxes.json: box 0 has bbox=[1, 2, 0, 4]; valid: x, y, width and height, the last two ",
    ),
    "nan": ([{**BOXES[0], "bbox": [1, 2, float("nan"), 4]}], "box 0 has bbox=[1, 2, nan, 4]"),
    "score": ([BOXES[0], {**BOXES[0], "score": "x"}], "box 1 has score='x'; valid: a number"),
    "image": ([{"bbox": [1, 2, 3, 4], "score": 1}], "box 0 has no image_id; valid: a whole numb"),
    "other": ([BOXES[1]], "boxes.json has no box of a person; valid: at least one"),
    "list": ({"a": 1}, "boxes.json is not in COCO's format of results (ValueError: "),
    "number": (3, "boxes.json is not in COCO's format of results (TypeError: "),
}


@pytest.mark.parametrize("name", BAD_BOXES)
def test_bad_boxes_are_named(name, tmp_path):
    content, message = BAD_BOXES[name]
    with pytest.raises(UserError) as error:
        read_boxes(boxes_file(tmp_path, content))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("dataset", ["coco_wholebody", "figures"])
def test_boxes_of_an_unknown_image_are_named(dataset, prepared, tmp_path):
    file = boxes_file(tmp_path, [{**BOXES[0], "image_id": 12345}])
    with pytest.raises(UserError, match="belong to image 12345, which the evaluation split does"):
        if dataset == "figures":
            FiguresSource("test", file)
        else:
            WholeBodySource("val", prepared, file)


def test_missing_boxes_are_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.json"):
        read_boxes(tmp_path / "none.json")


def test_damaged_images_are_named(manual, contents, tmp_path):
    (manual / LAYOUT.annotations["train"]).write_text(json.dumps(contents["train"]))
    folder = tmp_path / "manual"
    write_files(folder, contents)
    Image.new("RGB", (SIDE, SIDE)).save(folder / LAYOUT.images["train"] / "0.png")
    (folder / LAYOUT.images["train"] / "0.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"0\.png: cannot decode 8 bytes as an image"):
        coco_wholebody.prepare(folder, tmp_path / "data")
