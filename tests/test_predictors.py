"""DynamicViT's predictors for a network that stays as it is."""

import functools

import jax
import numpy as np
from random_variables import random_variables

from experiments import predictors
from tokenvit_jax.models.vit import VisionTransformer, ViTSettings


def test_only_predictors_are_trained(monkeypatch):
    """The last of two blocks reduces 4 patches to 2; position_size has more patches."""
    settings = ViTSettings(
        num_classes=0, dim=8, depth=2, num_heads=2, patch_size=16, position_size=(64, 64)
    )
    model = VisionTransformer(settings)
    pixels = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)
    variables = random_variables(model, pixels)
    for name, value in {"STEPS": 3, "BATCH": 2}.items():
        monkeypatch.setattr(predictors, name, value)
    (keep,) = predictors.keeps(model, (32, 32), (2,), [0.5])
    assert keep == (16, 2)

    def features(model, variables):
        apply = functools.partial(model.apply, method="features")
        return np.asarray(jax.jit(apply)(variables, pixels)[0])

    plain = features(model, variables)
    images = predictors.Images(pixels, plain)
    found = predictors.train(model, variables, keep, images, 0)
    assert {path.rsplit("/", 2)[0] for path in found} == {"blocks_1/keep_predictor"}
    assert (found["blocks_1/keep_predictor/fc_out/bias"] != 0).all()  # their first values
    maps = features(predictors.with_predictors(model, keep), predictors.add(variables, found))
    assert [len(np.unique(x.reshape(4, 8), axis=0)) for x in maps] == [2] * 4
