"""Sine positions against Mask2Former's arrays and loops."""

import math
from pathlib import Path

import numpy as np
import pytest

from tokenvit_jax.ops import sine_positions

GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "sine_positions.npz"))


@pytest.mark.parametrize("name", GOLDEN)
def test_equal_mask2formers(name):
    *size, dim = map(int, name.removeprefix("sine_").split("x"))
    found = sine_positions(tuple(size), dim)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, GOLDEN[name], atol=2e-6)


def test_equal_loops():
    height, width, dim = 6, 3, 12
    found = sine_positions((height, width), dim)
    for y, x, c in np.ndindex(height, width, dim):
        place, length = ((y, height), (x, width))[c // 6]
        angle = 2 * math.pi * (place + 1) / (length + 1e-6) / 10000 ** (2 * (c % 6 // 2) / 6)
        expected = (math.sin, math.cos)[c % 2](angle)
        assert found[y, x, c] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("dim", [0, 6, -4])
def test_wrong_dim(dim):
    with pytest.raises(ValueError, match=f"dim={dim} is not valid; valid: multiples of 4"):
        sine_positions((2, 3), dim)
