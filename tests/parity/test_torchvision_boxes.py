"""Operators of boxes choose what torchvision's compiled ones choose."""

import importlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenvit_jax.measure import operators, torch_peers

pytestmark = pytest.mark.parity
FLOAT32 = jnp.dtype("float32")


@pytest.fixture(scope="module")
def torchvision():
    found = torch_peers.torchvision_operators()
    if found is None:
        pytest.skip("torchvision's operators do not load")
    importlib.import_module("torchvision.models.detection")
    return found


def results(case, torchvision):
    ours = np.asarray(jax.jit([*case.contenders.values()][-1])(*case.inputs))
    theirs = case.peer(torchvision, *torch_peers.tensors(case.inputs)).numpy()
    return ours, theirs


def test_nms(torchvision):
    for case in operators.nms_cases(None, FLOAT32, ((1, 200), (3, 150))):
        ours, theirs = results(case, torchvision)
        np.testing.assert_array_equal(np.flatnonzero(ours), np.sort(theirs))
        assert 0.1 < ours.mean() < 0.9


def test_selection(torchvision):
    for case in operators.select_detections_cases(None, FLOAT32, ((150, 6, 0.05),)):
        ours, theirs = results(case, torchvision)
        np.testing.assert_array_equal(ours, theirs)
        assert len(ours) == 100


def test_matching(torchvision):
    for case in operators.match_boxes_cases(None, FLOAT32, ((512, 640, 20),)):
        ours, theirs = results(case, torchvision)
        assert {-2, -1} < {*np.unique(ours)}
        # An anchor that is the best one of an object goes to the anchor's own best object there.
        np.testing.assert_array_equal(ours >= 0, theirs >= 0)
        np.testing.assert_array_equal(ours[ours < 0], theirs[ours < 0])


def test_operators_that_do_not_load_are_left_out(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert torch_peers.torchvision_operators() is None
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("without torchvision, whose operators do not load: ")


def test_torchvision_takes_turns(torchvision):
    case = next(operators.nms_cases(None, FLOAT32, ((1, 50),)))
    row = operators.benchmark_case(case, "forward", torchvision=torchvision, seconds=0.01)
    assert [*row["contenders"]] == ["rows", "torchvision", "nms"]
    assert all(timing["median_ms"] > 0 for timing in row["contenders"].values())
    assert row["contenders"]["torchvision"]["temp_mib"] is None
