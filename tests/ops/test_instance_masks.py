"""Masks of objects against float64 loops and MMDetection's arrays."""

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenvit_jax.ops import mask_targets, paste_masks, unpack_masks

GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "instance_masks.npz"))
RNG = np.random.default_rng(0)


def bilinear(mask, y, x):
    """Returns the value of a mask between its cells, with zeros around."""
    value = 0.0
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < mask.shape[0] and 0 <= column < mask.shape[1]:
                value += (1 - abs(y - row)) * (1 - abs(x - column)) * mask[row, column]
    return value


def naive_paste(mask, box, size):
    x1, y1, x2, y2 = map(float, box)
    image = np.zeros(size)
    for i, j in np.ndindex(*size):
        y = (i + 0.5 - y1) / (y2 - y1) * mask.shape[0] - 0.5
        x = (j + 0.5 - x1) / (x2 - x1) * mask.shape[1] - 0.5
        image[i, j] = bilinear(mask, y, x)
    return image


def naive_target(mask, frame, roi, size):
    """Returns the mean of samples of each cell, for a mask (h, w) that fills a frame."""
    side_y, side_x = (roi[3] - roi[1]) / size, (roi[2] - roi[0]) / size
    rows, columns = max(math.ceil(side_y), 1), max(math.ceil(side_x), 1)
    means = np.zeros((size, size))
    for i, j, k, m in np.ndindex(size, size, rows, columns):
        y = roi[1] + (i + (k + 0.5) / rows) * side_y
        x = roi[0] + (j + (m + 0.5) / columns) * side_x
        y = (y - frame[1]) / (frame[3] - frame[1]) * mask.shape[0] - 0.5
        x = (x - frame[0]) / (frame[2] - frame[0]) * mask.shape[1] - 0.5
        if -1 <= y <= mask.shape[0] and -1 <= x <= mask.shape[1]:
            y, x = np.clip(y, 0, mask.shape[0] - 1), np.clip(x, 0, mask.shape[1] - 1)
            means[i, j] += bilinear(mask, y, x) / (rows * columns)
    return means


def test_pasted_masks_equal_mmdetection():
    masks, boxes = GOLDEN["in/masks"], GOLDEN["in/boxes"]
    paste = jax.jit(lambda *args: paste_masks(*args, (61, 83)))
    found = np.asarray(paste(masks, boxes))
    np.testing.assert_allclose(found, GOLDEN["out/probabilities"], atol=2e-5)
    np.testing.assert_array_equal(found >= 0.5, GOLDEN["out/mask_0.5"])
    zero_width = np.tile(GOLDEN["zero_width/box"], (3, 1))
    assert not paste(masks, zero_width).any()


def test_pasted_masks_equal_loops():
    masks = RNG.uniform(size=(4, 5, 5)).astype(np.float32)
    boxes = np.array(
        [[2, 3, 9, 6], [-4.5, -2, 20, 12.25], [3.2, 1.1, 3.3, 8], [30, 30, 40, 40]], np.float32
    )
    found = jax.jit(lambda *args: paste_masks(*args, (8, 11)))(masks, boxes)
    for image, mask, box in zip(found, masks, boxes, strict=True):
        np.testing.assert_allclose(image, naive_paste(mask, box, (8, 11)), atol=1e-5)
    assert not found[3].any()
    paste = jax.jit(jax.vmap(lambda *args: paste_masks(*args, (8, 11))))
    each = paste(jnp.asarray(masks, jnp.bfloat16)[:, None], boxes[:, None])
    assert each.dtype == jnp.float32
    np.testing.assert_allclose(each[:, 0], found, atol=0.01)


def test_targets_of_whole_bitmaps_equal_mmdetection():
    masks = GOLDEN["target/in/masks"][GOLDEN["target/in/mask_index"]]
    frames = np.tile(np.array([0, 0, 128, 96], np.float32), (len(masks), 1))
    find = jax.jit(lambda *args: mask_targets(*args, max_samples=8))
    found = np.asarray(find(masks, frames, GOLDEN["target/in/boxes"]))
    np.testing.assert_array_equal(found, GOLDEN["target/out/target_28"])
    assert found.any((1, 2)).sum() == 4


def in_boxes(masks, boxes, side=112):
    """Returns the pixels of masks (n, H, W) that are nearest to the cells of their boxes."""
    found = []
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        place = (np.arange(side) + 0.5) / side
        rows = np.clip(np.floor(y1 + place * (y2 - y1)), 0, mask.shape[0] - 1).astype(int)
        columns = np.clip(np.floor(x1 + place * (x2 - x1)), 0, mask.shape[1] - 1).astype(int)
        found.append(mask[rows][:, columns])
    return np.stack(found)


def test_targets_of_masks_in_their_boxes_are_nearly_those_of_bitmaps():
    bitmaps = GOLDEN["target/in/masks"]
    places = [np.nonzero(mask) for mask in bitmaps]
    frames = np.array([[x.min(), y.min(), x.max() + 1, y.max() + 1] for y, x in places], np.float32)
    bits = np.packbits(in_boxes(bitmaps, frames), axis=-1)
    index = GOLDEN["target/in/mask_index"]
    find = jax.jit(lambda bits, *args: mask_targets(unpack_masks(bits), *args))
    found = find(bits[index], frames[index], GOLDEN["target/in/boxes"])
    assert (found != GOLDEN["target/out/target_28"]).mean() <= 0.01


@pytest.mark.parametrize("max_samples", [2, 4])
def test_targets_equal_loops(max_samples):
    masks = RNG.integers(2, size=(3, 6, 5)).astype(np.uint8)
    frames = np.array([[2, 1, 9, 7], [0, 0, 5, 6], [3, 3, 8, 12]], np.float32)
    rois = np.array([[1, 2, 8, 8], [0, 0, 5, 6], [-3.5, 2, 4.4, 9.9]], np.float32)
    found = jax.jit(lambda *args: mask_targets(*args, size=4, max_samples=max_samples))(
        masks, frames, rois
    )
    for target, mask, frame, roi in zip(found, masks, frames, rois, strict=True):
        means = naive_target(mask, frame.astype(float), roi.astype(float), 4)
        clear = abs(means - 0.5) > 1e-5
        np.testing.assert_array_equal(target[clear], (means >= 0.5)[clear])
    assert found.dtype == bool and 0.1 < found.mean() < 0.9
    each = jax.jit(jax.vmap(lambda *args: mask_targets(*args, size=4, max_samples=max_samples)))
    np.testing.assert_array_equal(each(masks[:, None], frames[:, None], rois[:, None])[:, 0], found)


def test_more_samples_than_allowed_are_not_taken():
    """A cell of three pixels takes three samples, or as many as it may, evenly spread."""
    mask = np.zeros((1, 12, 12), np.uint8)
    mask[:, 1::3] = 1  # the middle row of each cell
    frames = rois = np.array([[0, 0, 12, 12]], np.float32)
    one, all_of_them = (
        jax.jit(functools.partial(mask_targets, size=4, max_samples=n))(mask, frames, rois)
        for n in (1, 4)
    )
    assert one.all() and not all_of_them.any()


def test_unpacked_masks():
    masks = RNG.integers(2, size=(2, 3, 5, 16)).astype(bool)
    found = jax.jit(unpack_masks)(np.packbits(masks, axis=-1))
    assert found.dtype == bool
    np.testing.assert_array_equal(found, masks)
