"""A clustered Swin Transformer against arrays of Expedite's code for Mask2Former.

`golden/swin_expedite.npz` has an image and the maps of 1/16 (res4) and 1/32 (res5), after their
norms: with the mask of this project, and with the mask of the released code and centres' weights
that are normalised to a sum of 1 or, as in that code, to a length of 1 ("l2"). The map of 1/16 does
not depend on the latter, because a LayerNorm follows; of this one, every second row is stored. The
weights are random, with the names of the released code.
"""

import dataclasses
import functools
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest

from tokenvit_jax.models.expedite import Expedite
from tokenvit_jax.models.swin import Swin, SwinSettings
from tokenvit_jax.tasks.map_norms import normed_maps
from tokenvit_jax.weights import import_variables
from tokenvit_jax.weights.mask2former import DETECTRON2
from tokenvit_jax.weights.openmmlab import ORIGINAL

GOLDEN = Path(__file__).parent / "golden"
ARRAYS = dict(np.load(GOLDEN / "swin_expedite.npz"))
EXPEDITE = Expedite(2, 4, (3, 3), window=3, temperature=20.0, neighbors=4)
SETTINGS = SwinSettings(
    num_classes=0, dims=(8, 16, 32, 64), depths=(1, 1, 6, 1), num_heads=(1, 2, 2, 4), window_size=4
)
L2 = dataclasses.replace(EXPEDITE, normalize="l2")
VARIANTS = {
    "sum": {"expedite": EXPEDITE},
    "sum_released_mask": {"expedite": EXPEDITE, "released_mask": True},
    "l2_released_mask": {"expedite": L2, "released_mask": True},
}


class Maps(nn.Module):
    """The maps of a backbone, each after its norm."""

    backbone: Swin

    @nn.compact
    def __call__(self, images, train=False):
        return normed_maps(self.backbone, images, train)


def model_with(**changes):
    return Maps(Swin(SETTINGS).clone(**changes))


@functools.cache
def variables():
    weights = np.load(GOLDEN / "swin_expedite_weights.npz")
    layout = DETECTRON2._replace(rules=lambda model: ORIGINAL.rules(model.backbone))
    return import_variables({f"backbone.{k}": x for k, x in weights.items()}, model_with(), layout)


@functools.cache
def maps(variant):
    """Returns res4 and res5 of a variant."""
    run = jax.jit(model_with(**VARIANTS[variant]).apply)
    return [np.asarray(x) for x in run(variables(), ARRAYS["image"].astype(np.float32))[2:]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_maps_of_the_released_code(variant):
    res4, res5 = maps(variant)
    assert (res4.shape, res5.shape) == ((1, 11, 17, 32), (1, 6, 9, 64))  # windows are padded
    if variant == "sum":
        np.testing.assert_allclose(res4, ARRAYS["sum_res4"], rtol=0, atol=2e-5)
    else:
        np.testing.assert_allclose(res4[:, ::2], ARRAYS["released_mask_res4"], rtol=0, atol=2e-5)
    np.testing.assert_allclose(res5, ARRAYS[f"{variant}_res5"], rtol=0, atol=2e-5)


def test_weights_of_length_1_change_the_last_map_alone():
    found, expected = maps("l2_released_mask"), maps("sum_released_mask")
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=1e-5)
    assert np.abs(found[1] - expected[1]).max() == pytest.approx(0.79, abs=0.01)


def test_the_mask_changes_both_maps():
    for found, expected in zip(maps("sum"), maps("sum_released_mask"), strict=True):
        assert np.abs(found - expected).max() > 0.1
