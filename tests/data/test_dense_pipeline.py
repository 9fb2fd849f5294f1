import numpy as np
import pytest
from batches import eval_dataset, train_dataset
from PIL import Image

from tokenvit_jax.data import IGNORED
from tokenvit_jax.errors import UserError
from tokenvit_jax.tasks import default_config

MEAN_PIXEL = (124, 116, 104)


class NumberedSource:
    """Records of different sizes whose labels and grey level are their index."""

    def __init__(self, size, corrupt=()):
        self.size = size
        self.corrupt = corrupt

    def __len__(self):
        return self.size

    def name(self, index):
        return f"numbers, record {index} (n{index}.png)"

    def read(self, index):
        if index in self.corrupt:
            raise UserError(f"{self.name(index)}: unreadable")
        size = 40 + 8 * (index % 3), 48
        color = (index, index, index)
        label_map = np.full(size[::-1], index, np.uint8)
        return {"id": index, "image": Image.new("RGB", size, color), "label_map": label_map}


@pytest.fixture
def config():
    config = default_config("segmentation")
    config.dataset = "scenes"
    config.image_size = 32
    config.batch_size = 4
    config.data.eval_batch_size = 4
    config.data.label_size = (128, 128)
    return config


def augmented(config):
    config.augment.update(
        scale_range=(0.5, 2.0), max_class_share=0.9, photometric=True, flip=0.5, short_side=48
    )
    return config


def take(dataset, count):
    iterator = iter(dataset)
    return [next(iterator) for _ in range(count)]


def assert_equal(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name], err_msg=name)


def types(batch):
    return {name: (values.shape, str(values.dtype)) for name, values in batch.items()}


def test_batches_have_the_promised_types(config):
    (batch,) = take(train_dataset(augmented(config)), 1)
    assert types(batch) == {
        "image": ((4, 32, 32, 3), "uint8"),
        "label": ((4, 32, 32), "uint8"),
        "index": ((4,), "int32"),
        "skipped": ((4,), "int32"),
    }
    config.data.eval_size = (32, 48)
    batch = next(iter(eval_dataset(config)))
    assert types(batch) == {
        "image": ((4, 32, 48, 3), "uint8"),
        "image_size": ((4, 2), "int32"),
        "label": ((4, 128, 128), "uint8"),
        "label_size": ((4, 2), "int32"),
        "index": ((4,), "int32"),
        "mask": ((4,), "float32"),
        "skipped": ((4,), "int32"),
    }


def test_processes_share_the_batches_of_one(config):
    whole = take(train_dataset(augmented(config)), 3)
    parts = [take(train_dataset(config, process_index=p, process_count=2), 3) for p in range(2)]
    joined = [
        {name: np.concatenate([part[s][name] for part in parts]) for name in whole[s]}
        for s in range(3)
    ]
    assert_equal(joined, whole)


def test_workers_change_neither_batches_nor_state(config):
    config.image_size = 96  # images of a batch go through shared memory, label maps do not
    source = NumberedSource(7)
    expected = take(train_dataset(augmented(config), source), 4)
    evaluated = list(eval_dataset(config, source))
    config.data.workers = 1
    iterator = iter(train_dataset(config, source))
    iterator.set_state({"next_index": 1})
    assert_equal([next(iterator) for _ in range(3)], expected[1:])
    assert iterator.get_state() == {"next_index": 4}
    iterator.close()
    assert_equal(list(eval_dataset(config, source)), evaluated)


def test_image_and_label_map_lie_at_the_top_left(config):
    source = NumberedSource(3)
    config.data.update(eval_short_side=36, eval_size=(48, 40), label_size=(50, 60))
    (batch,) = eval_dataset(config, source)
    np.testing.assert_array_equal(batch["mask"], [1, 1, 1, 0])
    # 40 x 48, 48 x 48 and 56 x 48 (width x height): the last one would be 42 wide.
    np.testing.assert_array_equal(batch["image_size"][:3], [[43, 36], [36, 36], [34, 40]])
    np.testing.assert_array_equal(batch["label_size"][:3], [[48, 40], [48, 48], [48, 56]])
    for index in range(3):
        rows, columns = batch["image_size"][index]
        shown = np.zeros((48, 40), bool)
        shown[:rows, :columns] = True
        expected = np.where(shown[..., None], index, MEAN_PIXEL)
        np.testing.assert_array_equal(batch["image"][index], expected)
        rows, columns = batch["label_size"][index]
        shown = np.zeros((50, 60), bool)
        shown[:rows, :columns] = True
        np.testing.assert_array_equal(batch["label"][index], np.where(shown, index, IGNORED))


def test_buffers_are_as_large_as_the_image_by_default(config):
    source = NumberedSource(1)
    config.data.label_size = (0, 0)
    config.image_size = 64
    (batch,) = eval_dataset(config, source)
    assert batch["image"].shape == (4, 64, 64, 3) and batch["label"].shape == (4, 64, 64)
    np.testing.assert_array_equal(batch["image_size"][0], [64, 53])  # 53.3
    config.data.eval_size = (48, 56)
    (batch,) = eval_dataset(config, source)
    assert batch["image"].shape == (4, 48, 56, 3) and batch["label"].shape == (4, 48, 56)


@pytest.mark.parametrize("workers", [0, 1])
def test_larger_label_map_is_not_cropped(config, workers):
    source = NumberedSource(4)
    config.data.update(label_size=(48, 48), on_corrupt="skip", workers=workers)
    with pytest.raises(UserError) as error:
        list(eval_dataset(config, source))
    assert str(error.value) == (
        "numbers, record 2 (n2.png): label map of 48 x 56 pixels does not fit into 48 x 48; "
        "valid: config.data.label_size=(height, width) of the largest label map of the split"
    )


def test_filling_and_unreadable_records_do_not_count(config):
    source = NumberedSource(6, corrupt=(1,))
    config.data.on_corrupt = "skip"
    batches = list(eval_dataset(config, source))
    np.testing.assert_array_equal(
        [batch["mask"] for batch in batches], [[1, 0, 1, 1], [1, 1, 0, 0]]
    )
    assert [batch["skipped"].tolist() for batch in batches] == [[0, 1, 0, 0], [0, 0, 0, 0]]
    assert (batches[0]["label"][1] == IGNORED).all() and (batches[1]["label"][2:] == IGNORED).all()
    assert (batches[1]["image_size"] > 0).all() and (batches[1]["label_size"] > 0).all()
    config.data.on_corrupt = "raise"
    with pytest.raises(UserError, match=r"record 1 \(n1.png\): unreadable; data.on_corrupt="):
        list(eval_dataset(config, source))


def test_skipped_record_is_replaced_with_its_label_map(config):
    source = NumberedSource(4, corrupt=(1,))
    config.data.on_corrupt = "skip"
    config.augment.short_side = 40
    (batch,) = take(train_dataset(config, source), 1)
    assert sorted(batch["label"][:, 0, 0]) == [0, 2, 2, 3]
    np.testing.assert_array_equal(batch["image"], np.repeat(batch["label"][..., None], 3, -1))
    assert batch["skipped"].sum() == 1
