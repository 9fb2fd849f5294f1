import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps

from tokenvit_jax.data import images
from tokenvit_jax.data.images import MEAN, STD
from tokenvit_jax.errors import UserError
from tokenvit_jax.tasks import default_config


@pytest.fixture
def augment():
    return default_config("classification").augment


@pytest.fixture(scope="module")
def photo():
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((80, 60), Image.Resampling.BICUBIC)


def encode(image, file_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "mode, file_format",
    [
        ("RGB", "PNG"),
        ("RGB", "JPEG"),
        ("CMYK", "JPEG"),
        ("L", "JPEG"),
        ("P", "PNG"),
        ("RGBA", "PNG"),
    ],
)
def test_decode_gives_rgb(photo, mode, file_format):
    image = images.decode_image(encode(photo.convert(mode), file_format))
    assert (image.mode, image.size) == ("RGB", photo.size)
    reference = photo.convert("L").convert("RGB") if mode == "L" else photo
    error = np.abs(np.asarray(image, int) - np.asarray(reference, int)).mean()
    assert error < (25 if mode in ("P", "CMYK") else 5)  # a palette has 256 colours; ink is not RGB


def test_size_is_no_reason_to_refuse_an_image(photo, monkeypatch):
    """Pillow warns above its limit of pixels and raises above twice the limit."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 80 * 60 // 2 - 1)
    assert images.decode_image(encode(photo, "PNG")).size == photo.size
    with pytest.raises(UserError):
        images.decode_image(b"no image")
    assert Image.MAX_IMAGE_PIXELS == 80 * 60 // 2 - 1


@pytest.mark.parametrize("orientation", range(9))
def test_a_rotation_noted_in_exif_is_applied_where_asked(photo, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    encoded = encode(photo, "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))
    np.testing.assert_array_equal(images.decode_image(encoded, upright=True), expected)
    np.testing.assert_array_equal(images.decode_image(encoded), photo)


def test_malformed_exif_costs_no_image(photo):
    encoded = encode(photo, "JPEG", exif=b"Exif\0\0no directory")
    assert images.decode_image(encoded, upright=True).size == photo.size


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM"])
def test_grey_levels_of_16_bits_become_8_bits(file_format):
    ramp = np.tile(np.arange(256, dtype=np.uint16) * 257, (3, 1))
    image = images.decode_image(encode(Image.fromarray(ramp), file_format))
    np.testing.assert_array_equal(np.asarray(image)[..., 1], ramp // 257)


def test_floats_are_refused():
    image = Image.fromarray(np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4))
    with pytest.raises(
        UserError, match=r"grey levels are float32 from 0.0 to 1.0; valid: integers"
    ):
        images.decode_image(encode(image, "TIFF"))


@pytest.mark.parametrize("progressive", [False, True])
def test_truncated_jpeg_is_never_half_an_image(photo, progressive):
    encoded = encode(photo, "JPEG", quality=90, progressive=progressive)
    whole = np.asarray(images.decode_image(encoded))
    errors = 0
    for length in range(0, len(encoded), 37):
        try:
            image = np.asarray(images.decode_image(encoded[:length]))
        except UserError as error:
            assert f"cannot decode {length} bytes" in str(error)
            errors += 1
        else:  # only bytes after the last pixel were cut off
            np.testing.assert_array_equal(image, whole)
    assert errors >= len(range(0, len(encoded), 37)) - 1


@pytest.mark.parametrize("encoded", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_bytes_that_are_not_an_image_are_refused(encoded):
    with pytest.raises(UserError, match="cannot decode"):
        images.decode_image(encoded)


def test_eval_image_shows_the_centre():
    # 160 x 80 with a white square of side 40 in the centre; its side is 32 after resizing.
    pixels = np.zeros((80, 160, 3), np.uint8)
    pixels[20:60, 60:100] = 255
    image = images.eval_image(Image.fromarray(pixels), 32, 0.5)
    assert image.shape == (32, 32, 3) and image.dtype == np.uint8
    assert image[2:-2, 2:-2].min() > 250


def test_eval_image_is_bicubic_or_bilinear(photo):
    small = photo.crop((0, 0, 16, 16))
    for name, method in (("bicubic", Image.BICUBIC), ("bilinear", Image.BILINEAR)):
        expected = np.asarray(small.resize((32, 32), method))
        np.testing.assert_array_equal(images.eval_image(small, 32, 1.0, name), expected)


def test_training_without_augmentation_is_the_whole_image(photo, augment):
    rng = np.random.default_rng(0)
    image = images.train_image(photo, 32, augment, rng)
    np.testing.assert_array_equal(image, images.eval_image(photo, 32, 1.0))
    assert rng.bit_generator.state == np.random.default_rng(0).bit_generator.state


def test_flip_mirrors(photo, augment):
    plain = images.train_image(photo, 32, augment, np.random.default_rng(0))
    augment.flip = 1.0
    flipped = images.train_image(photo, 32, augment, np.random.default_rng(0))
    np.testing.assert_array_equal(flipped, plain[:, ::-1])


def test_everything_on_depends_on_the_generator_only(photo, augment):
    augment.update(crop_scale=(0.1, 1.0), flip=0.5, color_jitter=0.4, erasing=0.5)
    augment.update(rotation=10.0, translation=0.1)
    augment.randaugment.num_ops = 2
    crops = [
        images.train_image(photo, 32, augment, np.random.default_rng(seed)) for seed in (0, 0, 1)
    ]
    assert crops[0].shape == (32, 32, 3) and crops[0].dtype == np.uint8
    np.testing.assert_array_equal(crops[0], crops[1])
    assert np.any(crops[0] != crops[2])


@settings(max_examples=50, deadline=None)
@given(
    width=st.integers(1, 400),
    height=st.integers(1, 400),
    low=st.floats(0.01, 1.0),
    seed=st.integers(0, 1000),
)
def test_crop_box_is_inside_and_has_the_requested_size(width, height, low, seed):
    scale, ratio = (low, 1.0), (3 / 4, 4 / 3)
    rng = np.random.default_rng(seed)
    left, top, right, bottom = images.random_crop_box(width, height, scale, ratio, rng)
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    if min(width, height) > 50 and 0.8 < width / height < 1.25:
        w, h = right - left, bottom - top
        assert 3 / 4 - 0.2 < w / h < 4 / 3 + 0.2  # sides are rounded
        assert w * h > 0.8 * low * width * height


@pytest.mark.parametrize("size, box", [((400, 20), (186, 0, 213, 20)), ((9, 90), (0, 39, 9, 51))])
def test_crop_box_of_a_strip_is_its_centre(size, box):
    box_found = images.random_crop_box(*size, (0.9, 1.0), (3 / 4, 4 / 3), np.random.default_rng(0))
    assert box_found == box


def test_erasing_fills_a_box_with_noise():
    grey = np.full((64, 64, 3), 128, np.uint8)
    areas, values = [], []
    for seed in range(100):
        erased = images.erase(grey, np.random.default_rng(seed))
        rows, columns = np.nonzero((erased != grey).any(-1))
        box = (slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1))
        areas.append((box[0].stop - box[0].start) * (box[1].stop - box[1].start) / 64**2)
        values.append(erased[box].reshape(-1, 3))
        erased[box] = 128
        np.testing.assert_array_equal(erased, grey)
    assert (grey == 128).all()  # the argument does not change
    assert 0.01 < min(areas) < 0.06 and 0.25 < max(areas) < 0.36
    noise = np.concatenate(values) / 255
    np.testing.assert_allclose(noise.mean(0), MEAN, atol=0.02)  # clipping at 0 and 1 shifts it
    np.testing.assert_allclose(noise.std(0), STD, atol=0.02)


def test_jitter_stays_within_its_strength():
    grey = Image.new("RGB", (4, 4), (100, 100, 100))  # contrast and saturation do not change it
    values = [
        np.asarray(images.color_jitter(grey, 0.4, np.random.default_rng(seed)))[0, 0, 0]
        for seed in range(200)
    ]
    assert 60 <= min(values) < 65 and 135 < max(values) <= 140


def test_translation_moves_and_rotation_turns(augment):
    pixels = np.zeros((41, 41, 3), np.uint8)
    pixels[18:23, 18:23] = 255  # the centre
    image = Image.fromarray(pixels)
    augment.translation = 0.25
    centres = []
    for seed in range(100):
        moved = images.train_image(image, 41, augment, np.random.default_rng(seed))
        centres.append(np.argwhere(moved[..., 0] > 127).mean(0) - 20)
    distance = np.abs(centres).max(0)
    assert (distance > 8).all() and (distance < 0.25 * 41 + 1).all()

    augment.translation, augment.rotation = 0.0, 30.0
    bar = np.zeros((41, 41, 3), np.uint8)
    bar[19:22] = 255
    angles = []
    for seed in range(100):
        turned = images.train_image(Image.fromarray(bar), 41, augment, np.random.default_rng(seed))
        rows = [
            turned[:, c, 0].astype(float) @ np.arange(41) / turned[:, c, 0].sum() for c in (10, 30)
        ]
        angles.append(np.degrees(np.arctan2(rows[1] - rows[0], 20)))
    assert 25 < max(angles) < 31 and -31 < min(angles) < -25
