"""Operations on images that pictures share."""

import numpy as np

from tokenvit_jax.pictures.draw import tint


def test_tint_colours_the_pixels_of_its_tokens():
    image = np.full((6, 8, 3), 100, np.uint8)
    tinted = tint(image, np.array([1, 6]), (2, 4), "#FF0000")
    expected = np.zeros((6, 8), bool)
    expected[:3, 2:4] = expected[3:, 4:6] = True
    is_red = tinted[..., 0] > tinted[..., 1]
    np.testing.assert_array_equal(is_red, expected)
    assert np.unique(tinted[~expected]) == [177]  # grey: halfway from 100 to white
