"""Image transforms equal timm's and torchvision's in pixels and distributions."""

import numpy as np
import pytest
from PIL import Image

from tokenvit_jax.data import images
from tokenvit_jax.data.images import MEAN, NORMALIZATIONS, STD

pytestmark = pytest.mark.parity


def noise_image(width, height):
    rng = np.random.default_rng(width)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_constants_are_timms(timm):
    from timm.data import constants

    imagenet = (constants.IMAGENET_DEFAULT_MEAN, constants.IMAGENET_DEFAULT_STD)
    assert (MEAN, STD) == NORMALIZATIONS["imagenet"] == imagenet
    inception = (constants.IMAGENET_INCEPTION_MEAN, constants.IMAGENET_INCEPTION_STD)
    assert NORMALIZATIONS["inception"] == inception


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size, crop", [(64, 0.875), (48, 1.0), (56, 0.9)])
@pytest.mark.parametrize("width, height", [(100, 80), (75, 131), (40, 40), (333, 60), (101, 100)])
def test_eval_image_equals_timms(timm, width, height, size, crop, interpolation):
    from timm.data.transforms_factory import transforms_imagenet_eval

    reference = transforms_imagenet_eval(
        size, crop, interpolation=interpolation, use_prefetcher=True
    )
    image = noise_image(width, height)

    ours = images.eval_image(image, size, crop, interpolation)

    np.testing.assert_array_equal(ours, np.asarray(reference(image)).transpose(1, 2, 0))


@pytest.mark.parametrize("width, height", [(100, 80), (75, 150), (60, 40)])
def test_rectangles_are_timms(timm, width, height):
    from timm.data.transforms_factory import transforms_imagenet_eval

    size = (64, 48)
    reference = transforms_imagenet_eval(size, 1.0, interpolation="bicubic", use_prefetcher=True)
    image = noise_image(width, height)
    ours = images.eval_image(image, size, 1.0)
    np.testing.assert_array_equal(ours, np.asarray(reference(image)).transpose(1, 2, 0))


def test_grey_statistics_are_timms(timm):
    from timm.data.loader import adapt_to_chs

    found = tuple(adapt_to_chs(values, 1) for values in NORMALIZATIONS["imagenet"])
    np.testing.assert_allclose(found, images.mean_and_std("imagenet", 1))


def test_random_crop_boxes_have_torchvisions_distribution(torchvision):
    from torchvision.transforms import RandomResizedCrop

    width, height, scale, ratio, draws = 90, 60, (0.08, 1.0), (3 / 4, 4 / 3), 4000
    rng = np.random.default_rng(0)
    ours = [images.random_crop_box(width, height, scale, ratio, rng) for _ in range(draws)]
    blank = Image.new("RGB", (width, height))
    theirs = [RandomResizedCrop.get_params(blank, scale, ratio) for _ in range(draws)]
    theirs = [(left, top, left + w, top + h) for top, left, h, w in theirs]

    # Means of 4,000 boxes: the standard error of a side is about 0.3 pixels.
    np.testing.assert_allclose(np.mean(ours, 0), np.mean(theirs, 0), atol=2.0)
    np.testing.assert_allclose(np.std(ours, 0), np.std(theirs, 0), atol=2.0)


def test_cropped_pixels_equal_torchvisions(torchvision, monkeypatch):
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resized_crop

    from tokenvit_jax.tasks import default_config

    box = (13, 7, 70, 45)
    monkeypatch.setattr(images, "random_crop_box", lambda *args: box)
    augment = default_config("classification").augment
    augment.crop_scale = (0.08, 1.0)
    image = noise_image(90, 60)
    left, top, right, bottom = box

    ours = images.train_image(image, 32, augment, np.random.default_rng(0))

    reference = resized_crop(
        image, top, left, bottom - top, right - left, [32, 32], InterpolationMode.BICUBIC
    )
    np.testing.assert_array_equal(ours, np.asarray(reference))


def test_color_jitter_equals_torchvisions(torchvision):
    from torchvision.transforms import functional

    image = noise_image(40, 30)
    names = ("adjust_brightness", "adjust_contrast", "adjust_saturation")
    for seed in range(6):
        ours = images.color_jitter(np.asarray(image), 0.4, np.random.default_rng(seed))

        rng = np.random.default_rng(seed)
        reference = image
        for i in rng.permutation(3):
            reference = getattr(functional, names[i])(reference, rng.uniform(0.6, 1.4))
        np.testing.assert_array_equal(ours, np.asarray(reference))
