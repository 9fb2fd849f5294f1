"""Similarity of features with and without clustering."""

import functools

import jax
import numpy as np
import pytest
from random_variables import random_variables
from sampled import sampled
from small_hosts import MODELS, images_of

from tokenvit_jax.expediting import similarity
from tokenvit_jax.expediting.candidates import backbone_of
from tokenvit_jax.models.expedite import Expedite
from tokenvit_jax.models.swin import Swin


def map_after(backbone, state, images):
    """Returns the map after the first block of the part that can be expedited, in float64."""
    if isinstance(backbone, Swin):
        return np.asarray(state["stages_1_0"]["__call__"][0], np.float64)
    tokens, _ = state["blocks_0"]["__call__"][0]
    grid = backbone.settings.grid(*images.shape[1:3])
    return np.asarray(tokens[:, 1:], np.float64).reshape(len(images), *grid, -1)


def test_a_measured_temperature_has_three_digits():
    setting = Expedite(1, 1, (2, 2))
    assert similarity.measured(setting, 12.3456).temperature == 0.617
    assert similarity.measured(setting, 12.3456, factor=1e-4).temperature == 0.00123
    assert similarity.measured(setting, 0.0).temperature > 0


@pytest.mark.parametrize("name", sampled(["segmenter", "swin"]))
def test_similarity_is_the_mean_cosine_of_features(name):
    """Successive settings share the results of equal blocks, and no others."""
    model, size = MODELS[name], (32, 40)
    backbone = backbone_of(model)
    variables = random_variables(model, images_of(size))
    images = np.random.default_rng(1).standard_normal((2, *size, 3), np.float32)
    params = variables["params"].get("backbone", variables["params"])

    def features(setting):
        host = backbone.clone(expedite=setting)
        apply = functools.partial(
            host.apply, train=False, method="features", capture_intermediates=True
        )
        maps, state = jax.jit(apply)({"params": params}, images)
        return np.asarray(maps[-1], np.float64), state["intermediates"]

    plain, state = features(None)
    settings = [Expedite(1, 1, (2, 2)), Expedite(1, 2, (2, 2)), Expedite(2, 1, (2, 2))]  # "auto"
    if name == "segmenter":
        settings[1] = Expedite(1, 2, (2, 2), "logits")
        settings.append(Expedite(1, 2, (2, 2), temperature=5.0))
    compare = similarity.Comparison(model, variables, images)
    found = [compare(setting) for setting in settings]
    for setting, value in zip(settings, found, strict=True):
        y, _ = features(setting)
        cosines = (y * plain).sum(-1) / np.linalg.norm(y, axis=-1) / np.linalg.norm(plain, axis=-1)
        assert value == pytest.approx(cosines.mean(), abs=3e-6)
    first = map_after(backbone, state, images)
    squares = [np.sum(np.diff(first, axis=axis) ** 2, -1).reshape(2, -1) for axis in (1, 2)]
    wanted = np.median(np.median(np.concatenate(squares, 1), 1))
    assert compare.distance(1) == pytest.approx(wanted, rel=1e-4)
    assert max(found) < 0.999 and min(np.diff(sorted(found))) > 1e-5
    assert similarity.similarity(model, variables, images, settings[0]) == found[0]
