"""Warps and changes of colours give exactly Pillow's pixels, with the extension and without it."""

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from tokenvit_jax.data import pixel_ops
from tokenvit_jax.data.pixel_ops import from_array, to_array
from tokenvit_jax.data.randaugment import apply_operation

BICUBIC = Image.Resampling.BICUBIC
FILLS = {1: (110,), 3: (124, 116, 104), 4: (124, 116, 104, 255)}
# Sides around the vectors' lengths and those that the border or the filter fills.
SIDES = (1, 2, 3, 4, 5, 7, 8, 11, 12, 31, 60)
FACTORS = (0.0, 0.1, 0.37, 0.9999, 1.0, 1.0001, 1.63, 1.9, 7.3)


@pytest.fixture(params=["extension", "Pillow"], autouse=True)
def form(request, monkeypatch):
    if request.param == "Pillow":
        monkeypatch.setattr(pixel_ops, "_extension", None)
    elif pixel_ops._extension is None:
        pytest.skip("the extension is not compiled, or the processor has no AVX2")


def draw_image(rng, channels, size=None):
    """Returns noise, a smooth image, few levels or one colour."""
    height, width = size or rng.choice(SIDES, 2)
    kind = rng.integers(4)
    if kind == 1:
        coarse = rng.integers(0, 256, (3, 4, 3), np.uint8)
        pixels = np.asarray(Image.fromarray(coarse).resize((width, height), BICUBIC))
        pixels = np.concatenate([pixels, pixels[..., :1]], -1)[..., :channels]
    else:
        levels = (256, None, 3, 1)[kind]
        few = rng.integers(0, 256, levels, np.uint8)
        pixels = rng.choice(few, (height, width, channels))
    return np.ascontiguousarray(pixels)


def images(channels, count):
    rng = np.random.default_rng(0)
    return rng, (draw_image(rng, channels) for _ in range(count))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "ours, pillows",
    [
        (pixel_ops.brightness, ImageEnhance.Brightness),
        (pixel_ops.contrast, ImageEnhance.Contrast),
        (pixel_ops.color, ImageEnhance.Color),
        (pixel_ops.sharpness, ImageEnhance.Sharpness),
    ],
)
def test_blends_equal_pillows(ours, pillows, channels):
    rng, drawn = images(channels, 60)
    for pixels in drawn:
        for factor in (*FACTORS, rng.uniform(0, 2)):
            before = pixels.copy()
            expected = to_array(pillows(from_array(pixels)).enhance(factor))
            np.testing.assert_array_equal(ours(pixels, factor), expected)
            np.testing.assert_array_equal(pixels, before)


@pytest.mark.parametrize("channels", [1, 3])
def test_tables_equal_pillows(channels):
    _, drawn = images(channels, 150)
    for pixels in drawn:
        image = from_array(pixels)
        for ours, pillows in (
            (pixel_ops.auto_contrast(pixels), ImageOps.autocontrast(image)),
            (pixel_ops.equalize(pixels), ImageOps.equalize(image)),
            (apply_operation(pixels, "invert", 0.0, 1, ()), ImageOps.invert(image)),
            (apply_operation(pixels, "solarize", 3.7, 1, ()), ImageOps.solarize(image, 162)),
            (apply_operation(pixels, "posterize", 5.0, 1, ()), ImageOps.posterize(image, 2)),
        ):
            np.testing.assert_array_equal(ours, to_array(pillows))
        np.testing.assert_array_equal(pixel_ops.histogram(pixels).ravel(), image.histogram())


def test_blends_know_all_pairs_of_values():
    """Every grey level of a channel, blended with every other."""
    greys, levels = np.meshgrid(np.arange(256), np.arange(256))
    pixels = np.stack([levels, greys, greys], -1).astype(np.uint8)
    for factor in (0.37, 1.9):
        for name in ("Color", "Contrast", "Sharpness"):
            expected = to_array(getattr(ImageEnhance, name)(from_array(pixels)).enhance(factor))
            found = getattr(pixel_ops, name.lower())(pixels, factor)
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_warps_equal_pillows(channels):
    rng = np.random.default_rng(0)
    for trial in range(60):
        pixels, fill = draw_image(rng, channels), FILLS[channels]
        size, image = pixels.shape[1::-1], from_array(pixels)
        moves = rng.normal(0, (0.3, 9, 0.3, 9))
        for matrix in (
            (1, *moves[:3], 1, moves[3]),
            (1, 0, trial - 20, 0, 1, 0.5),  # whole pixels across, half a pixel down
            (1, 0, moves[1], 0, 1, 0),
            (1, 0, 0, 0, 1, moves[3]),
            (1, moves[0], 0, 0, 1, 0),
            (1, 0, 0, moves[2], 1, 0),
        ):
            transform = Image.Transform.AFFINE
            expected = image.transform(size, transform, matrix, BICUBIC, fillcolor=fill)
            found = pixel_ops.warp(pixels, matrix, fill)
            np.testing.assert_array_equal(found, to_array(expected))
        angle = float(rng.uniform(-30, 30))
        found = apply_operation(pixels, "rotate", abs(angle) / 3, int(np.sign(angle)), fill)
        turn = np.sign(angle) * (abs(angle) / 3 / 10.0) * 30.0
        np.testing.assert_array_equal(found, to_array(image.rotate(turn, BICUBIC, fillcolor=fill)))


def test_alpha_does_not_change():
    pixels = draw_image(np.random.default_rng(0), 4, (9, 7))
    found = pixel_ops.change_colors(pixel_ops.equalize, pixels)
    np.testing.assert_array_equal(found[..., 3], pixels[..., 3])
    expected = ImageOps.equalize(from_array(pixels[..., :3]))
    np.testing.assert_array_equal(found[..., :3], to_array(expected))


def test_views_of_larger_images_are_images():
    pixels = draw_image(np.random.default_rng(0), 3, (20, 30))
    part = pixels[3:15:2, 20:4:-1]
    whole = np.ascontiguousarray(part)
    for change in (pixel_ops.equalize, lambda image: pixel_ops.sharpness(image, 1.5)):
        np.testing.assert_array_equal(change(part), change(whole))
