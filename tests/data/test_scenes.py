import numpy as np
import pytest
from sklearn.datasets import load_sample_images

from tokenvit_jax import data
from tokenvit_jax.data import scenes
from tokenvit_jax.data.digits import DigitsSource
from tokenvit_jax.data.sources import open_source


@pytest.fixture(scope="module")
def sources():
    return {split: open_source("scenes", split, "") for split in ("train", "test")}


def test_scenes_are_the_same_each_time(sources):
    again = open_source("scenes", "train", "")
    image, label = sources["train"].read(7)
    np.testing.assert_array_equal(np.asarray(again.read(7)[0]), np.asarray(image))
    np.testing.assert_array_equal(again.read(7)[1], label)
    for other in (sources["train"].read(8), sources["test"].read(7)):
        assert (np.asarray(other[0]) != np.asarray(image)).any()


@pytest.mark.parametrize("split", ["train", "test"])
def test_scenes_have_all_classes_in_fair_parts(sources, split):
    source, info = sources[split], data.dataset_info("scenes")
    assert len(source) == info.splits[split]
    maps = []
    for index in range(100):
        image, label = source.read(index)
        assert image.mode == "RGB" and image.size == (scenes.SIDE, scenes.SIDE)
        assert label.shape == (scenes.SIDE, scenes.SIDE) and label.dtype == np.uint8
        maps.append(label)
    counts = np.bincount(np.ravel(maps), minlength=info.num_classes)
    assert len(counts) == info.num_classes
    share = counts / counts.sum()
    assert 0.08 < 1 - share[0] < 0.2
    assert share[1:].min() > 0.02


def test_strokes_stand_out_from_the_background(sources):
    contrast = []
    for index in range(50):
        image, label = sources["train"].read(index)
        grey = np.asarray(image.convert("L")).astype(float)
        contrast.append(grey[label > 0].mean() - grey[label == 0].mean())
    assert np.mean(contrast) > 60 and min(contrast) > 0


def test_test_scenes_have_digits_and_photographs_of_their_own(sources):
    for split, source in sources.items():
        digits = DigitsSource(split)
        records = [digits.read(index) for index in range(len(digits))]
        expected = [
            (np.asarray(image.convert("L")).tobytes(), digit)
            for image, digit in records
            if digit < 4
        ]
        assert [(image.tobytes(), digit) for image, digit in source._digits] == expected
    for number, photograph in enumerate(load_sample_images().images):
        parts = [np.asarray(sources[split]._photographs[number]) for split in ("train", "test")]
        assert [part.shape[1] for part in parts] == [480, 160]
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), photograph)
