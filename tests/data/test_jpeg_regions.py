"""Regions of JPEGs are decoded and resized with exactly Pillow's pixels."""

import io

import damaged_images
import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from tokenvit_jax.data import jpeg_regions
from tokenvit_jax.data.decoding import LazyJpeg, decode_image, open_image
from tokenvit_jax.data.images import resize_pixels
from tokenvit_jax.errors import UserError

needs_extension = pytest.mark.skipif(
    jpeg_regions._extension is None, reason="the extension is not compiled, or does not fit Pillow"
)
FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)


def draw_jpeg(rng, width, height, **options):
    coarse = rng.integers(0, 256, (2 + height // 16, 2 + width // 16, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    noisy = (image + rng.normal(0, 8, image.shape)).clip(0, 255).astype(np.uint8)
    return encode(Image.fromarray(noisy), **options)


def encode(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def draw_interval(rng, size):
    start = int(rng.integers(size))
    return start, int(rng.integers(start + 1, size + 1))


def draw_box(rng, size):
    (left, right), (top, bottom) = (draw_interval(rng, side) for side in size)
    return left, top, right, bottom


@needs_extension
@pytest.mark.parametrize("vectors", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"subsampling": 0},
        {"subsampling": 1, "restart_marker_blocks": 3},
        {"subsampling": 2},
        {"subsampling": 2, "progressive": True, "quality": 30},
        "grey",
    ],
)
def test_regions_equal_pillow(options, vectors):
    rng = np.random.default_rng(0)
    jpeg_regions._load(vectors)
    try:
        for trial in range(60):
            size = tuple(int(side) for side in rng.integers(1, 200, 2))
            content = draw_jpeg(rng, *size, **({} if options == "grey" else options))
            if options == "grey":
                content = encode(Image.open(io.BytesIO(content)).convert("L"))
            _compare(rng, content, trial)
    finally:
        jpeg_regions._load()


def _compare(rng, content, trial):
    whole = decode_image(content)
    crop = draw_box(rng, whole.size)
    width, height = crop[2] - crop[0], crop[3] - crop[1]
    resized = tuple(int(side) for side in rng.integers(1, 120, 2))
    box = None
    if trial % 3 == 0:
        box = 0.1 * width, 0.3 * height, 0.9 * width, 0.7 * height
    window = draw_box(rng, resized) if trial % 2 else None
    flip, resample = bool(trial % 5 < 2), FILTERS[trial % 4 > 0]
    expected = whole.crop(crop).resize(resized, resample, box).crop(window or (0, 0, *resized))
    if flip:
        expected = ImageOps.mirror(expected)
    lazy = open_image(content)
    found = resize_pixels(lazy, resized, resample, crop=crop, box=box, window=window, flip=flip)
    assert lazy.content is not None  # Pillow has not decoded it
    np.testing.assert_array_equal(found, expected)


@needs_extension
def test_tall_crops_are_resized_in_the_order_of_the_installed_pillow():
    content = draw_jpeg(np.random.default_rng(1), 40, 400)
    found = resize_pixels(open_image(content), (30, 20), FILTERS[1])
    np.testing.assert_array_equal(found, decode_image(content).resize((30, 20), FILTERS[1]))


@needs_extension
def test_a_jpeg_is_decoded_when_its_pixels_are_needed():
    content = draw_jpeg(np.random.default_rng(0), 50, 30)
    image = open_image(content)
    assert isinstance(image, LazyJpeg) and (image.mode, image.size) == ("RGB", (50, 30))
    np.testing.assert_array_equal(image, decode_image(content))
    assert image.content is None
    np.testing.assert_array_equal(open_image(content).convert("L"), image.convert("L"))
    np.testing.assert_array_equal(resize_pixels(image, (50, 30), FILTERS[0]), image)


def test_without_the_extension_pillow_gives_the_same_pixels(monkeypatch):
    image = decode_image(draw_jpeg(np.random.default_rng(0), 50, 30))
    content = encode(image)
    resized = resize_pixels(open_image(content), (20, 24), FILTERS[1], flip=True)
    monkeypatch.setattr(jpeg_regions, "_extension", None)
    opened = open_image(content)
    assert not isinstance(opened, LazyJpeg)
    np.testing.assert_array_equal(resize_pixels(opened, (20, 24), FILTERS[1], flip=True), resized)


@pytest.mark.parametrize("orientation", [1, 6])
def test_rotated_files_are_opened_upright(tmp_path, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / "a.jpg"
    path.write_bytes(draw_jpeg(np.random.default_rng(0), 50, 30, exif=exif))
    image = open_image(path, upright=True)
    assert image.size == ((50, 30) if orientation == 1 else (30, 50))
    np.testing.assert_array_equal(image, decode_image(path, upright=True))
    np.testing.assert_array_equal(open_image(path), decode_image(path))


def test_other_files_are_decoded_at_once(tmp_path):
    image = Image.new("CMYK", (8, 8), (0, 255, 0, 0))
    for content in (encode(image), b"no image", b"\xff\xd8\xff\xd9"):
        try:
            expected = np.asarray(decode_image(content))
        except UserError as error:
            with pytest.raises(UserError, match=str(error)):
                open_image(content)
        else:
            np.testing.assert_array_equal(open_image(content), expected)
    with pytest.raises(UserError):
        open_image(tmp_path / "missing.jpg")


@pytest.mark.parametrize("progressive", [False, True])
def test_truncation_below_the_crop_is_found(progressive):
    content = draw_jpeg(np.random.default_rng(0), 64, 200, progressive=progressive)
    for length in range(2, len(content), len(content) // 40):
        with pytest.raises(UserError, match=f"cannot decode {length} bytes"):
            open_image(content[:length])


@pytest.mark.parametrize("kind", ["JPEG", "progressive JPEG"])
def test_damaged_files_give_pillows_pixels_or_one_error(kind):
    """Damage below the region does not show; elsewhere Pillow decides what becomes of it."""
    rng, content = np.random.default_rng(0), damaged_images.encode(kind)
    for _ in range(150):
        damaged = damaged_images.damage(content, rng)
        try:
            found = resize_pixels(open_image(damaged), (9, 8), FILTERS[1], crop=(20, 9, 60, 30))
        except UserError:
            with pytest.raises(UserError):
                decode_image(damaged)
            continue
        try:
            whole = decode_image(damaged)
        except UserError:
            assert jpeg_regions.jpeg_size(damaged)  # it has its end, and a header
            continue
        expected = whole.crop((20, 9, 60, 30)).resize((9, 8), FILTERS[1])
        np.testing.assert_array_equal(found, expected)
