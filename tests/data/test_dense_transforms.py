import numpy as np
import pytest
from PIL import Image

from tokenvit_jax.data import IGNORED
from tokenvit_jax.data.dense_transforms import (
    _draw_crop,
    distort_colors,
    fit_image,
    resize_label,
    train_scene,
)
from tokenvit_jax.tasks import default_config

FILL = (124, 116, 104)


def photograph(width, height, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def augment_with(**entries):
    augment = default_config("segmentation").augment
    augment.update(entries)
    return augment


@pytest.mark.parametrize("factor", [0.7, 1.0, 1.9])
def test_crop_equals_a_crop_of_the_resized_image(factor):
    image, size = photograph(90, 60), 32
    width, height = round(90 * 32 * factor / 60), round(60 * 32 * factor / 60)
    # Labels are the column numbers, so they show where a pixel comes from.
    label = np.broadcast_to(np.arange(90, dtype=np.uint8), (60, 90)).copy()
    resized = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)).astype(int)
    columns = resize_label(label, width, height)
    augment = augment_with(scale_range=(factor, factor))
    places = set()
    for seed in range(5):
        found, labels = train_scene(image, label, size, augment, FILL, np.random.default_rng(seed))
        shown = min(size, height), min(size, width)
        assert (found[shown[0] :] == FILL).all() and (labels[shown[0] :] == IGNORED).all()
        assert (found[:, shown[1] :] == FILL).all() and (labels[:, shown[1] :] == IGNORED).all()
        errors = {
            (top, left): np.abs(
                resized[top : top + shown[0], left : left + shown[1]]
                - found[: shown[0], : shown[1]]
            ).max()
            for top in range(height - shown[0] + 1)
            for left in range(width - shown[1] + 1)
        }
        top, left = min(errors, key=errors.get)
        assert errors[top, left] <= 1  # rounding, at the most
        expected = columns[top : top + shown[0], left : left + shown[1]]
        np.testing.assert_array_equal(labels[: shown[0], : shown[1]], expected)
        places.add((top, left))
    assert factor < 1 or len(places) > 1


@pytest.mark.parametrize("size", [(32, 48), (48, 32)])
@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_rectangular_crops_are_covered_and_no_larger(size, mode):
    image, label = photograph(90, 60).convert(mode), np.zeros((60, 90), np.uint8)
    channels = len(image.getbands())
    augment = augment_with(photometric=True)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        found, labels = train_scene(image, label, size, augment, (9,) * channels, rng)
        assert found.shape == (*size, channels) and not labels.any()  # no padding
        assert mode == "L" or (found[..., 3] == 255).all()
    if size == (32, 48):  # the shape of the image: all of it is seen
        plain, _ = train_scene(image, label, size, augment_with(), (9,) * channels, rng)
        whole = np.asarray(image.resize((48, 32), Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(plain, whole.reshape(plain.shape))


def test_image_and_labels_are_mirrored_together():
    image, label = photograph(32, 32), np.arange(32, dtype=np.uint8) + np.zeros((32, 1), np.uint8)
    plain = train_scene(image, label, 32, augment_with(), FILL, np.random.default_rng(0))
    mirrored = train_scene(image, label, 32, augment_with(flip=1.0), FILL, np.random.default_rng(0))
    for one, other in zip(plain, mirrored, strict=True):
        np.testing.assert_array_equal(one[:, ::-1], other)


def test_all_scales_between_the_limits_are_drawn():
    augment = augment_with(scale_range=(0.25, 0.75), short_side=32)
    label = np.zeros((64, 64), np.uint8)
    rng = np.random.default_rng(0)
    image = photograph(64, 64)
    sides = [
        (train_scene(image, label, 64, augment, FILL, rng)[1][0] == 0).sum() for _ in range(200)
    ]
    assert min(sides) == 8 and max(sides) == 24
    assert abs(np.mean(sides) - 16) < 1


def test_crops_of_one_class_are_avoided_where_others_are_near():
    label = np.zeros((64, 64), np.uint8)
    label[:, 40:] = 1
    label[:, 60:] = IGNORED

    def share(left, top):
        counts = np.bincount(label[top : top + 32, left : left + 32].ravel(), minlength=256)[:255]
        return counts.max() / counts.sum()

    rng = np.random.default_rng(0)
    shares = np.array([share(*_draw_crop(label, (32, 32), 0.75, rng)) for _ in range(100)])
    anywhere = np.array([share(*_draw_crop(label, (32, 32), 1.0, rng)) for _ in range(100)])
    assert (shares <= 0.75).all() and (anywhere > 0.75).mean() > 0.3
    # If there is one class only, or no labelled pixel, the last crop is taken.
    for only in (0, IGNORED):
        left, top = _draw_crop(np.full((40, 48), only, np.uint8), (32, 32), 0.75, rng)
        assert 0 <= left <= 16 and 0 <= top <= 8


@pytest.mark.parametrize(
    "size, short_side, buffer, expected",
    [
        ((90, 60), 32, (64, 64), (32, 48)),
        ((60, 90), 32, (64, 64), (48, 32)),
        ((90, 60), 60, (64, 64), (43, 64)),  # shrunk to the width: 42.67
        ((60, 90), 32, (40, 64), (40, 27)),  # shrunk to the height: 26.67
        ((300, 2), 32, (64, 64), (1, 64)),
    ],
)
def test_evaluated_image_fits_its_buffer(size, short_side, buffer, expected):
    assert fit_image(photograph(*size), short_side, *buffer).shape == (*expected, 3)


class Scripted:
    """A generator with given numbers, which choose the changes and their strengths."""

    def __init__(self, changes, *strengths):
        self.changes = np.where(changes, 0.0, 0.9)
        self.strengths = list(strengths)

    def random(self, count):
        assert count == len(self.changes)
        return self.changes

    def uniform(self, low, high):
        strength = self.strengths.pop(0)
        assert low <= strength <= high
        return strength


def hsv(pixels):
    return np.asarray(Image.fromarray(pixels).convert("HSV")).astype(int)


@pytest.mark.parametrize("contrast_first", [False, True])
def test_levels_are_changed_as_in_the_recipe(contrast_first):
    image = photograph(32, 24)
    pixels = np.asarray(image).astype(float)
    found = distort_colors(image, Scripted([1, 1, 0, 0, contrast_first], -20.0, 1.3))
    darker = np.clip(pixels - 20, 0, 255).astype(np.uint8)
    expected = np.clip(darker * 1.3, 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(found), expected)


def test_saturation_and_hue_are_changed_as_in_the_recipe():
    image = photograph(32, 24)
    before = hsv(np.asarray(image))
    grey = np.asarray(distort_colors(image, Scripted([0, 0, 1, 0, 0], 0.5)))
    clear = before[..., 1] > 20  # elsewhere the levels of hue and saturation are coarse
    np.testing.assert_allclose(hsv(grey)[..., 1], before[..., 1] / 2, atol=4)
    turned = np.asarray(distort_colors(image, Scripted([0, 0, 0, 1, 0], 36.0)))
    turn = (hsv(turned)[..., 0] - before[..., 0]) % 256
    np.testing.assert_allclose(turn[clear], 36 / 360 * 256, atol=6)
    np.testing.assert_allclose(hsv(turned)[..., 2], before[..., 2], atol=1)


def test_contrast_before_or_after_saturation_is_not_the_same():
    image = photograph(32, 24)
    first, last = (
        np.asarray(distort_colors(image, Scripted([0, 1, 1, 0, order], 1.4, 1.4)))
        for order in (True, False)
    )
    assert (first != last).any()


def test_colours_change_in_half_of_the_cases_each():
    image = Image.new("RGB", (1, 1), (120, 90, 60))
    rng = np.random.default_rng(0)
    same = [distort_colors(image, rng).getpixel((0, 0)) == (120, 90, 60) for _ in range(2000)]
    assert 0.04 < np.mean(same) < 0.09  # 1/16, and changes too small to see
