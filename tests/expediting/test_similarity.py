"""Similarity of features with and without clustering."""

import functools

import jax
import numpy as np
import pytest
from random_variables import random_variables
from small_hosts import MODELS, images_of

from tokenvit_jax.expediting import similarity
from tokenvit_jax.expediting.candidates import backbone_of
from tokenvit_jax.models.expedite import Expedite


@pytest.mark.parametrize("name", ["segmenter", "swin"])
def test_similarity_is_the_mean_cosine_of_features(name):
    """Successive settings share the results of equal blocks, and no others."""
    model, size = MODELS[name], (32, 40)
    backbone = backbone_of(model)
    variables = random_variables(model, images_of(size))
    images = np.random.default_rng(1).standard_normal((2, *size, 3), np.float32)
    params = variables["params"].get("backbone", variables["params"])

    def features(setting):
        host = backbone.clone(expedite=setting)
        apply = jax.jit(functools.partial(host.apply, train=False, method="features"))
        return np.asarray(apply({"params": params}, images)[-1], np.float64)

    plain = features(None)
    settings = [Expedite(1, 1, (2, 2)), Expedite(1, 2, (2, 2)), Expedite(2, 1, (2, 2))]
    if name == "segmenter":
        settings[1] = Expedite(1, 2, (2, 2), "logits")
        settings.append(Expedite(1, 2, (2, 2), temperature=5.0))
    compare = similarity.Comparison(model, variables, images)
    found = [compare(setting) for setting in settings]
    for setting, value in zip(settings, found, strict=True):
        y = features(setting)
        cosines = (y * plain).sum(-1) / np.linalg.norm(y, axis=-1) / np.linalg.norm(plain, axis=-1)
        assert value == pytest.approx(cosines.mean(), abs=3e-6)
    assert max(found) < 0.999 and min(np.diff(sorted(found))) > 1e-5
    assert similarity.similarity(model, variables, images, settings[0]) == found[0]
