"""Exact counts of detectors, and the costs of their heads."""

import functools

import jax
import jax.numpy as jnp
import pytest
from exact_counts import DETECTORS, EXACT
from sampled import sampled

import tokenvit_jax as tv
from experiments.detection.counts import (
    EXPEDITE,
    NUM_CLASSES,
    PUBLISHED,
    PUBLISHED_SAVING,
    backbone_macs,
    count,
    count_parameters,
    head_macs,
    head_variables,
    variables_of,
)
from tokenvit_jax.tasks.detection.model import HEADS, Detector

IMAGES = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)


@functools.cache
def parameters_of_head(head, dims):
    return count_parameters(head_variables(HEADS[head](NUM_CLASSES), (32, 32), dims))


@functools.cache
def parameters_of_classifier(classifier):
    return count_parameters(variables_of(classifier))


@pytest.mark.parametrize(("head", "name"), sampled(DETECTORS, keep=(0, 8)))
def test_parameters(head, name):
    """Blocks are equal in classifiers and here: with one of them, the difference is the same."""
    classifier = tv.create_model(name, depths=(0, 0, 0, 1))
    detector = Detector(classifier, HEADS[head](NUM_CLASSES))
    init = functools.partial(detector.init, train=False, method="head_inputs")
    inputs = count_parameters(jax.eval_shape(init, jax.random.key(0), IMAGES))
    params = EXACT[name][0] + inputs - parameters_of_classifier(classifier)
    params += parameters_of_head(head, classifier.settings.dims)
    assert params == DETECTORS[head, name][0]
    published = PUBLISHED[head, name].params_m
    if published is not None:  # most are whole millions
        assert params / 1e6 == pytest.approx(published, abs=0.5 if published % 1 == 0 else 0.05)


def test_costs():
    """Those of the heads, for 1000 boxes and 100 masks, are equal in both orientations."""
    dims = (96, 192, 384, 768)
    box, mask = (
        head_macs(HEADS[name](NUM_CLASSES), size, dims)
        for name, size in (("retinanet", (1280, 800)), ("mask_rcnn", (800, 1280)))
    )
    # 1 x 1 and 3 x 3 convolutions of the pyramid; towers; proposals, boxes, masks.
    assert box / 1e9 == pytest.approx(1.38 + 12.89 + 137.8, abs=0.1)
    assert mask / 1e9 == pytest.approx(2.95 + 50.1 + 50.6 + 14.3 + 53.0, abs=0.1)
    counted = count("retinanet", "swin_t")
    assert counted[:2] == DETECTORS["retinanet", "swin_t"]
    assert counted.macs - box + mask == DETECTORS["mask_rcnn", "swin_t"][1]


def test_parameters_of_the_cascade():
    """With the channels of Swin-L; two hidden layers, or no block, are not the published HTC++."""
    dims = (192, 384, 768, 1536)
    params = head_variables(HEADS["htc"](NUM_CLASSES), (32, 32), dims)["params"]
    parts = {name: count_parameters({"params": part}) for name, part in params.items()}
    box, mask = (
        [parts.pop(f"{kind}_heads_{stage}") for stage in range(3)] for kind in ("box", "mask")
    )
    assert (sum(box), sum(mask)) == (45_880_575, 8_061_424)
    assert parts == {
        "rpn": 593_935, "semantic": 2_802_103, "fpn": 3_098_624, "global_block": 28_334_592
    }  # fmt: skip


def test_costs_of_the_cascade():
    """Beside the backbone's 911.8 GMACs at 1024 x 1024; boxes in three stages, masks in three."""
    macs = head_macs(HEADS["htc"](NUM_CLASSES), (1024, 1024), (192, 384, 768, 1536))
    assert macs == 734_418_919_424


@pytest.mark.slow
def test_clusters_save_what_the_paper_says():
    """Windows fill the maps of 1024 x 1024 pixels; heads do not count."""
    plain, clustered = (
        backbone_macs((1024, 1024), **settings) for settings in ({}, {"expedite": EXPEDITE})
    )
    assert (round(plain / 1e8), round(clustered / 1e8)) == (9118, 7270)
    assert 100 * (clustered / plain - 1) == pytest.approx(PUBLISHED_SAVING, abs=0.5)
