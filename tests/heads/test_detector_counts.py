"""Exact counts of detectors, their costs, and the costs of their heads."""

import functools

import pytest
from exact_counts import DETECTORS, EXACT

import tokenvit_jax as tv
from experiments.detection.counts import (
    NUM_CLASSES,
    PUBLISHED,
    count,
    count_parameters,
    head_macs,
    variables_of,
)
from tokenvit_jax.tasks.detection.model import HEADS, Detector


@functools.cache
def parameters_of(model):
    return count_parameters(variables_of(model))


@pytest.mark.parametrize(("head", "name"), DETECTORS)
def test_parameters(head, name):
    """Blocks are equal in classifiers and here: with one of them, the difference is the same."""
    classifier = tv.create_model(name, depths=(0, 0, 0, 1))
    detector = Detector(classifier, HEADS[head](NUM_CLASSES))
    params = parameters_of(detector) - parameters_of(classifier) + EXACT[name][0]
    assert params == DETECTORS[head, name][0]
    published = PUBLISHED[head, name].params_m
    if published is not None:  # most are whole millions
        assert params / 1e6 == pytest.approx(published, abs=0.5 if published % 1 == 0 else 0.05)


def test_products_of_heads():
    """Those of the pyramid, and of five levels, 1000 boxes and 100 masks, for Swin-T's maps."""
    expected = {
        "mask_rcnn": 2.95 + 50.1 + 50.6 + 14.3 + 53.0,  # 1 x 1, 3 x 3, proposals, boxes, masks
        "retinanet": 1.38 + 12.89 + 137.8,  # 1 x 1, 3 x 3, towers
    }
    sizes = {"mask_rcnn": (1280, 800), "retinanet": (800, 1280)}
    for name, gmacs in expected.items():
        found = head_macs(HEADS[name](NUM_CLASSES), sizes[name], (96, 192, 384, 768))
        assert found / 1e9 == pytest.approx(gmacs, abs=0.1)


def test_cost_of_a_detector():
    assert count("mask_rcnn", "swin_t").macs == DETECTORS["mask_rcnn", "swin_t"][1]
