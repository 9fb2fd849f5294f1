import numpy as np
import pytest
from make_task import open_dataset
from sklearn.datasets import load_digits

from tokenvit_jax.data import builtin_info, list_datasets
from tokenvit_jax.data.record import Record
from tokenvit_jax.errors import UserError


@pytest.mark.parametrize("name", list_datasets())
def test_info_is_consistent(name):
    info = builtin_info(name)
    assert info.name == name
    assert info.train_split in info.splits and info.eval_split in info.splits
    assert info.classes is None or len(info.classes) == info.num_classes
    assert "image" in info.fields
    assert info.fields < set(Record.__annotations__)


def test_unknown_dataset_names_the_nearest():
    with pytest.raises(
        UserError,
        match=r"'digitz' \(did you mean 'digits'.*ade20k, cityscapes, digits, imagenet2012",
    ):
        builtin_info("digitz")
    with pytest.raises(
        UserError, match="no dataset 'zzz'; valid: ade20k, cityscapes, digits, imagenet2012"
    ):
        builtin_info("zzz")


def test_digits_splits_partition_the_images_by_class():
    info = builtin_info("digits")
    found, labels = [], {}
    for split, size in info.splits.items():
        source = open_dataset("digits", split)
        records = [source.read(i) for i in range(len(source))]
        assert len(records) == size
        assert [record["id"] for record in records] == list(range(size))
        assert source.name(3) == f"digits split {split!r}, record 3"
        images = [record["image"] for record in records]
        assert all(image.mode == "RGB" and image.size == (8, 8) for image in images)
        labels[split] = [record["label"] for record in records]
        pixels = [np.asarray(image)[..., 0].tobytes() for image in images]
        found += zip(labels[split], pixels, strict=True)

    digits = load_digits()
    pixels = np.rint(digits.images * 255 / 16).astype(np.uint8)
    expected = [
        (int(label), image.tobytes()) for label, image in zip(digits.target, pixels, strict=True)
    ]
    assert sorted(found) == sorted(expected)
    share = np.bincount(labels["test"]) / np.bincount(digits.target)
    np.testing.assert_allclose(share, 0.2, atol=0.005)


def test_unprepared_dataset_says_how_to_prepare_it(tmp_path):
    with pytest.raises(UserError) as error:
        open_dataset("imagenet2012", "train", str(tmp_path))
    assert str(error.value) == (
        f"dataset imagenet2012 not found in data.data_dir={tmp_path}; prepare it with: "
        f"python -m tokenvit_jax.prepare imagenet2012 --manual_dir=DOWNLOADS --data_dir={tmp_path}"
    )
