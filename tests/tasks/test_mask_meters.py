"""Meters of segmentation by masks, on predictions that are made from the ground truth."""

import functools
from typing import NamedTuple

import numpy as np
import pytest
from make_task import make_task, open_dataset

from tokenvit_jax.data.datasets import scene_instances
from tokenvit_jax.data.record import IGNORED, Record, Segments
from tokenvit_jax.data.segments import label_map_of
from tokenvit_jax.errors import UserError
from tokenvit_jax.run_lengths import decode_mask
from tokenvit_jax.tasks import default_config
from tokenvit_jax.tasks.masks.meters import LabelMapMeter, SegmentMeter
from tokenvit_jax.tasks.task import Outcome

SIDE, ROOM = 128, 144  # of the scenes, and of the buffers of results
COUNT = 6  # images
QUERIES = 7  # places for segments of an image
KINDS = ("semantic", "instance", "panoptic")
IMAGES = scene_instances.annotations(default_config("masks"), "test")["images"]
each_kind = pytest.mark.parametrize("kind", KINDS)


class Found(NamedTuple):
    """Predictions of one image: classes (n,) and masks (n, H, W) bool."""

    classes: np.ndarray
    masks: np.ndarray


@functools.cache
def source(kind):
    name = "scene_instances" if kind == "instance" else "scene_segments"
    return open_dataset(name, "test")


def truth(kind, index):
    """Returns the ground truth of an image as a perfect prediction."""
    record = source(kind).read(index)
    if kind == "instance":
        objects = record["instances"]
        masks = [decode_mask(counts, (SIDE, SIDE)) for counts in objects.masks]
        return Found(objects.classes, np.array(masks))
    if kind == "panoptic":
        segments = record["segments"]
        return Found(segments.classes, segments.ids == segments.numbers[:, None, None])
    labels = label_map_of(record)
    classes = np.unique(labels)
    return Found(classes, labels == classes[:, None, None])


def shifted(found):
    """Moves masks to the right by two pixels."""
    return found._replace(masks=np.roll(found.masks, 2, axis=2))


def rows_of(kind, predictions, start=0):
    """Returns the rows of an outcome; the buffers hold noise beyond the images."""
    count, rng = len(predictions), np.random.default_rng(0)
    rows = {
        "index": np.arange(start, start + count),
        "mask": np.ones(count, np.float32),
        "original_size": np.full((count, 2), SIDE),
    }
    if kind == "semantic":
        labels = rng.integers(6, size=(count, ROOM, ROOM), dtype=np.uint8)
        for row, found in zip(labels, predictions, strict=True):
            row[:SIDE, :SIDE] = found.classes[found.masks.argmax(0)]
        return rows | {"labels": labels}
    classes = np.full((count, QUERIES), -1)
    for row, found in zip(classes, predictions, strict=True):
        row[: len(found.classes)] = found.classes
    if kind == "panoptic":
        ids = rng.integers(3, size=(count, ROOM, ROOM), dtype=np.int16)
        for row, found in zip(ids, predictions, strict=True):
            numbers = np.arange(1, len(found.classes) + 1, dtype=np.int16)
            row[:SIDE, :SIDE] = (found.masks * numbers[:, None, None]).max(0)
        return rows | {"ids": ids, "classes": classes}
    masks = rng.random((count, QUERIES, ROOM, ROOM)) < 0.5
    for row, found in zip(masks, predictions, strict=True):
        row[: len(found.masks), :SIDE, :SIDE] = found.masks
    scores = np.linspace(0.9, 0.1, QUERIES, dtype=np.float32)
    bits = np.packbits(masks, axis=-1)
    return rows | {"bits": bits, "classes": classes, "scores": np.tile(scores, (count, 1))}


def make_meter(kind):
    config = default_config("masks")
    config.dataset, config.inference.kind = source(kind).name(0).split()[0], kind
    return make_task(config).meter()


def meter_of(kind, *rows):
    meter = make_meter(kind)
    for each in rows:
        meter.add(Outcome((), each))
    return meter


@functools.cache
def perfect(kind):
    return [truth(kind, index) for index in range(COUNT)]


BEST = {  # metrics of which 1 is the best value
    "semantic": ("miou", "accuracy", "class_accuracy"),
    "instance": ("mask_ap", "mask_ap75", "mask_ar100", "box_ap", "box_ap75"),
    "panoptic": ("pq", "sq", "rq", "pq_things", "pq_stuff", "rq_things", "rq_stuff"),
}


@each_kind
def test_the_ground_truth_is_perfect_and_a_shift_of_two_pixels_is_not(kind):
    metrics = meter_of(kind, rows_of(kind, perfect(kind))).result()
    best = [f"eval/{name}" for name in BEST[kind]]
    assert [metrics[name] for name in best] == [pytest.approx(1, abs=1e-12)] * len(best)
    assert "eval/loss" not in metrics
    moved = meter_of(kind, rows_of(kind, [*map(shifted, perfect(kind))])).result()
    assert all(0 < moved[name] < 0.99 for name in best if "_ap75" not in name and "rq" not in name)


@each_kind
def test_records_that_fill_a_batch_and_the_size_of_batches_change_nothing(kind):
    predictions = [shifted(x) if i % 2 else x for i, x in enumerate(perfect(kind))]
    expected = meter_of(kind, rows_of(kind, predictions))
    padded = rows_of(kind, [*predictions[4:], *predictions[:2]], start=4)
    padded["index"][2:], padded["mask"][2:], padded["original_size"][2:] = -1, 0, 1
    found = meter_of(kind, rows_of(kind, predictions[:4]), padded)
    assert found.result() == expected.result()
    assert found.results() == expected.results() and found.results()
    for name, values in expected.per_class().items():
        np.testing.assert_array_equal(found.per_class()[name], values)


@each_kind
def test_results_are_the_predicted_masks(kind):
    predictions = [*map(shifted, perfect(kind))]
    results = meter_of(kind, rows_of(kind, predictions)).results()
    if kind == "instance":
        pairs = [(i, *pair) for i, x in enumerate(predictions) for pair in zip(*x, strict=True)]
        for entry, (index, label, mask) in zip(results, pairs, strict=True):
            assert (entry["image_id"], entry["category_id"]) == (IMAGES[index]["id"], label + 1)
            assert_mask(entry["segmentation"], mask)
            columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
            sides = np.ptp(columns) + 1, np.ptp(rows) + 1
            assert entry["bbox"] == [columns[0], rows[0], *sides]
        assert results[0]["score"] == pytest.approx(0.9)
        return
    for index, (entry, found) in enumerate(zip(results, predictions, strict=True)):
        assert entry["image_id"] == index
        pairs = zip(entry["segments"], *found, strict=True)
        for segment, label, mask in pairs:
            assert segment["class"] == label
            assert_mask(segment["segmentation"], mask)


def assert_mask(encoding, mask):
    assert encoding["size"] == [SIDE, SIDE]
    np.testing.assert_array_equal(decode_mask(encoding["counts"], (SIDE, SIDE)), mask)


def test_objects_without_pixels_are_no_detections():
    rows = rows_of("instance", perfect("instance"))
    expected = meter_of("instance", rows)
    rows["classes"][:, -1] = 2
    rows["bits"][:, -1] = 0
    rows["bits"][:, -1, SIDE:] = 255  # beyond the image
    found = meter_of("instance", rows)
    assert found.results() == expected.results() and found.result() == expected.result()


@pytest.mark.parametrize("kind", ["semantic", "panoptic"])
def test_predictions_on_void_do_not_count(kind):
    """A third of each image is void; there, one prediction is right and the other one wrong."""
    records = []
    for index in range(COUNT):
        segments = source(kind).read(index)["segments"]
        ids = segments.ids.copy()
        ids[:, :43] = 0
        areas = np.array([(ids == number).sum() for number in segments.numbers])
        seen = areas > 0
        rest = [x[seen] for x in (segments.numbers, segments.classes, segments.crowd, areas)]
        records.append(Record(id=index, segments=Segments(ids, *rest)))

    def metrics(predictions):
        meter = LabelMapMeter(records.__getitem__, 6) if kind == "semantic" else (
            SegmentMeter(records.__getitem__, [True] * 4 + [False] * 2)
        )  # fmt: skip
        meter.add(Outcome((), rows_of(kind, predictions)))
        return meter.result()

    best = [f"eval/{name}" for name in BEST[kind]]
    spoilt = []
    for found in perfect(kind):
        masks = found.masks.copy()
        masks[:, :, :43] = False
        masks[-1, :, :43] = True
        seen = masks.any((1, 2))
        spoilt.append(Found(found.classes[seen], masks[seen]))
    for predictions in (perfect(kind), spoilt):
        found = metrics(predictions)
        assert [found[name] for name in best] == [pytest.approx(1, abs=1e-12)] * len(best)
    assert label_map_of(records[0])[0, 0] == IGNORED


def test_a_pass_without_stuff_has_metrics_of_things_alone():
    meter = SegmentMeter(source("panoptic").read, [True] * 6)
    meter.add(Outcome((), rows_of("panoptic", perfect("panoptic"))))
    assert meter.result() == {
        f"eval/{name}{group}": pytest.approx(1) for name in ("pq", "sq", "rq")
        for group in ("", "_things")
    }  # fmt: skip


@pytest.mark.parametrize(("kind", "dataset"), [
    ("panoptic", "scene_instances"), ("semantic", "scene_instances"), ("instance", "scenes"),
])  # fmt: skip
def test_an_evaluation_with_a_dataset_of_another_kind_is_named(kind, dataset):
    config = default_config("masks")
    config.dataset, config.inference.kind = dataset, kind
    with pytest.raises(UserError, match=f"^config.dataset='{dataset}' has no "):
        make_task(config).meter()


@each_kind
def test_a_pass_without_images_is_named(kind):
    rows = rows_of(kind, perfect(kind)[:1])
    rows["mask"][:] = 0
    with pytest.raises(UserError, match="nothing was evaluated: no image of the split can be"):
        meter_of(kind, rows).result()
