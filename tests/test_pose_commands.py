"""The commands on a run of poses: evaluate, predict and export."""

import json

import jax
import numpy as np
import pytest
import tiny_pose
from make_task import make_task, open_dataset
from PIL import Image
from random_variables import random_variables

import tokenvit_jax as tv
from tokenvit_jax import evaluate, predict
from tokenvit_jax.data.whole_body import FIELDS, PARTS
from tokenvit_jax.tasks import default_config
from tokenvit_jax.training.exporting import lower
from tokenvit_jax.training.new_run import write_run
from tokenvit_jax.weights.own import named_arrays

SIZE = HEIGHT, WIDTH = 64, 32  # of `tiny_pose`
SIDE, PERSONS, IMAGES = 224, 120, 90  # of the figures


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Returns the folder of a run with random variables, whose scores are about 1."""
    config = tiny_pose.get_config("mta")
    config.dataset = "figures"
    task = make_task(config)
    images = jax.ShapeDtypeStruct((1, *SIZE, 3), np.float32)
    variables = random_variables(task.make_model(), images)
    variables["params"]["head"]["heatmaps"]["bias"] += 1
    workdir = tmp_path_factory.mktemp("pose") / "run"
    write_run(workdir, task.config, variables)
    return workdir


def joined(entry):
    """Returns the keypoints (133, 3) of a person in COCO-WholeBody's format."""
    assert [len(entry[field]) for field in FIELDS] == [
        3 * len(PARTS[part]) for part in FIELDS.values()
    ]
    return np.reshape([x for field in FIELDS for x in entry[field]], (133, 3))


def test_evaluate_writes_persons(run, workdir, tmp_path):
    out = tmp_path / "results.json"
    status, printed, err = run(evaluate, ("workdir",), workdir=workdir, out=out, per_class=True)
    assert (status, err) == (0, "")
    metrics, results = json.loads(printed), json.loads(out.read_text())
    parts = ("", "body_", "foot_", "face_", "left_hand_", "right_hand_", "hand_")
    assert metrics.keys() >= {f"eval/{part}{x}" for part in parts for x in ("ap", "ar", "ap50")}
    assert len(results) == PERSONS and {x["image_id"] for x in results} == {*range(IMAGES)}
    loaded, source = tv.load_run(workdir), open_dataset("figures", "test")
    for index in (0, 2):
        record = source.read(index)
        box = np.array([[*record["person"].box, 1.0]])
        found = loaded.predictor(record["image"], box).arrays
        (entry,) = (
            x for x in results
            if x["image_id"] == record["id"] and np.isclose(x["score"], found["scores"][0])
        )  # fmt: skip
        np.testing.assert_allclose(joined(entry), found["keypoints"][0], atol=1e-2)


def test_evaluate_takes_the_boxes_of_a_detector(run, workdir, tmp_path):
    """Two boxes for the first image and one for another; a second time the same is left out."""
    first, other = (open_dataset("figures", "test").read(i)["person"].box for i in (0, 1))
    entries = [
        {"image_id": image, "category_id": category, "bbox": coco_box(box), "score": score}
        for image, category, box, score in [
            (0, 1, first, 0.9), (0, 1, first, 0.6), (1, 1, other, 0.5), (1, 3, other, 1.0),
        ]
    ]  # fmt: skip
    boxes, out = tmp_path / "boxes.json", tmp_path / "results.json"
    boxes.write_text(json.dumps(entries))
    flags = {"config.data.boxes": boxes, "out": out}
    status, printed, err = run(evaluate, ("workdir",), workdir=workdir, **flags)
    assert (status, err) == (0, "") and "eval/ap" in json.loads(printed)
    results = json.loads(out.read_text())
    assert sorted(x["image_id"] for x in results) == [0, 1]


def coco_box(box):
    left, top, right, bottom = box.tolist()
    return [left, top, right - left, bottom - top]


@pytest.fixture
def images(tmp_path):
    """Returns a folder with an image whose name is a number, and a grey one."""
    draw = np.random.default_rng(0)
    for name, shape in {"000012": (70, 40, 3), "grey": (100, 120)}.items():
        pixels = draw.integers(256, size=shape, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    return tmp_path


def predicted(run, workdir, images, **flags):
    """Returns the rows of the table by name of the image, and the pictures."""
    files = [f"{images}/{name}.png" for name in ("000012", "grey")]
    flags = {"workdir": workdir, "images": ",".join(files), "out": images / "out"} | flags
    status, printed, err = run(predict, ("workdir", "images", "out"), **flags)
    assert (status, err) == (0, "") and len(printed.splitlines()) == 2
    rows = json.loads((images / "out.json").read_text())
    pictures = [Image.open(images / row["pictures"]["skeletons"]) for row in rows]
    return rows, pictures


def test_predict_whole_images(run, workdir, images):
    rows, pictures = predicted(run, workdir, images)
    for row, picture, (width, height) in zip(rows, pictures, [(40, 70), (120, 100)], strict=True):
        (person,) = row["persons"]
        assert person["bbox"] == [0, 0, width, height]
        scale = picture.width // width
        assert picture.size == (scale * width, scale * height)
    loaded = tv.load_run(workdir)
    (found,) = loaded.predict(images / "000012.png")
    np.testing.assert_allclose(joined(rows[0]["persons"][0]), found["keypoints"][0], atol=1e-3)


def test_predict_boxes(run, workdir, images):
    """Identifiers of images are names of files, or the numbers in them."""
    boxes, persons = images / "boxes.json", images / "persons.json"
    entries = [
        {"image_id": 12, "bbox": [2, 3, 30, 50], "score": 0.5},
        {"image_id": "grey", "bbox": [10, 10, 40, 80], "score": 0.8},
        {"image_id": 12, "bbox": [0, 0, 20, 30], "score": 0.9},
        {"image_id": "other", "bbox": [0, 0, 20, 30], "score": 0.9},
    ]
    boxes.write_text(json.dumps(entries))
    rows, _ = predicted(run, workdir, images, boxes=boxes, persons=persons)
    assert [len(row["persons"]) for row in rows] == [2, 1]
    assert [x["bbox"] for x in rows[0]["persons"]] == [[0, 0, 20, 30], [2, 3, 30, 50]]
    found = json.loads(persons.read_text())
    assert [x.pop("image_id") for x in found] == [12, 12, "grey"]
    assert found == rows[0]["persons"] + rows[1]["persons"]
    # Boxes for one of the images only.
    boxes.write_text(json.dumps(entries[1:2]))
    rows, _ = predicted(run, workdir, images, boxes=boxes)
    assert [len(row["persons"]) for row in rows] == [0, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            [{"image_id": 7, "bbox": [0, 0, 9, 9], "score": 1}],
            "has no box for any of the images; v",
        ),
        ([{"image_id": 12, "bbox": [0, 0, 0, 9], "score": 1}], "the last two above 0"),
        ({"a": 1}, "is not in COCO's format of results"),
        (None, "boxes.json"),
    ],
)
def test_wrong_boxes_are_named(run, workdir, images, content, message):
    boxes = images / "boxes.json"
    if content is not None:
        boxes.write_text(json.dumps(content))
    flags = {"images": images / "000012.png", "out": images / "out", "boxes": boxes}
    status, printed, err = run(predict, ("workdir",), workdir=workdir, **flags)
    assert status == 1 and not printed
    assert message in err and len(err.splitlines()) == 1 and not (images / "out").exists()


@pytest.mark.parametrize("flag", ["boxes", "persons"])
def test_boxes_are_for_poses(run, tmp_path, images, flag):
    write_run(tmp_path / "digits", default_config("classification"), {"params": {}})
    flags = {"images": images / "grey.png", "out": images / "out", flag: "x.json"}
    status, _, err = run(predict, ("workdir",), workdir=tmp_path / "digits", **flags)
    assert status == 2
    assert f"--{flag}=x.json is for runs of the task pose; this is one of classification" in err


@pytest.mark.slow
def test_an_exported_model_predicts_the_same(workdir):
    draw = np.random.default_rng(0)
    loaded, pixels = tv.load_run(workdir), draw.integers(256, size=(3, *SIZE, 3), dtype=np.uint8)
    task, model = loaded.task, loaded.model
    exported = lower(task, model, loaded.variables)
    found = jax.jit(exported.call)(named_arrays(loaded.variables), pixels)
    compute = jax.jit(lambda variables, x: task.outputs(model, variables, task.normalize(x)))
    expected = compute(loaded.variables, pixels)
    assert {name: x.shape for name, x in found.items()} == {"heatmaps": (3, 16, 8, 133)}
    heatmaps = expected["heatmaps"]
    assert np.abs(heatmaps[0] - heatmaps[1]).max() > 1e-2
    np.testing.assert_allclose(found["heatmaps"], heatmaps, atol=1e-4 * np.abs(heatmaps).max())
