"""Panoptic quality, beside panopticapi's numbers and loops over masks."""

from pathlib import Path

import numpy as np
import pytest

from tokenvit_jax.data.record import Segments
from tokenvit_jax.errors import UserError
from tokenvit_jax.metrics.panoptic import PanopticMeter, panoptic_counts, qualities

GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "panoptic_quality.npz"))
IMAGES = range(4)
CATEGORIES = GOLDEN["categories"].tolist()


def segments(ids, numbers, classes, crowd=None, areas=None):
    """Returns segments, whose areas are those of the map unless they are given."""
    numbers = np.array(numbers, int)
    if areas is None:
        areas = np.array([(ids == number).sum() for number in numbers], int)
    crowd = np.zeros(len(numbers), bool) if crowd is None else np.array(crowd)
    return Segments(ids, numbers, np.array(classes, int), crowd, areas)


def images_of_panopticapi(*, crowd_as_void=False):
    """Yields true and predicted segments."""
    for i in IMAGES:
        ids, classes, crowd = GOLDEN[f"gt_segments_{i}"].T
        crowd = crowd.astype(bool)
        id_map = GOLDEN[f"gt_{i}"]
        if crowd_as_void:
            id_map = np.where(np.isin(id_map, ids[crowd]), 0, id_map)
            ids, classes, crowd = (x[~crowd] for x in (ids, classes, crowd))
        truth = segments(id_map, ids, [CATEGORIES.index(c) for c in classes], crowd)
        ids, classes = GOLDEN[f"pred_segments_{i}"].T
        yield truth, segments(GOLDEN[f"pred_{i}"], ids, [CATEGORIES.index(c) for c in classes])


def naive(truth, found, num_classes):
    """Compares every pair of segments by their masks."""
    counts, matched = np.zeros((num_classes, 4)), set()
    void = truth.ids == 0
    crowds = {}
    for i, label in enumerate(truth.classes):
        mask = truth.ids == truth.numbers[i]
        if truth.crowd[i]:
            crowds[label] = mask
            continue
        area = truth.areas[i]
        for j, other in enumerate(found.classes):
            prediction = found.ids == found.numbers[j]
            shared = (mask & prediction).sum()
            union = area + prediction.sum() - shared - (prediction & void).sum()
            if label == other and shared and shared / union > 0.5:
                counts[label] += [shared / union, 1, 0, 0]
                matched.add(j)
                break
        else:
            counts[label, 3] += 1
    for j, label in enumerate(found.classes):
        prediction = found.ids == found.numbers[j]
        outside = (prediction & void).sum() + (prediction & crowds.get(label, False)).sum()
        counts[label, 2] += j not in matched and not outside / prediction.sum() > 0.5
    return counts


@pytest.mark.parametrize("crowd", ["", "_crowd_as_void"])
def test_equals_panopticapi(crowd):
    meter = PanopticMeter(GOLDEN["isthing"])
    for truth, found in images_of_panopticapi(crowd_as_void=bool(crowd)):
        meter.add(truth, found)
    expected = GOLDEN[f"iou_tp_fp_fn{crowd}"]
    np.testing.assert_allclose(meter.counts[:, 0], expected[:, 0], atol=1e-9)
    np.testing.assert_array_equal(meter.counts[:, 1:], expected[:, 1:])
    summary = meter.summary()
    np.testing.assert_allclose(list(summary.values()), GOLDEN[f"pq_sq_rq_n{crowd}"], atol=1e-9)
    assert list(summary) == ["all", "things", "stuff"]
    assert round(summary["all"].pq, 5) == (0.31389 if crowd else 0.29961)
    # It removes void of the prediction from the union, too.
    assert abs(summary["all"].pq - GOLDEN["torchmetrics_pq_sq_rq_crowd_as_void"][0]) > 0.2


def test_counts_equal_loops():
    for seed in range(20):
        draw = np.random.default_rng(seed)
        true_ids, ids = np.array([70_000, 3, 256, 12, 5]), np.array([4, 1, 9, 2])
        blocks = draw.choice([0, *true_ids], (3, 4))
        true_map = np.kron(blocks, np.ones((5, 5), int))
        # Predictions follow the truth in most places.
        follow = dict(zip([0, *true_ids], draw.choice([0, *ids], 6), strict=True))
        id_map = np.vectorize(follow.get)(true_map)
        noise = draw.random(id_map.shape) < 0.3
        id_map = np.where(noise, draw.choice([0, *ids], id_map.shape), id_map)
        true_map[0, :5], id_map[-1, :4] = true_ids, ids  # every segment has a pixel
        areas = [None, draw.integers(20, 90, 5)][seed % 2]
        truth = segments(true_map, true_ids, draw.integers(3, size=5), draw.random(5) < 0.3, areas)
        found = segments(id_map, ids, draw.integers(3, size=4))
        np.testing.assert_allclose(panoptic_counts(truth, found, 3), naive(truth, found, 3))


def test_last_crowd_of_a_class_counts():
    """As in panopticapi, whose dictionary holds one crowd of a class."""
    true_map = np.array([[1, 1, 1, 2, 2, 2, 2, 2, 3, 3]])
    found = segments(np.array([[0, 7, 7, 7, 7, 0, 0, 0, 0, 0]]), [7], [0])
    for order, wrong in (([1, 2], 1), ([2, 1], 1), ([2, 3], 1)):
        truth = segments(true_map, np.array(order), [0, 0], [True, True])
        assert panoptic_counts(truth, found, 1)[0, 2] == wrong
    found = found._replace(ids=np.array([[0, 0, 7, 7, 7, 0, 0, 0, 0, 0]]))
    for order, wrong in (([1, 2], 0), ([2, 1], 1)):
        truth = segments(true_map, np.array(order), [0, 0], [True, True])
        assert panoptic_counts(truth, found, 1)[0, 2] == wrong


def test_meters_add_up():
    whole, parts = (
        PanopticMeter(GOLDEN["isthing"]),
        [PanopticMeter(GOLDEN["isthing"]) for _ in "ab"],
    )
    for i, image in enumerate(images_of_panopticapi()):
        whole.add(*image)
        parts[i % 2].add(*image)
    parts[0].counts += parts[1].counts
    assert parts[0].result() == pytest.approx(whole.result())
    assert list(whole.result()) == [
        f"eval/{metric}{group}"
        for group in ("", "_things", "_stuff")
        for metric in ("pq", "sq", "rq")
    ]
    by_class = whole.per_class()
    assert whole.result()["eval/sq"] == pytest.approx(by_class["sq"].mean())
    assert by_class["pq"] == pytest.approx(by_class["sq"] * by_class["rq"])


def test_classes_that_do_not_occur():
    found = qualities(np.array([[1.5, 2, 0, 2], [0, 0, 1, 0], [0, 0, 0, 0]]))
    np.testing.assert_allclose(found, [[0.5, 0.75, 2 / 3], [0, 0, 0], [np.nan] * 3])
    meter = PanopticMeter([True, True])
    with pytest.raises(UserError, match="nothing was evaluated"):
        meter.result()
    id_map = np.array([[0, 1], [1, 1]])
    one = segments(id_map, [1], [0])
    meter.add(one, one)
    assert meter.summary()["things"] == (1, 1, 1, 1)
    assert np.isnan(meter.result()["eval/pq_stuff"]) and meter.summary()["stuff"].classes == 0


def test_images_without_segments():
    none = segments(np.zeros((2, 3), int), np.zeros(0, int), np.zeros(0, int))
    one = segments(np.eye(2, 3, dtype=int), [1], [1])
    np.testing.assert_array_equal(panoptic_counts(none, none, 2), np.zeros((2, 4)))
    np.testing.assert_array_equal(panoptic_counts(one, none, 2), [[0] * 4, [0, 0, 0, 1]])
    np.testing.assert_array_equal(panoptic_counts(none, one, 2), np.zeros((2, 4)))  # on void


def test_wrong_maps():
    one = segments(np.ones((2, 3), int), [1], [0])
    with pytest.raises(ValueError, match=r"found.ids has 3 x 2 pixels; valid: 2 x 3"):
        panoptic_counts(one, one._replace(ids=one.ids.T), 1)
    with pytest.raises(ValueError, match=r"identifiers that are not in found.numbers"):
        panoptic_counts(one, one._replace(ids=2 * one.ids), 1)
    # Unknown identifiers of the truth are no void.
    unknown = one._replace(ids=2 * one.ids)
    np.testing.assert_array_equal(panoptic_counts(unknown, one, 1), [[0, 0, 1, 1]])
