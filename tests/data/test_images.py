import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tokenvit_jax.data import images
from tokenvit_jax.data.dense_transforms import fit_image, train_scene
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


def test_eval_image_shows_the_centre():
    # 160 x 80 with a white square of side 40 in the centre; its side is 32 after resizing.
    pixels = np.zeros((80, 160, 3), np.uint8)
    pixels[20:60, 60:100] = 255
    image = images.eval_image(Image.fromarray(pixels), 32, 0.5)
    assert image.shape == (32, 32, 3) and image.dtype == np.uint8
    assert image[2:-2, 2:-2].min() > 250


@pytest.mark.parametrize("size", [(24, 48), (48, 24)])
def test_rectangles_show_the_centre_undistorted(size, augment):
    # A white square of side 40 in the centre of 160 x 80; its side is 24 after resizing by 0.6,
    # for which the larger of 48 / 80 and 24 / 80, or 24 / 160 and 48 / 160, is decisive.
    pixels = np.zeros((160, 80, 3) if size[0] < size[1] else (80, 160, 3), np.uint8)
    top, left = (side // 2 - 20 for side in pixels.shape[:2])
    pixels[top : top + 40, left : left + 40] = 255
    image = images.eval_image(Image.fromarray(pixels), size, 1.0)
    white = np.argwhere(image[..., 0] > 127)
    assert image.shape == (*size, 3)
    centre = (np.array(size) - 1) / 2
    np.testing.assert_allclose(white.mean(0), centre, atol=0.51)
    assert (np.ptp(white, 0) + 1).tolist() == [24, 24]
    whole = images.train_image(Image.fromarray(pixels), size, augment, np.random.default_rng(0))
    np.testing.assert_array_equal(whole, image)


def test_crops_have_the_shape_of_the_example(augment):
    augment.update(crop_scale=(0.05, 0.05), crop_ratio=(1.0, 1.0))
    left, top, right, bottom = images.draw_view(
        (400, 400), (32, 64), augment, np.random.default_rng(0)
    ).box
    assert abs((right - left) / (bottom - top) - 2) < 0.05


@pytest.mark.parametrize("size", [(4000, 2), (2, 4000)])
@pytest.mark.parametrize("crop", [0.875, 1.0])
def test_a_strip_is_resized_only_where_it_is_seen(size, crop):
    rng = np.random.default_rng(0)
    strip = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    side = 32 if crop == 1.0 else 36
    tall, wide = (s * side // 2 for s in size[::-1])
    resized = np.asarray(strip.resize((wide, tall), Image.Resampling.BICUBIC))
    top, left = (tall - 32) // 2, (wide - 32) // 2
    found = images.eval_image(strip, 32, crop)
    np.testing.assert_array_equal(found, resized[top : top + 32, left : left + 32])


def test_the_longest_strips_take_no_gigabytes(augment):
    before = time.process_time()
    for size in ((30000, 1), (1, 30000)):
        strip, label = Image.new("RGB", size), np.zeros(size[::-1], np.uint8)
        images.eval_image(strip, 224, 0.875)
        images.eval_image(strip, (48, 64), 0.1)
        images.train_image(strip, (256, 192), augment, np.random.default_rng(0))
        whole = default_config("classification").augment
        whole.update(crop_scale=(0.08, 1.0), flip=0.5, color_jitter=0.4, erasing=1.0)
        whole.update(rotation=10.0, translation=0.1)
        whole.randaugment.num_ops = 4
        images.train_image(strip, 224, whole, np.random.default_rng(0))
        segmentation = default_config("segmentation").augment
        segmentation.update(photometric=True, max_class_share=0.75, short_side=0)
        train_scene(strip, label, 224, segmentation, (0, 0, 0), np.random.default_rng(0))
        fit_image(strip, 224, 448, 448)
    assert time.process_time() - before < 1  # 6 GiB of pixels take longer


def test_grey_loses_nothing_by_a_detour_through_rgb():
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    found = images.with_channels(grey.convert("RGB"), 1)
    np.testing.assert_array_equal(images.to_array(found)[..., 0], np.asarray(grey))
    opaque = images.with_channels(grey, 4)
    assert opaque.mode == "RGBA" and set(opaque.getchannel("A").tobytes()) == {255}


def test_statistics_of_grey_and_of_alpha():
    assert images.mean_and_std("imagenet", 1) == ((pytest.approx(0.449),), (pytest.approx(0.226),))
    assert images.mean_and_std("imagenet", 4) == ((*MEAN, 1.0), (*STD, 1.0))
    assert images.mean_pixel("inception", 4) == (128, 128, 128, 255)


@pytest.mark.parametrize("channels", [1, 4])
def test_augmentation_of_grey_images_and_of_alpha(photo, augment, channels):
    """Colours of an opaque image change as those of an RGB image, and grey images stay grey."""
    augment.update(crop_scale=(0.1, 1.0), flip=0.5, color_jitter=0.4)
    rgb = images.with_channels(images.with_channels(photo, 1), 3)
    image = images.with_channels(rgb, channels)
    changed = 0
    for seed in range(20):
        found, expected = (
            images.train_image(x, (32, 24), augment, np.random.default_rng(seed))
            for x in (image, rgb)
        )
        assert found.shape == (32, 24, channels)
        shown = found if channels == 1 else found[..., :3]
        np.testing.assert_allclose(shown.astype(int), expected[..., : shown.shape[-1]], atol=2)
        assert channels == 1 or (found[..., 3] == 255).all()
        changed += np.abs(found[..., 0].astype(int) - found[0, 0, 0]).max() > 0
    assert changed == 20
    augment.update(erasing=1.0, rotation=10.0, translation=0.1)
    augment.randaugment.num_ops = 3
    for seed in range(20):
        found = images.train_image(image, (32, 24), augment, np.random.default_rng(seed))
        assert found.shape == (32, 24, channels) and found.dtype == np.uint8


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 2), (1, 4, 5, 3), (0, 5, 3), (4, 0, 1)])
def test_arrays_that_are_no_images_are_named(shape):
    with pytest.raises(UserError, match=r"valid: uint8 \(height, width, channels\) with 1, 3, 4"):
        images.from_array(np.zeros(shape, np.uint8))


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
    grey = np.full((4, 4, 3), 100, np.uint8)  # contrast and saturation do not change it
    values = [
        images.color_jitter(grey, 0.4, np.random.default_rng(seed))[0, 0, 0] for seed in range(200)
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
