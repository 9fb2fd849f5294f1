"""The decoder of queries against Mask2Former's arrays, and what queries see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mask2former_arrays import golden, params_of

from tokenvit_jax.heads import masked_decoder
from tokenvit_jax.heads.masked_decoder import MaskedDecoder
from tokenvit_jax.heads.pixel_decoder import PixelFeatures
from tokenvit_jax.ops import resize_bilinear
from tokenvit_jax.weights.mask2former import DECODER as RULES

ARRAYS = golden("masked_decoder")
FEATURES = PixelFeatures(ARRAYS["mask_features"], [ARRAYS[f"level{i}"] for i in range(3)])
DECODER = MaskedDecoder(5, 7, depth=5, num_heads=4, hidden=48)
NUM_PREDICTIONS = 6


@pytest.fixture(scope="module")
def params():
    weights = golden("masked_decoder_weights")
    return params_of(DECODER, weights, RULES, FEATURES, True)


def test_equals_mask2formers(params):
    found = jax.jit(DECODER.apply, static_argnums=2)({"params": params}, FEATURES, True)
    assert found.logits.shape == (NUM_PREDICTIONS, 2, 7, 6)
    assert found.masks.shape == (NUM_PREDICTIONS, 2, 7, 24, 40)
    np.testing.assert_allclose(found.logits, ARRAYS["logits"], atol=5e-6)
    np.testing.assert_allclose(found.masks[..., ::4, ::4], ARRAYS["masks"], atol=5e-5)


@pytest.mark.slow
def test_last_prediction(params):
    run = jax.jit(DECODER.apply, static_argnums=2)
    last, every = (run({"params": params}, FEATURES, train) for train in (False, True))
    for one, many in zip(last, every, strict=True):
        assert len(one) == 1
        np.testing.assert_allclose(one[0], many[-1], atol=1e-5)


def test_what_queries_see(params, monkeypatch):
    """Before each layer, the masks resized to the level that it reads, and as many empty ones."""
    seen, original = [], masked_decoder._seen
    monkeypatch.setattr(
        masked_decoder, "_seen", lambda *args: seen.append(original(*args)) or seen[-1]
    )
    masks = DECODER.apply({"params": params}, FEATURES, True).masks
    assert [int(np.sum(~np.any(x, -1))) for x in seen] == ARRAYS["wholly_masked"].tolist()
    for i, (found, before) in enumerate(zip(seen, masks[:-1], strict=True)):
        size = FEATURES.levels[i % 3].shape[1:3]
        resized = resize_bilinear(before.transpose(0, 2, 3, 1), size).reshape(2, -1, 7)
        np.testing.assert_array_equal(found, resized.transpose(0, 2, 1) >= 0)


def test_gradients(params):
    """All predictions are differentiable; masks that decide what is seen pass no gradient."""
    three = DECODER.clone(depth=3)  # a layer for each level
    params = {name: x for name, x in params.items() if name not in ("layer_3", "layer_4")}

    def loss(params, features):
        predictions = three.apply({"params": params}, features, True)
        return sum(jnp.mean(jnp.sin(x)) for x in predictions)

    gradients = jax.jit(jax.grad(loss, (0, 1)))(params, FEATURES)
    for x in jax.tree.leaves(gradients):
        assert np.all(np.isfinite(x))
        assert np.any(x)

    def after_one_layer(features):
        decoder = MaskedDecoder(5, 7, depth=1, num_heads=4, hidden=48)
        return jnp.sum(jnp.sin(decoder.apply({"params": params}, features, False).logits))

    by_features = jax.jit(jax.grad(after_one_layer))(FEATURES)
    assert not np.any(by_features.mask_features)
    assert np.any(by_features.levels[0])


def test_narrow_types(params):
    decoder = DECODER.clone(dtype=jnp.bfloat16, depth=1)
    found = decoder.apply({"params": params}, FEATURES, True)
    assert {x.dtype for x in found} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(found.logits[0], ARRAYS["logits"][0], atol=0.05)
    np.testing.assert_allclose(found.masks[0, ..., ::4, ::4], ARRAYS["masks"][0], atol=0.3)


def test_initial_parameters():
    init = jax.jit(DECODER.clone(depth=1).init, static_argnums=2)
    params = init(jax.random.key(0), FEATURES, True)["params"]
    for name in ("queries", "query_positions", "level_embedding"):
        assert 0.8 < np.std(params[name]) < 1.2
    layer = params["layer_0"]
    for kernel, expected in (
        (layer["cross_attention"]["qkv"]["kernel"], (6 / (4 * 32)) ** 0.5),
        (layer["self_attention"]["proj"]["kernel"], (6 / 64) ** 0.5),
        (layer["fc2"]["kernel"], (6 / (32 + 48)) ** 0.5),
        (params["classifier"]["kernel"], 32**-0.5),
        (params["mask_embedding_2"]["kernel"], 32**-0.5),
    ):
        assert 0.93 * expected < np.abs(kernel).max() <= expected
    assert np.any(params["classifier"]["bias"])
    assert not np.any(layer["cross_attention"]["qkv"]["bias"])
