"""Operators equal torchvision's, and are timed beside them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenvit_jax.measure import detection_operators, operators, torchvision_operators
from tokenvit_jax.ops import box_iou, roi_levels

pytestmark = pytest.mark.parity
FLOAT32 = jnp.dtype("float32")


@pytest.fixture(autouse=True)
def _compiled_operators():
    if not torchvision_operators.has_operators():
        pytest.skip("torchvision's compiled operators do not load")


def test_roi_align():
    """1,000 regions on maps of unit variance."""
    import torch
    from torchvision.ops import roi_align

    case = next(detection_operators.roi_align_cases(1, FLOAT32, ((1000, 7),), channels=8))
    *maps, boxes = case.inputs
    found = np.asarray(case.contenders["roi_align"](*case.inputs))[0].transpose(0, 3, 1, 2)
    levels = np.asarray(roi_levels(boxes[0], 4))
    for level, x in enumerate(maps):
        x = torch.from_numpy(np.asarray(x).transpose(0, 3, 1, 2).copy())
        own = torch.from_numpy(np.asarray(boxes[0])[levels == level])
        expected = roi_align(x, [own], 7, 0.25 / 2**level, 0, True)
        np.testing.assert_allclose(found[levels == level], expected, atol=5e-4)


def results(case):
    ours = np.asarray(jax.jit([*case.contenders.values()][-1])(*case.inputs))
    call = case.peers("forward")["torchvision"]
    call()
    return ours, call.found.numpy()


def test_nms():
    for case in detection_operators.nms_cases(None, FLOAT32, ((1, 200), (3, 150))):
        ours, theirs = results(case)
        np.testing.assert_array_equal(np.flatnonzero(ours), np.sort(theirs))
        assert 0.1 < ours.mean() < 0.9


def test_selection():
    hard, soft = detection_operators.select_detections_cases(None, FLOAT32, ((150, 6, 0.05),))
    ours, theirs = results(hard)
    np.testing.assert_array_equal(ours, theirs)
    assert len(ours) == 100
    assert soft.peers("forward") == {}


def test_matching():
    for case in detection_operators.match_boxes_cases(None, FLOAT32, ((512, 640, 20),)):
        ours, theirs = results(case)
        assert {-2, -1} < {*np.unique(ours)}
        # An anchor that is the best one of an object goes to the anchor's own best object there,
        # however little they overlap.
        anchors, boxes = map(np.asarray, case.inputs)
        overlaps = np.asarray(box_iou(anchors, boxes[np.maximum(theirs, 0)]))
        alike = (theirs < 0) | (overlaps >= 0.3)
        assert alike.mean() > 0.99
        np.testing.assert_array_equal((ours >= 0)[alike], (theirs >= 0)[alike])
        np.testing.assert_array_equal(ours[alike & (ours < 0)], theirs[alike & (ours < 0)])


@pytest.mark.parametrize("mode", ["forward", "train"])
def test_roi_align_is_timed_beside_ours(mode):
    case = next(
        detection_operators.roi_align_cases(2, FLOAT32, ((6, 3),), canvas=(64, 96), channels=4)
    )
    row = operators.benchmark_case(case, mode, seconds=0.01)
    assert list(row["contenders"]) == ["torchvision", "static", "roi_align"]
    assert row["contenders"]["torchvision"]["median_ms"] > 0
