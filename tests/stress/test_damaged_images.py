"""Randomly damaged image files: an image or one line, without warnings and gigabytes."""

import os

import pytest
from damaged_images import KINDS, run_damages

TRIALS = int(os.environ.get("STRESS_TRIALS", 1000))  # per kind of file
SEED = 1


@pytest.mark.stress
@pytest.mark.parametrize("kind", KINDS)
def test_random_damages(kind):
    assert run_damages(kind, SEED, TRIALS) == []
