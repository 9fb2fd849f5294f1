"""Exact counts of detectors, and the costs of their heads."""

import functools

import jax
import jax.numpy as jnp
import pytest
from exact_counts import DETECTORS, EXACT

import tokenvit_jax as tv
from experiments.detection.counts import (
    NUM_CLASSES,
    PUBLISHED,
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


@pytest.mark.parametrize(("head", "name"), DETECTORS)
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
