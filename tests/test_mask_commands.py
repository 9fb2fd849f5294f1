"""The commands on a run of segmentation by masks: evaluate, predict, export, expedite."""

import json

import jax
import numpy as np
import pytest
from make_task import make_task, open_dataset
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from random_variables import random_variables
from timings import without_timings
from tiny_masks import get_config

import tokenvit_jax as tv
from tokenvit_jax import evaluate, expedite, predict
from tokenvit_jax.data import open_annotations
from tokenvit_jax.expediting import rivals, search
from tokenvit_jax.metrics.coco import NUMBERS
from tokenvit_jax.run_lengths import decode_mask
from tokenvit_jax.training.exporting import lower
from tokenvit_jax.training.new_run import write_run
from tokenvit_jax.weights.own import named_arrays

LOW, HIGH = 64, 96  # sides of the canvas
SIDE, IMAGES = 128, 200  # of the scenes, and their number
CLASSES, QUERIES = 6, 6


def write_random_run(workdir, config):
    """Writes a run with random variables, with which many classes are certain."""
    task = make_task(config)
    images = jax.ShapeDtypeStruct((1, LOW, HIGH, 3), np.float32)
    variables = jax.tree_util.tree_map_with_path(
        lambda path, x: x + 1 if path[-1].key == "scale" else x,
        random_variables(task.make_model(), images),
    )
    variables["params"]["head"]["decoder"]["classifier"]["kernel"] *= 4
    write_run(workdir, task.config, variables)


@pytest.fixture(scope="module")
def certain(tmp_path_factory):
    """Returns the folder of a run of panoptic segmentation."""
    workdir = tmp_path_factory.mktemp("masks") / "run"
    write_random_run(workdir, get_config())
    return workdir


def evaluated(run, workdir, out, **flags):
    """Returns the metrics of an evaluation, and the results in the file that it writes."""
    status, printed, err = run(evaluate, ("workdir",), workdir=workdir, out=out, **flags)
    assert (status, err) == (0, "")
    return json.loads(printed), json.loads(out.read_text())


def decoded(entry):
    assert entry["segmentation"]["size"] == [SIDE, SIDE]
    return decode_mask(entry["segmentation"]["counts"], (SIDE, SIDE))


def test_results_of_panoptic_segmentation_are_the_predictions(run, certain, tmp_path):
    metrics, results = evaluated(run, certain, tmp_path / "results.json")
    assert metrics.keys() >= {"eval/pq", "eval/sq_things", "eval/rq_stuff"}
    assert [entry["image_id"] for entry in results] == [*range(IMAGES)]
    assert sum(len(entry["segments"]) for entry in results) > IMAGES / 2
    for entry in results:
        covered = sum((decoded(x).astype(int) for x in entry["segments"]), np.zeros(1, int))
        assert covered.max() <= 1
    source = open_dataset("scene_segments", "test")
    loaded = tv.load_run(certain)
    for index in (0, 1):
        (found,) = loaded.predict(source.read(index)["image"])
        segments = results[index]["segments"]
        assert [x["class"] for x in segments] == found["classes"].tolist()
        for number, segment in enumerate(segments, 1):
            assert (decoded(segment) != (found["ids"] == number)).sum() <= 5


@pytest.mark.slow
def test_a_panoptic_run_is_evaluated_as_a_semantic_one(run, certain, tmp_path):
    flags = {"config.inference.kind": "semantic", "per_class": True}
    metrics, results = evaluated(run, certain, tmp_path / "results.json", **flags)
    assert [entry["image_id"] for entry in results] == [*range(IMAGES)]
    source, right, either = open_dataset("scene_segments", "test"), np.zeros(6), np.zeros(6)
    for entry in results:
        segments, rest = source.read(entry["image_id"])["segments"], np.ones((SIDE, SIDE), bool)
        labels = np.append(-1, segments.classes)[segments.ids]
        found = np.full((SIDE, SIDE), -1)
        for segment in entry["segments"]:
            mask = decoded(segment)
            assert rest[mask].all()
            rest &= ~mask
            found[mask] = segment["class"]
        assert not rest.any()  # every pixel has a class
        for label in range(CLASSES):
            right[label] += ((found == label) & (labels == label)).sum()
            either[label] += ((found == label) | (labels == label)).sum()
    assert metrics["eval/miou"] == pytest.approx((right / either).mean(), abs=1e-9)
    assert metrics["eval/miou"] > 0 and "eval/loss" not in metrics


@pytest.mark.slow
def test_a_panoptic_run_is_evaluated_as_one_of_objects(run, certain, tmp_path):
    """The file holds what COCO's own code reads."""
    flags = {"config.inference.kind": "instance"}
    metrics, results = evaluated(run, certain, tmp_path / "results.json", **flags)
    assert len({x["image_id"] for x in results}) == IMAGES
    assert len({x["category_id"] for x in results}) > 1
    truth = COCO()
    truth.dataset = open_annotations(tv.load_run(certain).config, "test")
    truth.createIndex()
    found = truth.loadRes(results)
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        evaluation = COCOeval(truth, found, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        values = [metrics[f"eval/{name}_{number}"] for number in NUMBERS]
        np.testing.assert_allclose(values, evaluation.stats, atol=1e-12)
    assert metrics["eval/box_ar100"] > 0


@pytest.mark.slow
def test_things_are_evaluated_on_a_dataset_of_objects(run, certain):
    """Which lacks the stuff: the numbers are those of the dataset with both."""
    flags = {"config.inference.kind": "instance", "workdir": certain, "per_class": True}
    lines = []
    for dataset in ("scene_segments", "scene_instances"):
        status, printed, err = run(evaluate, ("workdir",), **flags, dataset=dataset)
        assert (status, err) == (0, "")
        lines.append(without_timings(json.loads(printed)))
    assert lines[0] == lines[1] and lines[0]["eval/box_ar100"] > 0
    found = lines[1]["per_class/box_ap"]
    assert list(found) == ["0", "1", "2", "3", "china", "flower"]
    assert found["0"] is not None and found["china"] is None


@pytest.mark.parametrize(("flags", "message"), [
    (
        {"config.inference.kind": "things"},
        "config.inference.kind='things' is not valid; valid: semantic, instance, panoptic",
    ),
    (
        {"config.inference.kind": "panoptic", "dataset": "scene_instances"},
        "scene_instances",
    ),
    ({"config.data.result_size": "(64, 64)"}, "config.data.result_size"),
    (
        {"config.data.eval_size": "(70, 96)"},
        "config.data.eval_size: 70 x 96 pixels are not valid; valid: multiples of 32",
    ),
    (
        {"config.data.eval_short_side": 65},
        "config.data.eval_short_side: 65 pixels do not fit the canvas of evaluation, 64 x 96; "
        "valid: at most 64",
    ),
])  # fmt: skip
def test_wrong_evaluations_are_named(run, certain, flags, message):
    status, printed, err = run(evaluate, ("workdir",), workdir=certain, **flags)
    assert status in (1, 2) and not printed
    assert message in err and "Traceback" not in err


def random_pixels(*shape):
    return np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)


@pytest.fixture
def images(tmp_path):
    """Returns a folder with an upright image, and a grey one larger than the canvas."""
    upright, large = random_pixels(70, 40, 3), random_pixels(100, 120)
    Image.fromarray(upright).save(tmp_path / "upright.png")
    Image.fromarray(large).save(tmp_path / "large.png")
    return tmp_path


SIZES = {"large": (100, 120), "upright": (70, 40)}  # height and width


def predicted(run, workdir, images, names, **flags):
    """Returns the rows of the table, and the pictures of each image by name."""
    files = [f"{images}/{name}.png" for name in names]
    out = images / "out"
    flags = {"workdir": workdir, "images": ",".join(files), "out": out} | flags
    status, printed, err = run(predict, ("workdir", "images", "out"), **flags)
    assert (status, err) == (0, "") and len(printed.splitlines()) == len(names)
    rows = json.loads((images / "out.json").read_text())
    assert [row["image"] for row in rows] == files
    return rows, [
        {name: np.asarray(Image.open(images / path)) for name, path in row["pictures"].items()}
        for row in rows
    ]


def test_predict_writes_segments_and_their_identifiers(run, certain, images):
    rows, drawn = predicted(run, certain, images, SIZES)
    seen = 0
    for row, found, size in zip(rows, drawn, SIZES.values(), strict=True):
        assert found.keys() == {"segments", "ids"}
        ids = found["ids"].astype(int) @ [1, 256, 65_536]
        assert ids.shape == size
        assert [x["id"] for x in row["segments"]] == [*range(1, len(row["segments"]) + 1)]
        areas = np.bincount(ids.ravel(), minlength=len(row["segments"]) + 1)
        assert [x["area"] for x in row["segments"]] == areas[1:].tolist() and areas[1:].all()
        assert {x["class"] for x in row["segments"]} <= {"0", "1", "2", "3", "grey", "brown"}
        seen += len(row["segments"])
    assert seen > 1


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "names"), [
    ("instance", {"objects"}), ("semantic", {"segmentation", "labels"}),
])  # fmt: skip
def test_a_panoptic_run_predicts_other_kinds(run, certain, images, kind, names):
    flags = {"config.inference.kind": kind}
    (row,), (found,) = predicted(run, certain, images, ["upright"], **flags)
    assert found.keys() == names
    if kind == "semantic":
        assert found["labels"].shape == SIZES["upright"]
        assert sum(row["shares"].values()) == pytest.approx(1, abs=1e-4)
        return
    assert len(row["objects"]) > 1
    scores = [x["score"] for x in row["objects"]]
    assert scores == sorted(scores, reverse=True) and 0.5 < scores[0] <= 1
    assert all(0 <= x["area"] <= np.prod(SIZES["upright"]) for x in row["objects"])


@pytest.mark.slow
def test_an_exported_model_predicts_the_same(certain):
    loaded, pixels = tv.load_run(certain), random_pixels(3, LOW, HIGH, 3)
    task, model = loaded.task, loaded.model
    exported = lower(task, model, loaded.variables)
    found = jax.jit(exported.call)(named_arrays(loaded.variables), pixels)
    compute = jax.jit(lambda variables, x: task.outputs(model, variables, task.normalize(x)))
    expected = compute(loaded.variables, pixels)
    assert {name: x.shape for name, x in found.items()} == {
        "logits": (3, QUERIES, CLASSES + 1), "masks": (3, QUERIES, LOW // 4, HIGH // 4)
    }  # fmt: skip
    for name, x in expected.items():
        assert np.abs(x[0] - x[1]).max() > 1e-2
        np.testing.assert_allclose(found[name], x, atol=1e-4 * np.abs(x).max(), err_msg=name)


@pytest.mark.slow
def test_a_clustered_run_is_chosen(run, tmp_path, monkeypatch):
    """Its third map and the fourth, which follows from it, differ."""
    monkeypatch.setattr(search, "FACTORS", (0.05,))
    monkeypatch.setattr(rivals, "smaller_image", lambda *args: None)  # test_rivals.py has it
    config = get_config()
    config.model_overrides.update({"depths": (0, 0, 2, 0), "dims": (4, 4, 64, 4), "window_size": 4})
    write_random_run(tmp_path / "plain", config)
    flags = {"workdir": tmp_path / "plain", "out": tmp_path / "faster", "num_images": 2}
    status, printed, err = run(expedite, ("workdir", "budget"), **flags, budget=0.98)
    assert status == 0, err
    assert "adaptive pooling" in printed and "<- chosen" in printed
    original, clustered = (tv.load_run(tmp_path / name) for name in ("plain", "faster"))
    setting = clustered.config.model_overrides.expedite
    assert (setting.alpha, setting.beta, setting.where) == (1, 1, "blocks")
    jax.tree.map(np.testing.assert_array_equal, original.variables, clustered.variables)
    pixels = random_pixels(1, LOW, HIGH, 3)
    before, after = original.features(pixels), clustered.features(pixels)
    for i, (x, y) in enumerate(zip(before, after, strict=True)):
        assert (np.abs(x - y).max() > 1e-3) == (i > 1)
