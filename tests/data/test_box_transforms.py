"""Views of images with objects: sizes, crops, and where boxes and masks end up."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tokenvit_jax.data.box_transforms import (
    MASK_SIDE,
    View,
    fitted_size,
    random_view,
    view_boxes,
    view_masks,
    view_pixels,
)
from tokenvit_jax.data.instances import mask_box
from tokenvit_jax.run_lengths import encode_mask

GOLDEN = Path(__file__).parent / "golden" / "resize_sizes.json"


def draw(size=(640, 480), short_sides=(800,), long_side=1333, seed=0, count=200, **settings):
    settings = {"room": (1344, 800), "crop": False, "flip": 0.0} | settings
    rng = np.random.default_rng(seed)
    return [random_view(size, short_sides, long_side, rng=rng, **settings) for _ in range(count)]


def test_sizes_are_those_of_mmcv():
    rows = json.loads(GOLDEN.read_text())["rows"]
    assert len(rows) == 36
    for height, width, long_side, short_side, new_height, new_width, *factors in rows:
        found = fitted_size((width, height), short_side, long_side)
        assert found == (new_width, new_height)
        whole = view_boxes(np.array([[0.0, 0, 1, 1]]), View((0, 0, width, height), found))
        np.testing.assert_allclose(whole[0, 2:], np.minimum(factors, found), rtol=1e-6)


def test_short_sides_are_drawn_evenly():
    sides = [min(view.size) for view in draw(short_sides=(480, 608, 800), count=600)]
    found, counts = np.unique(sides, return_counts=True)
    assert found.tolist() == [480, 608, 800] and counts.min() > 150
    assert all(view.part == (0, 0, 640, 480) and not view.flip for view in draw(count=20))


def test_images_are_mirrored_with_the_given_probability():
    flips = [view.flip for view in draw(flip=0.25, count=800)]
    assert 0.2 < np.mean(flips) < 0.3
    assert all(view.flip for view in draw(flip=1.0, count=50))


def test_every_second_view_is_a_crop_of_detr():
    views = draw(crop=True, short_sides=(480, 800), count=800)
    crops = [view for view in views if view.part != (0, 0, 640, 480)]
    assert 330 < len(crops) < 470
    sides = []
    for view in crops:
        left, top, right, bottom = view.part
        assert 0 <= left < right <= 640 and 0 <= top < bottom <= 480
        width, height = right - left, bottom - top
        # It is cut from an image whose shorter side is 400, 500 or 600: whole pixels of one of
        # them, from 384 to 600, or all of a shorter side.
        fits = []
        for short_side in (400, 500, 600):
            pixels = np.array([width * fitted_size((640, 480), short_side, 1333)[0] / 640,
                               height * short_side / 480])  # fmt: skip
            whole = np.allclose(pixels, pixels.round(), atol=1e-6)
            fits.append(whole and (pixels > 383.9).all() and (pixels < 600.1).all())
            if fits[-1]:
                sides.append(pixels)
        assert any(fits)
        # The view has the proportions of the crop and fits the canvas.
        assert view.size[0] <= 1344 and view.size[1] <= 800
        np.testing.assert_allclose(view.size[0] / view.size[1], width / height, rtol=0.01)
    sides = np.array(sides)
    assert sides.min() < 395 and sides.max() > 590
    corners = np.array([view.part[:2] for view in crops])
    assert (corners.min(0) < 5).all() and (corners.max(0) > 150).all()


def test_crops_of_small_images_are_not_larger_than_them():
    for view in draw(size=(90, 1200), crop=True, room=(800, 1344)):
        left, top, right, bottom = view.part
        assert 0 <= left < right <= 90 and 0 <= top < bottom <= 1200
        assert view.size[0] <= 800 and view.size[1] <= 1333


def test_crops_of_another_orientation_are_shrunk_into_the_canvas():
    shrunk = 0
    for view in draw(crop=True, count=400):
        width, height = view.part[2] - view.part[0], view.part[3] - view.part[1]
        wanted = fitted_size((width, height), 800, 1333)
        if wanted[1] > 800:  # higher than wide, in an image that is not
            shrunk += 1
            assert view.size[1] == 800 and view.size[0] < wanted[0]
        else:
            assert view.size == wanted
    assert shrunk > 20


def objects(size, count=4, seed=0):
    """Returns rectangles with a hole, as masks (n, H, W) of a width and height, and their boxes."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, size[1], size[0]), bool)
    for mask in masks:
        left, top = rng.integers(0, size[0] - 12), rng.integers(0, size[1] - 12)
        mask[top : top + rng.integers(8, 30), left : left + rng.integers(8, 30)] = True
        mask[top + 2 : top + 4, left + 2 : left + 6] = False
    return masks, np.stack([mask_box(mask) for mask in masks])


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("part", [(0, 0, 60, 40), (5.5, 3.25, 50, 33.5)])
def test_boxes_and_masks_follow_the_pixels(flip, part):
    size, (masks, boxes) = (60, 40), objects((60, 40))
    view = View(part, (150, 101), flip)
    found = view_boxes(boxes, view)
    assert found.dtype == np.float32
    x, y = 150 / (part[2] - part[0]), 101 / (part[3] - part[1])
    for i, (left, top, right, bottom) in enumerate(boxes):
        low, high = (min(max((side - part[0]) * x, 0), 150) for side in (left, right))
        if flip:
            low, high = 150 - high, 150 - low
        rows = [min(max((side - part[1]) * y, 0), 101) for side in (top, bottom)]
        np.testing.assert_allclose(found[i], [low, rows[0], high, rows[1]], atol=1e-4)
        # The box covers the pixels of the object in the image that the network sees.
        image = Image.fromarray(masks[i].astype(np.uint8) * 255)
        seen = mask_box(view_pixels(image, view)[..., 0] >= 128)
        assert abs(seen - found[i]).max() <= 1.5
    packed = view_masks([encode_mask(mask) for mask in masks], size, found, view)
    assert packed.shape == (4, MASK_SIDE, MASK_SIDE // 8) and packed.dtype == np.uint8
    bits = np.unpackbits(packed, axis=2).astype(bool)
    for box, mask, frame in zip(found, masks, bits, strict=True):
        for row, column in np.random.default_rng(0).integers(0, MASK_SIDE, (200, 2)):
            across = box[0] + (column + 0.5) / MASK_SIDE * (box[2] - box[0])
            down = box[1] + (row + 0.5) / MASK_SIDE * (box[3] - box[1])
            across = 150 - across if flip else across
            place = np.array([part[1] + down / y, part[0] + across / x])
            if abs(place - place.round()).min() > 1e-4:  # inside a pixel
                assert frame[row, column] == mask[tuple(place.astype(int))]


def test_boxes_outside_of_the_view_have_no_area():
    boxes = np.array([[0, 0, 10, 10], [50, 30, 60, 40], [10, 10, 30, 30]], np.float32)
    found = view_boxes(boxes, View((12, 12, 40, 28), (56, 32)))
    areas = (found[:, 2:] - found[:, :2]).prod(1)
    assert (areas[:2] == 0).all()
    np.testing.assert_allclose(found[2], [0, 0, 36, 32])
    assert view_boxes(np.zeros((0, 4), np.float32), View((0, 0, 9, 9), (9, 9))).shape == (0, 4)
    assert view_masks([], (9, 9), np.zeros((0, 4)), View((0, 0, 9, 9), (9, 9))).shape == (
        0, MASK_SIDE, MASK_SIDE // 8,
    )  # fmt: skip
