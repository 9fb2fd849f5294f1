"""Skeletons over images."""

import numpy as np
import pytest

from tokenvit_jax.data.datasets.figures import FiguresSource
from tokenvit_jax.data.whole_body import WHOLE_BODY
from tokenvit_jax.pictures.skeletons import draw_skeletons

NAMES = "nose", "left_hip", "left_knee", "right_hip", "right_knee"
LIMBS = (1, 2), (3, 4), (1, 3)
POINTS = np.array([[
    [100, 10, 0.9], [150, 60, 0.9], [150, 180, 0.9], [50, 60, 0.9], [50, 180, 0.9],
]])  # fmt: skip
IMAGE = np.full((768, 800, 3), 40, np.uint8)  # is not enlarged


def drawn(points=POINTS, image=IMAGE, **settings):
    return draw_skeletons(image, points, LIMBS, NAMES, **settings)


def test_limbs_have_the_colours_of_their_sides():
    found = drawn().astype(int)
    assert found.shape == IMAGE.shape
    left, right, middle = found[120, 150], found[120, 50], found[60, 100]
    assert left[2] > left[0] + 50 and right[0] > right[2] + 50 and middle[1] > middle[0] + 50
    assert (found[10, 100] == 255).all()  # a point without limb
    changed = (found != 40).any(-1)
    assert changed[:, :40].sum() == changed[200:].sum() == 0


def test_points_with_low_scores_and_their_limbs_are_left_out():
    points = POINTS.copy()
    points[0, 2, 2] = 0.2
    found = drawn(points)
    assert (found[100:200, 140:] == 40).all()
    assert (found[60, 100] != 40).any()
    assert (drawn(points, min_score=0.1)[120, 150] != 40).any()
    points[..., 2] = 0
    np.testing.assert_array_equal(drawn(points), IMAGE)
    np.testing.assert_array_equal(drawn(np.zeros((0, 5, 3))), IMAGE)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_small_images_are_enlarged(channels):
    image = np.full((100, 192, channels), 40, np.uint8)
    image[..., 3:] = 255
    found = drawn(POINTS / (2, 2, 1), image)
    assert found.shape == (400, 768, 3) and found.dtype == np.uint8
    assert (found[22, 202] == 255).all()  # the middle of the pixel at (50, 5) is (201.5, 21.5)
    assert (found[:19] == 40).all() and (found[25:40] == 40).all()


def test_skeletons_lie_on_figures():
    record = FiguresSource("test").read(4)
    image, points = np.asarray(record["image"]), record["person"].keypoints
    found = draw_skeletons(image, points[None], WHOLE_BODY.limbs, WHOLE_BODY.names)
    plain = draw_skeletons(image, points[None], (), WHOLE_BODY.names)
    assert found.shape == (672, 672, 3)
    left, top, right, bottom = (3 * record["person"].box).astype(int)
    changed = (found != plain).any(-1)
    assert changed.sum() > 2000
    changed[max(top - 6, 0) : bottom + 6, max(left - 6, 0) : right + 6] = False
    assert not changed.any()
