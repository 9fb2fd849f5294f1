"""Feature pyramids against mmdetection's FPN on maps with odd sides."""

import jax
import numpy as np
import pytest
from detectors import golden, maps_of, params_of

from tokenvit_jax.heads.fpn import FeaturePyramid


@pytest.mark.parametrize(
    ("peer", "coarser"), [("maskrcnn", {"num_subsampled": 1}), ("retinanet", {"num_convolved": 2})]
)
def test_levels_equal_mmdetections(peer, coarser):
    """The images have 100 x 148 pixels; the maps have strides 8 to 32."""
    arrays = golden("detection_fpn")
    maps, expected = maps_of(arrays, "in/c"), maps_of(arrays, f"{peer}/out/p")
    pyramid = FeaturePyramid(16, **coarser)
    params = params_of(arrays, f"{peer}/w/")
    levels = jax.jit(pyramid.apply)({"params": params}, maps)
    assert len(levels) == len(expected) > len(maps)
    for level, wanted in zip(levels, expected, strict=True):
        np.testing.assert_allclose(level, wanted, atol=3e-5)
