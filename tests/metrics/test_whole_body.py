"""Average precision of whole bodies equals that of xtcocotools, and what counts in it."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from tokenvit_jax.config import base_config
from tokenvit_jax.data.datasets import figures
from tokenvit_jax.data.whole_body import PARTS, WHOLE_BODY, join_fields, split_fields
from tokenvit_jax.errors import UserError
from tokenvit_jax.metrics.whole_body import NUMBERS, WholeBodyMeter, suppress_duplicates

GOLDEN = np.load(Path(__file__).parent / "golden" / "pose_oks.npz")
TRUTH, DETECTIONS, RESULTS = (
    json.loads(str(GOLDEN[f"{name}_json"])) for name in ("ground_truth", "detections", "results")
)
# Names of parts here -> in the fixture.
NAMES = {
    "": "whole", "body_": "body", "foot_": "foot", "face_": "face", "left_hand_": "lefthand",
    "right_hand_": "righthand", "hand_": "hand",
}  # fmt: skip


class Outcome(NamedTuple):
    rows: dict


def annotations():
    entries = [join_fields(entry) for entry in TRUTH["annotations"]]
    records = [found["image_id"] for found in DETECTIONS]
    return {**TRUTH, "annotations": entries, "records": records}


def meter(truth=annotations):
    return WholeBodyMeter(truth, WHOLE_BODY.sigmas, PARTS)


def rows(indices, detections=DETECTIONS):
    found = [detections[index] for index in indices]
    return Outcome({
        "keypoints": np.array([entry["keypoints"] for entry in found]).reshape(-1, 133, 3),
        "score": np.array([entry["bbox_score"] for entry in found]),
        "area": np.array([entry["area"] for entry in found]),
        "index": np.array(indices),
        "mask": np.ones(len(indices)),
    })  # fmt: skip


@pytest.fixture(scope="module")
def filled():
    found, order = meter(), np.random.default_rng(0).permutation(len(DETECTIONS))
    for batch in np.array_split(order, 4):
        found.add(rows(batch.tolist()))
    return found


def test_results_are_those_of_the_reference(filled):
    def key(entry):
        return entry["image_id"], -entry["score"]

    found, wanted = (sorted(entries, key=key) for entries in (filled.results(), RESULTS))
    assert len(found) == len(wanted) == 43 < len(DETECTIONS)
    for entry, expected in zip(found, wanted, strict=True):
        entry = split_fields(entry)
        assert entry.keys() == expected.keys()
        for name in expected:
            np.testing.assert_allclose(entry[name], expected[name], rtol=1e-12)


@pytest.mark.parametrize("prefix", NAMES)
def test_numbers_are_those_of_the_reference(filled, prefix):
    result = filled.result()
    assert len(result) == 70
    expected = dict(
        zip(GOLDEN["stats_names"].tolist(), GOLDEN[f"stats_{NAMES[prefix]}"], strict=True)
    )
    assert [name.lower() for name in expected] == list(NUMBERS)
    found = [result[f"eval/{prefix}{name}"] for name in NUMBERS]
    np.testing.assert_allclose(found, list(expected.values()), rtol=0, atol=1e-12)


def test_records_of_no_image_do_not_count(filled):
    other, batch = meter(), rows([*range(len(DETECTIONS)), 0, 1])
    batch.rows["mask"][-2:] = 0
    batch.rows["keypoints"][-2:] = np.nan
    other.add(batch)
    assert other.result() == filled.result()


def test_images_whose_records_were_not_evaluated_do_not_count():
    left = DETECTIONS[0]["image_id"]
    some = [i for i, entry in enumerate(DETECTIONS) if entry["image_id"] != left]
    found, fewer = meter(), meter(lambda: {
        **annotations(),
        "images": [image for image in TRUTH["images"] if image["id"] != left],
        "annotations": [e for e in annotations()["annotations"] if e["image_id"] != left],
    })  # fmt: skip
    for each in (found, fewer):
        each.add(rows(some))
    assert found.result() == fewer.result() != filled_with_all().result()


def filled_with_all():
    found = meter()
    found.add(rows(range(len(DETECTIONS))))
    return found


def test_persons_of_images_without_records_are_missed():
    truth = annotations()
    extra = {**truth["annotations"][0], "image_id": 99, "id": 99}
    more = {**truth, "images": [*truth["images"], {**truth["images"][0], "id": 99}],
            "annotations": [*truth["annotations"], extra]}  # fmt: skip
    found = meter(lambda: more)
    found.add(rows(range(len(DETECTIONS))))
    assert found.result()["eval/ar"] < filled_with_all().result()["eval/ar"]


def test_fractions_of_visibility_count():
    def truth(value):
        found = annotations()
        for entry in found["annotations"]:
            points = np.reshape(entry["keypoints"], (-1, 3))
            points[points[:, 2] > 0, 2] = value
            entry["keypoints"] = points.ravel().tolist()
        return found

    results = []
    for value in (0.3, 2.0):
        found = meter(lambda value=value: truth(value))
        found.add(rows(range(len(DETECTIONS))))
        results.append(found.result())
    assert results[0] == results[1] == filled_with_all().result()


def test_keypoints_without_score_make_no_person():
    found = meter()
    batch = rows(range(len(DETECTIONS)))
    batch.rows["keypoints"][:, PARTS["foot"], 2] = 0
    found.add(batch)
    result = found.result()
    assert result["eval/foot_ap"] == result["eval/foot_ar"] == 0
    assert result["eval/body_ap"] > 0.5


def test_nothing_and_no_persons():
    with pytest.raises(UserError, match="nothing was evaluated: no person of the split can be"):
        meter().result()
    empty = {**annotations(), "annotations": []}
    found = meter(lambda: empty)
    found.add(rows([0]))
    assert set(found.result().values()) == {-1.0}


def perfect(shift):
    """Returns the result of the figures' own keypoints, moved to the right [pixels]."""
    truth = figures.annotations(base_config(), "test")
    found = WholeBodyMeter(lambda: truth, WHOLE_BODY.sigmas, PARTS)
    keypoints = np.array([entry["keypoints"] for entry in truth["annotations"]]).reshape(-1, 133, 3)
    keypoints[..., 0] += shift
    count = len(keypoints)
    found.add(Outcome({
        "keypoints": keypoints, "score": np.ones(count), "area": np.full(count, 1e4),
        "index": np.arange(count), "mask": np.ones(count),
    }))  # fmt: skip
    return found.result()


def test_figures_as_predictions_are_perfect():
    result = perfect(0.0)
    assert {result[f"eval/{prefix}{name}"] for prefix in NAMES for name in ("ap", "ar")} == {1.0}
    moved = perfect(1.0)
    assert moved["eval/body_ap"] > 0.99 > moved["eval/face_ap"] > 0.3  # its sigmas are the smallest


def similarity(a, b, areas):
    total = 0.0
    for (x, y, _), (u, v, _), sigma in zip(a, b, WHOLE_BODY.sigmas, strict=True):
        total += np.exp(-((x - u) ** 2 + (y - v) ** 2) / (2 * (2 * sigma) ** 2 * np.mean(areas)))
    return total / len(a)


def test_duplicates_are_those_of_a_loop():
    rng = np.random.default_rng(3)
    first = rng.uniform(0, 100, (3, 133, 3))
    keypoints = np.concatenate([first + rng.normal(0, noise, first.shape) for noise in (0, 0.5, 1)])
    scores, areas = rng.random(9), rng.uniform(5e3, 2e4, 9)
    kept = suppress_duplicates(keypoints, scores, areas, np.array(WHOLE_BODY.sigmas))
    expected = []
    for i in sorted(range(9), key=lambda i: -scores[i]):
        if all(similarity(keypoints[i], keypoints[j], areas[[i, j]]) <= 0.9 for j in expected):
            expected.append(i)
    assert kept == expected and 3 < len(kept) < 9
