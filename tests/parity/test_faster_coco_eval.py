"""The figures of an evaluation equal those of faster-coco-eval."""

import numpy as np
import pytest
from coco_fixture import Outcome, mask_meter, read, rows_of

from tokenvit_jax.metrics.coco import KINDS, CocoMeter

pytestmark = pytest.mark.parity


def box_meter():
    truth = read("ground_truth.json")
    meter = CocoMeter(lambda: truth, has_masks=False)
    meter.add(Outcome(rows_of(read("detections_bbox.json"), truth, with_masks=False)))
    return meter


@pytest.mark.parametrize("kind", KINDS)
def test_twelve_figures(kind, monkeypatch):
    faster = pytest.importorskip("faster_coco_eval")
    meter = box_meter() if kind == "box" else mask_meter(monkeypatch)
    found = [value for name, value in meter.result().items() if f"/{kind}_" in name]
    truth = faster.COCO(read("ground_truth.json"))
    keep = ("image_id", "category_id", "score", "bbox" if kind == "box" else "segmentation")
    results = [{key: entry[key] for key in keep} for entry in meter.results()]
    evaluation = faster.COCOeval_faster(truth, truth.loadRes(results), KINDS[kind])
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert len(found) == 12 and 0.2 < found[0] < 0.3
    np.testing.assert_allclose(found, evaluation.stats[:12], rtol=0, atol=1e-12)
