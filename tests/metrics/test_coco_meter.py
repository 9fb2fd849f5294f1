"""COCO's average precision, beside the figures of pycocotools on a fixture."""

import copy
import itertools
import json

import jax
import numpy as np
import pytest
from coco_fixture import MASK_SIDE, Outcome, mask_meter, read, rows_of

from tokenvit_jax.data.datasets import scene_instances
from tokenvit_jax.errors import UserError
from tokenvit_jax.metrics.coco import NUMBERS, CocoMeter, paste_mask


def split_rows(rows, *parts):
    starts = np.cumsum([0, *parts])
    return [
        Outcome(jax.tree.map(lambda x, a=a, b=b: x[a:b], rows))
        for a, b in itertools.pairwise(starts)
    ]


def test_boxes_have_the_twelve_numbers_of_the_reference():
    truth, expected = read("ground_truth.json"), read("expected.json")
    rows = rows_of(read("detections_bbox.json"), truth, with_masks=False)
    meter = CocoMeter(lambda: truth, has_masks=False)
    for outcome in split_rows(rows, 5, 7):
        meter.add(outcome)
    found = meter.result()
    assert [*found] == [f"eval/box_{name}" for name in NUMBERS]
    np.testing.assert_allclose([*found.values()], expected["bbox"], atol=1e-12)
    wrong = np.array(expected["bbox_if_crowd_is_dropped_wrong"])
    assert abs(found["eval/box_ap"] - wrong[0]) > 0.01
    per_class = meter.per_class()["box_ap"]
    np.testing.assert_allclose(
        np.where(np.isnan(per_class), -1, per_class),
        [*expected["bbox_per_category_AP"].values()],
        atol=1e-12,
    )


def test_masks_have_the_twelve_numbers_of_the_reference(monkeypatch):
    meter = mask_meter(monkeypatch)
    found = [value for name, value in meter.result().items() if "mask" in name]
    np.testing.assert_allclose(found, read("expected.json")["segm"], atol=1e-12)


def test_annotations_may_start_at_zero_and_are_left_as_they_are():
    truth = copy.deepcopy(read("ground_truth.json"))
    for number, entry in enumerate(truth["annotations"]):
        entry["id"] = number
        if not entry["iscrowd"]:
            del entry["iscrowd"]
    given = copy.deepcopy(truth)
    meter = CocoMeter(lambda: truth, has_masks=False)
    meter.add(Outcome(rows_of(read("detections_bbox.json"), truth, with_masks=False)))
    found = [*meter.result().values()]
    np.testing.assert_allclose(found, read("expected.json")["bbox"], atol=1e-12)
    assert truth == given


def perfect_rows(indices, truth):
    """Returns the objects themselves as detections, with masks that fill the boxes."""
    of_image = [[e for e in truth["annotations"] if e["image_id"] == i] for i in indices]
    entries = [dict(entry, score=0.9) for group in of_image for entry in group]
    few = {**truth, "images": [truth["images"][i] for i in indices]}
    rows = rows_of(entries, few, with_masks=True)
    rows["index"] = np.array([*indices, -1, -1])
    return rows


def test_only_seen_images_count_and_results_name_them():
    truth = scene_instances.annotations(None, "test")
    meter = CocoMeter(lambda: truth, has_masks=True)
    meter.add(Outcome(perfect_rows([3, 7], truth)))
    found = meter.result()
    assert found["eval/box_ap"] == pytest.approx(1.0) and 0 < found["eval/mask_ap50"] < 1
    assert found["eval/box_ap_large"] == -1  # there is no large object
    results = meter.results()
    assert {entry["image_id"] for entry in results} == {3, 7}
    wanted = next(entry for entry in truth["annotations"] if entry["image_id"] == 3)
    assert results[0]["bbox"] == wanted["bbox"]
    assert results[0]["category_id"] == wanted["category_id"]
    assert json.loads(json.dumps(results)) == results
    # A second pass adds a later image to the first.
    meter.add(Outcome(perfect_rows([9], truth)))
    assert meter.result()["eval/box_ap"] == pytest.approx(1.0)
    assert len(meter.results()) > len(results)


def test_no_detection_is_no_error_and_no_image_is_one():
    truth = scene_instances.annotations(None, "test")
    meter = CocoMeter(lambda: truth, has_masks=True)
    with pytest.raises(UserError, match="nothing was evaluated"):
        meter.result()
    rows = perfect_rows([3], truth)
    rows["classes"][:] = -1
    meter.add(Outcome(rows))
    assert meter.result()["eval/box_ap"] == meter.result()["eval/mask_ap"] == 0


def test_a_pasted_mask_is_interpolated_at_the_centres_of_the_pixels():
    rng = np.random.default_rng(0)
    for box in ([3.2, 1.7, 17.9, 22.4], [-4.0, 5.5, 9.3, 40.0], [5.0, 5.0, 5.0, 9.0]):
        probabilities = rng.random((MASK_SIDE, MASK_SIDE))
        found = paste_mask(probabilities, np.array(box), (30, 25))
        left, top, right, bottom = box
        for row in range(30):
            for column in range(25):
                value = 0.0
                for i in range(MASK_SIDE) if right > left else ():
                    y = (row + 0.5 - top) / (bottom - top) * MASK_SIDE - 0.5
                    x = (column + 0.5 - left) / (right - left) * MASK_SIDE - 0.5
                    for j in range(MASK_SIDE):
                        weight = max(0, 1 - abs(y - i)) * max(0, 1 - abs(x - j))
                        value += weight * probabilities[i, j]
                assert found[row, column] == (value >= 0.5)
