"""Batches that are written to given memory equal those of grain."""

import pickle

import grain
import numpy as np
import pytest

from tokenvit_jax.data.batching import ExampleBatches

SIZE, SHAPE = 4, (3, 5, 2)


class Example(grain.transforms.Map):
    """Returns an image of memory that all examples use, so that it must be written at once."""

    def __init__(self, shapes=(SHAPE,), dtype=np.uint8):
        self._images = [np.zeros(shape, dtype) for shape in shapes]

    def map(self, index):
        image = self._images[index % len(self._images)]
        image[...] = index
        return {"image": image, "label": np.int32(index)}


class Copied(Example):
    def map(self, index):
        return {name: value.copy() for name, value in super().map(index).items()}


def examples(kind=Example, count=22, **settings):
    return grain.MapDataset.range(count).map(kind(**settings))


@pytest.mark.parametrize(("first", "step"), [(0, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize("like", [(SIZE, *SHAPE), (SIZE, 5, 3, 2)], ids=["own shape", "turned"])
def test_batches_equal_those_of_grain(first, step, like):
    wanted = examples(Copied).batch(SIZE, drop_remainder=True)[first::step]
    batches = pickle.loads(pickle.dumps(ExampleBatches(examples(), SIZE, first, step)))
    assert len(batches) == len(wanted) > 0
    for i, batch in enumerate(wanted):
        image = np.full(like, 255, np.uint8)
        own = batches[i]
        others, shapes = batches.write(i, {"image": image})
        assert shapes == {"image": (SIZE, *SHAPE)} and others.keys() == {"label"}
        found = {"image": image.reshape(shapes["image"]), **others}
        assert found.keys() == own.keys() == batch.keys()
        for name, values in batch.items():
            assert found[name].dtype == values.dtype == own[name].dtype
            np.testing.assert_array_equal(found[name], values)
            np.testing.assert_array_equal(own[name], values)
    assert [batch["label"][0] for batch in batches[1:]] == [b["label"][0] for b in wanted[1:]]


def test_an_endless_stream():
    batches = ExampleBatches(examples().repeat(), SIZE, 1, 2)
    np.testing.assert_array_equal(batches[10**6]["label"], (8 * 10**6 + 4 + np.arange(4)) % 22)


class Numbers(Copied):
    def map(self, index):
        image = super().map(index)["image"]
        return {"image": image.transpose(2, 0, 1), "label": index, "weight": 0.5, "flipped": True}


def test_numbers_and_arrays_that_are_not_contiguous():
    ours, grains = ExampleBatches(examples(Numbers), SIZE), examples(Numbers).batch(SIZE)
    for name, values in grains[1].items():
        assert ours[1][name].dtype == values.dtype
        np.testing.assert_array_equal(ours[1][name], values)


class Other(Example):
    """Returns an example with another entry in second place."""

    def map(self, index):
        return super().map(index) | ({"mask": np.int32(0)} if index == 1 else {})


@pytest.mark.parametrize(
    ("settings", "like", "error"),
    [
        ({"shapes": [SHAPE, (5, 3, 2)]}, SHAPE, r"image \(5, 3, 2\) in a batch with \(3, 5, 2\)"),
        ({"shapes": [SHAPE, (1, 5, 2)]}, SHAPE, r"image \(1, 5, 2\) in a batch with \(3, 5, 2\)"),
        (
            {"kind": Other},
            SHAPE,
            r"'label'\] and with \['image', 'label', 'mask'\]",
        ),
        ({}, (3, 5, 1), "cannot reshape"),
        ({"dtype": np.int8}, SHAPE, "Cannot cast"),
    ],
)
def test_what_does_not_fit(settings, like, error):
    batches = ExampleBatches(examples(**settings), SIZE)
    with pytest.raises((ValueError, TypeError), match=error):
        batches.write(0, {"image": np.zeros((SIZE, *like), np.uint8)})
