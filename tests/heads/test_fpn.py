"""Feature pyramids against mmdetection's FPN on maps with odd sides."""

import jax
import jax.numpy as jnp
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


def test_first_weights():
    """Xavier: the variance is 2 / (fan in + fan out)."""
    pyramid = FeaturePyramid(64, num_convolved=1)
    params = jax.jit(lambda: pyramid.init(jax.random.key(0), [jnp.zeros((1, 1, 1, 32))]))()
    for name, fans in (("lateral_1", 32 + 64), ("output_1", 9 * 128), ("coarser_1", 9 * 96)):
        layer = params["params"][name]
        np.testing.assert_allclose(layer["kernel"].std(), (2 / fans) ** 0.5, rtol=0.05)
        assert not layer["bias"].any()
