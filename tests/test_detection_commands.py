"""The commands on a run of a detector: predict, evaluate, export, compile and expedite."""

import json

import jax
import numpy as np
import pytest
from make_task import make_task
from ml_collections import ConfigDict
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from random_variables import random_variables

import tokenvit_jax as tv
from tokenvit_jax import evaluate, expedite, predict
from tokenvit_jax.ahead import compiling
from tokenvit_jax.data import open_annotations
from tokenvit_jax.expediting import rivals, search
from tokenvit_jax.metrics.coco import NUMBERS, paste_mask
from tokenvit_jax.tasks import default_config
from tokenvit_jax.training import run as training_run
from tokenvit_jax.training.exporting import lower
from tokenvit_jax.training.new_run import write_run
from tokenvit_jax.training.workdir import read_config, write_config
from tokenvit_jax.weights.own import named_arrays

LOW, HIGH = 64, 96  # sides of the canvas
NUM = 5  # detections of an image
HEADS = {
    "mask_rcnn": {
        "hidden": 8, "num_mask_convs": 1, "num_proposals": 8, "num_anchors": 16, "num_rois": 8
    },
    "retinanet": {"num_convs": 1},
}  # fmt: skip


def tiny_config(head: str) -> ConfigDict:
    config = default_config("detection")
    config.model, config.dataset, config.image_size = "swin_t", "scene_instances", (LOW, HIGH)
    config.model_overrides = {
        "dims": (4, 4, 64, 4), "num_heads": (1, 1, 1, 1), "depths": (0, 0, 2, 0), "mlp_ratio": 1,
        "window_size": 4,
    }  # fmt: skip
    config.head = head
    config.head_overrides = {"channels": 4, "max_detections": NUM, "num_candidates": 8}
    config.head_overrides.update(HEADS[head])
    config.data.max_objects = 5
    config.data.eval_batch_size = 8
    return config


def write_random_run(workdir, head):
    """Writes a run with random variables; the boxes of RetinaNet are nearly its anchors."""
    task = make_task(tiny_config(head))
    images = jax.ShapeDtypeStruct((1, LOW, HIGH, 3), np.float32)
    variables = random_variables(task.make_model(), images)
    if head == "retinanet":  # some of which lie on objects
        params = variables["params"]["head"]
        params["box_deltas"] = jax.tree.map(lambda x: 0.02 * x, params["box_deltas"])
    write_run(workdir, task.config, variables)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Returns a run of Mask R-CNN, whose programs are compiled once."""
    workdir = tmp_path_factory.mktemp("detection") / "run"
    write_random_run(workdir, "mask_rcnn")
    return tv.load_run(workdir)


@pytest.fixture(scope="module")
def detect(loaded):
    """Maps images (3, LOW, HIGH, 3) uint8 to the detections of the model."""
    task = loaded.task
    run = jax.jit(lambda variables, x: task.outputs(loaded.model, variables, task.normalize(x)))
    return lambda pixels: jax.device_get(run(loaded.variables, pixels))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Returns the folder of a run of RetinaNet."""
    workdir = tmp_path_factory.mktemp("plain") / "run"
    write_random_run(workdir, "retinanet")
    return workdir


def random_pixels(*shape):
    return np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)


def test_a_view_of_the_usual_size_gives_the_usual_detections(loaded):
    """By the program for several views."""
    config = loaded.config.copy_and_resolve_references()
    config.inference.short_sides, config.inference.long_side = (LOW,), HIGH
    image = Image.fromarray(random_pixels(LOW, HIGH, 3))
    found, wanted = (
        task.predictor(loaded.model, loaded.variables)(image).arrays
        for task in (make_task(config), loaded.task)
    )
    assert len(wanted["scores"]) == NUM and found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, err_msg=name)


def test_predict_finds_objects_in_pixels_of_the_image(run, loaded, detect, tmp_path, monkeypatch):
    """The images: one of the canvas's proportions, twice as large; and an upright one."""
    large = np.repeat(np.repeat(random_pixels(LOW, HIGH, 3), 2, 0), 2, 1)
    upright = random_pixels(130, 70, 1)
    Image.fromarray(large).save(tmp_path / "a.png")
    Image.fromarray(upright[..., 0]).save(tmp_path / "b.png")
    write_config(tmp_path / "run", loaded.config)
    monkeypatch.setattr(training_run, "load_run", lambda *args, **kwargs: loaded)
    flags = {"workdir": tmp_path / "run", "images": tmp_path / "*.png", "out": tmp_path / "out"}
    status, printed, err = run(predict, ("workdir", "images", "out"), **flags)
    assert (status, err) == (0, "")
    line, other = printed.splitlines()
    assert line.endswith(f" -> {tmp_path}/out/a_detections.png") and " x " in line
    assert other.startswith(f"{tmp_path}/b.png: ")
    with Image.open(tmp_path / "out" / "a_detections.png") as drawn:
        assert drawn.width > drawn.height

    found, second = loaded.predict([large, upright])
    view = np.asarray(Image.fromarray(large).resize((HIGH, LOW), Image.Resampling.BILINEAR))
    expected = {name: x[0] for name, x in detect(np.stack([view] * 3)).items()}
    count = (expected["classes"] >= 0).sum()
    assert 1 < count == len(found["boxes"]) == len(found["masks"])
    np.testing.assert_allclose(found["boxes"], 2 * expected["boxes"][:count], atol=1e-3)
    np.testing.assert_array_equal(found["classes"], expected["classes"][:count])
    np.testing.assert_allclose(found["scores"], expected["scores"][:count], rtol=1e-4)
    assert found["masks"].shape == (count, *large.shape[:2]) and found["masks"].any()
    for mask, coarse, box in zip(found["masks"], expected["masks"], found["boxes"], strict=False):
        pasted = paste_mask(coarse, box.astype(np.float64), large.shape[:2])
        assert (mask != pasted).sum() <= 5

    boxes = second["boxes"]
    assert (boxes >= 0).all() and (boxes <= [70, 130, 70, 130]).all() and boxes[:, 3].max() > 70
    assert second["masks"].shape == (len(boxes), 130, 70)
    rows = json.loads((tmp_path / "out.json").read_text())
    for row, arrays in zip(rows, (found, second), strict=True):
        objects = row["objects"]
        assert [each["class"] for each in objects] == [str(x) for x in arrays["classes"]]
        for name, key in (("box", "boxes"), ("score", "scores")):
            values = [each[name] for each in objects]
            np.testing.assert_allclose(values, arrays[key], rtol=1e-3, atol=0.051)


def test_an_evaluation_of_images_that_do_not_fit_is_refused(run, plain):
    flags = {"config.data.eval_short_side": HIGH}
    status, printed, err = run(evaluate, ("workdir",), workdir=plain, **flags)
    assert (status, printed) == (1, "")
    assert err == (
        f"error: config.data.eval_short_side: {HIGH} pixels do not fit config.image_size={LOW} x "
        f"{HIGH}; valid: at most {LOW}\n"
    )


def test_results_of_an_evaluation_are_those_of_the_metrics(run, plain, tmp_path):
    """The file holds what COCO's own code reads; there is no other line than the metrics."""
    out = tmp_path / "results.json"
    status, printed, err = run(evaluate, ("workdir",), workdir=plain, out=out)
    assert (status, err) == (0, "")
    metrics = json.loads(printed)
    results = json.loads(out.read_text())
    assert 0 < len(results) <= 200 * NUM and len({x["image_id"] for x in results}) > 100
    task = tv.load_run(plain).task
    truth = COCO()
    truth.dataset = open_annotations(task.config, "test")
    truth.createIndex()
    evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    names = [f"eval/box_{name}" for name in NUMBERS]
    np.testing.assert_allclose([metrics[name] for name in names], evaluation.stats, atol=1e-12)
    assert metrics["eval/box_ar100"] > 0


@pytest.mark.slow
def test_an_exported_model_finds_the_same_objects(loaded, detect):
    pixels = random_pixels(3, LOW, HIGH, 3)
    exported = lower(loaded.task, loaded.model, loaded.variables)
    found = jax.jit(exported.call)(named_arrays(loaded.variables), pixels)
    expected = detect(pixels)
    assert {name: x.shape for name, x in found.items()} == {
        "boxes": (3, NUM, 4), "classes": (3, NUM), "scores": (3, NUM), "masks": (3, NUM, 28, 28)
    }  # fmt: skip
    assert len(np.unique(found["boxes"][:, 0], axis=0)) == 3
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, rtol=1e-4, atol=1e-3, err_msg=name)


@pytest.mark.slow
def test_a_training_step_lowers_from_shapes_alone():
    config = tiny_config("retinanet")
    step = compiling.make_step(config, jax.devices()[:2], "train")
    step.function.lower(*step.arguments)
    assert step.arguments[1]["boxes"].shape == (config.batch_size, 5, 4)
    assert step.memory.batch > config.batch_size // 2 * LOW * HIGH * 3


@pytest.mark.slow
def test_a_clustered_run_is_chosen(run, plain, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "FACTORS", (0.05,))
    monkeypatch.setattr(rivals, "smaller_image", lambda *args: None)  # test_rivals.py has it
    faster = tmp_path / "faster"
    flags = {"workdir": plain, "out": faster, "budget": 0.95, "num_images": 2}
    status, printed, err = run(expedite, ("workdir", "budget"), **flags)
    assert status == 0, err
    setting = read_config(faster).model_overrides.expedite
    assert (setting.alpha, setting.beta, setting.where) == (1, 1, "blocks")
    assert "adaptive pooling" in printed and "<- chosen" in printed
    original, clustered = (tv.load_run(folder) for folder in (plain, faster))
    jax.tree.map(np.testing.assert_array_equal, original.variables, clustered.variables)
    images = random_pixels(1, LOW, HIGH, 3)
    before, after = original.features(images), clustered.features(images)
    np.testing.assert_array_equal(before[1], after[1])
    assert before[2].shape == after[2].shape and abs(before[2] - after[2]).max() > 1e-3


@pytest.mark.parametrize(
    ("task", "flags", "status", "message"),
    [
        (
            "classification",
            {},
            2,
            "is for runs of the task detection, masks, pose; this is one of classification",
        ),
        ("detection", {"expedite": "1,1,2x2"}, 2, "does not go with --keep and --expedite"),
        (
            "detection",
            {"out": "/proc/results.json"},
            1,
            "--out=/proc/results.json cannot be written",
        ),
    ],
)
def test_wrong_files_of_results_are_named(run, plain, tmp_path, task, flags, status, message):
    if task == "classification":
        write_config(tmp_path, default_config(task))
    workdir = plain if task == "detection" else tmp_path
    flags = {"workdir": workdir, "out": tmp_path / "results.json"} | flags
    found, printed, err = run(evaluate, ("workdir",), **flags)
    assert (found, printed) == (status, "") and message in err
    assert not (tmp_path / "results.json").exists()
