"""The pixel decoder against Mask2Former's arrays: outputs, types and initial parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mask2former_arrays import golden, params_of

from tokenvit_jax.heads.pixel_decoder import PixelDecoder
from tokenvit_jax.weights.mask2former import PIXEL_DECODER

ARRAYS = golden("pixel_decoder")
MAPS = [ARRAYS[f"res{i}"] for i in (2, 3, 4, 5)]
DECODER = PixelDecoder(32, 24, depth=2, num_heads=4, hidden=48)


@pytest.fixture(scope="module")
def params():
    return params_of(DECODER, ARRAYS, PIXEL_DECODER, MAPS)


def test_equals_mask2formers(params):
    found = jax.jit(DECODER.apply)({"params": params}, MAPS)
    assert [x.shape for x in found.levels] == [(2, 3, 5, 32), (2, 6, 10, 32), (2, 12, 20, 32)]
    assert found.mask_features.shape == (2, 24, 40, 24)
    # Every third row and column of the large maps.
    np.testing.assert_allclose(found.mask_features[:, ::3, ::3], ARRAYS["mask_features"], atol=1e-5)
    np.testing.assert_allclose(found.levels[0], ARRAYS["level0"], atol=1e-5)
    np.testing.assert_allclose(found.levels[1], ARRAYS["level1"], atol=1e-5)
    np.testing.assert_allclose(found.levels[2][:, ::3, ::3], ARRAYS["level2"], atol=1e-5)


def test_computes_in_float32(params):
    """A narrower backbone changes the inputs, not the type of the decoder."""
    narrow = [x.astype(jnp.bfloat16) for x in MAPS]
    found = jax.jit(DECODER.apply)({"params": params}, narrow)
    wide = jax.jit(DECODER.apply)({"params": params}, [x.astype(jnp.float32) for x in narrow])
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wide), strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_every_parameter_and_map_has_a_gradient(params):
    def loss(params, maps):
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(apply({"params": params}, maps)))

    apply = DECODER.apply
    for x in jax.tree.leaves(jax.jit(jax.grad(loss, (0, 1)))(params, MAPS)):
        assert np.all(np.isfinite(x))
        assert np.any(x)


def test_odd_sizes():
    """Sides that are no multiples of each other, down to a single cell."""
    maps = [jnp.ones((1, *size, 4)) for size in ((9, 5), (5, 3), (3, 2), (2, 1))]
    found, _ = DECODER.init_with_output(jax.random.key(0), maps)
    assert found.mask_features.shape == (1, 9, 5, 24)
    assert [x.shape[1:3] for x in found.levels] == [(2, 1), (3, 2), (5, 3)]
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(found))


def test_initial_parameters():
    params = jax.jit(DECODER.init)(jax.random.key(0), MAPS)["params"]

    def bound(*path):
        kernel = params
        for name in path:
            kernel = kernel[name]
        return np.abs(kernel["kernel"]).max()

    for path, expected in (
        (("input_2",), (6 / (16 + 32)) ** 0.5),
        (("layer_1", "fc1"), (6 / (32 + 48)) ** 0.5),
        (("layer_1", "attention", "value"), (6 / 64) ** 0.5),
        (("lateral",), (3 / 8) ** 0.5),
        (("output",), (3 / (9 * 32)) ** 0.5),
        (("mask_features",), (3 / 32) ** 0.5),
    ):
        assert 0.93 * expected < bound(*path) <= expected
    assert 0.8 < np.std(params["level_embedding"]) < 1.2


def test_wrong_number_of_maps():
    with pytest.raises(ValueError, match="there are 3 maps; expected 4"):
        DECODER.init(jax.random.key(0), MAPS[:3])
