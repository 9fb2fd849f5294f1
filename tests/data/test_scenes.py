import numpy as np
import pytest
from make_task import open_dataset
from sklearn.datasets import load_sample_images

from tokenvit_jax.data import builtin_info
from tokenvit_jax.data.datasets import scenes
from tokenvit_jax.data.datasets.digits import DigitsSource


@pytest.fixture(scope="module")
def sources():
    return {split: open_dataset("scenes", split) for split in ("train", "test")}


def test_scenes_are_the_same_each_time(sources):
    again = open_dataset("scenes", "train")
    record, same = sources["train"].read(7), again.read(7)
    np.testing.assert_array_equal(np.asarray(same["image"]), np.asarray(record["image"]))
    np.testing.assert_array_equal(same["label_map"], record["label_map"])
    for other in (sources["train"].read(8), sources["test"].read(7)):
        assert (np.asarray(other["image"]) != np.asarray(record["image"])).any()


@pytest.mark.parametrize("split", ["train", "test"])
def test_scenes_have_all_classes_in_fair_parts(sources, split):
    source, info = sources[split], builtin_info("scenes")
    assert len(source) == info.splits[split]
    maps = []
    for index in range(100):
        record = source.read(index)
        image, label = record["image"], record["label_map"]
        assert set(record) == {"id", *info.fields} and record["id"] == index
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
        record = sources["train"].read(index)
        grey, label = np.asarray(record["image"].convert("L")).astype(float), record["label_map"]
        contrast.append(grey[label > 0].mean() - grey[label == 0].mean())
    assert np.mean(contrast) > 60 and min(contrast) > 0


def test_test_scenes_have_digits_and_photographs_of_their_own(sources):
    for split, source in sources.items():
        digits = DigitsSource(split)
        records = [digits.read(index) for index in range(len(digits))]
        expected = [
            (np.asarray(record["image"].convert("L")).tobytes(), record["label"])
            for record in records
            if record["label"] < 4
        ]
        assert [(image.tobytes(), digit) for image, digit in source._digits] == expected
    for number, photograph in enumerate(load_sample_images().images):
        parts = [np.asarray(sources[split]._photographs[number]) for split in ("train", "test")]
        assert [part.shape[1] for part in parts] == [480, 160]
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), photograph)
