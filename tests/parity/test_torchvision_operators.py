"""Operators equal torchvision's, and are timed beside them."""

import jax.numpy as jnp
import numpy as np
import pytest

from tokenvit_jax.measure import operators, torchvision_peers
from tokenvit_jax.ops import roi_levels

pytestmark = pytest.mark.parity


@pytest.fixture(autouse=True)
def _compiled_operators():
    if not torchvision_peers.has_operators():
        pytest.skip("torchvision's compiled operators do not load")


def test_roi_align():
    """1,000 regions on maps of unit variance."""
    import torch
    from torchvision.ops import roi_align

    case = next(operators.roi_align_cases(1, jnp.dtype("float32"), ((1000, 7),), channels=8))
    *maps, boxes = case.inputs
    found = np.asarray(case.contenders["roi_align"](*case.inputs))[0].transpose(0, 3, 1, 2)
    levels = np.asarray(roi_levels(boxes[0], 4))
    for level, x in enumerate(maps):
        x = torch.from_numpy(np.asarray(x).transpose(0, 3, 1, 2).copy())
        own = torch.from_numpy(np.asarray(boxes[0])[levels == level])
        expected = roi_align(x, [own], 7, 0.25 / 2**level, 0, True)
        np.testing.assert_allclose(found[levels == level], expected, atol=5e-4)


@pytest.mark.parametrize("mode", ["forward", "train"])
def test_roi_align_is_timed_beside_ours(mode):
    case = next(
        operators.roi_align_cases(2, jnp.dtype("float32"), ((6, 3),), canvas=(64, 96), channels=4)
    )
    row = operators.benchmark_case(case, mode, seconds=0.01)
    assert list(row["contenders"]) == ["torchvision", "static", "roi_align"]
    assert row["contenders"]["torchvision"]["median_ms"] > 0
