import numpy as np
import pytest
from make_task import open_dataset
from sklearn.datasets import load_digits

from tokenvit_jax.data import builtin_info, dataset_info, list_datasets, with_class_names
from tokenvit_jax.data.record import Record
from tokenvit_jax.errors import UserError
from tokenvit_jax.tasks import create_task, default_config


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
        match=r"'digitz' \(did you mean 'digits'.*ade20k_panoptic, cityscapes, coco, coco_panoptic",
    ):
        builtin_info("digitz")
    with pytest.raises(UserError, match="no dataset 'zzz'; valid: ade20k, ade20k_instances, ade20"):
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


OWN = """
from PIL import Image
from tokenvit_jax.data import DatasetInfo, Record

INFO = DatasetInfo(
    name="coins",
    splits={"train": 2, "test": 2},
    train_split="train",
    eval_split="test",
    fields=frozenset({"image", "label"}),
    num_classes=2,
    classes=("heads", "tails"),
)


class Coins:
    def __init__(self, split):
        self.split = split

    def __len__(self):
        return 2

    def read(self, index):
        return Record(id=index, image=Image.new("RGB", (4, 4)), label=index)

    def name(self, index):
        return f"coins split {self.split!r}, record {index}"


def open_split(config, split):
    return Coins(split)
"""


def test_a_dataset_in_a_module_of_the_user(tmp_path, monkeypatch):
    (tmp_path / "money").mkdir()
    (tmp_path / "money" / "coins.py").write_text(OWN)
    (tmp_path / "money" / "empty.py").write_text("")
    (tmp_path / "money" / "boxes.py").write_text(OWN.replace('"label"', '"instances"'))
    people = OWN.replace('"label"', '"person"')
    bare = f"{people}annotations = open_split\n"
    skeleton = 'Skeleton(("eye", "ear"), ((0, 9),), (0.1, 0.1), (), (), {})'
    odd = f"{bare}from tokenvit_jax.data.record import Skeleton\nfrom dataclasses import replace\n"
    for name, text in {
        "people": people, "bare": bare, "odd": f"{odd}INFO = replace(INFO, skeleton={skeleton})\n",
    }.items():  # fmt: skip
        (tmp_path / "money" / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    config = default_config("classification")
    config.dataset = "money.coins"
    assert create_task(config).info.classes == ("heads", "tails")
    assert with_class_names(config).data.classes == ("heads", "tails")
    assert open_dataset("money.coins", "test").read(1)["label"] == 1
    for name, message in (
        ("money.notes", "config.dataset='money.notes': cannot import this module: No module named"),
        ("money.empty", "this module has neither INFO nor read_info"),
        ("money.boxes", r"records of this module have 'instances', but it has no annotations\("),
        ("money.people", r"records of this module have 'person', but it has no annotations\("),
        ("money.bare", "records of this module have 'person', but its INFO has no skeleton"),
        ("money.odd", "'money.odd': flip_pairs of the skeleton have the keypoint 9; valid: 0 to 1"),
    ):
        config.dataset = name
        with pytest.raises(UserError, match=message):
            create_task(config)


def test_no_dataset():
    config = default_config("segmentation")
    config.dataset = "none"
    assert create_task(config).info.num_classes == 0  # a model without a classifier
    config.data.classes = ("cat", "dog")
    assert create_task(config).class_names() == ("cat", "dog")
    with pytest.raises(UserError, match="has no images for the split 'val'; name a dataset with"):
        open_dataset("none", "val")


def test_entries_that_do_not_fit_a_built_in_dataset():
    config = default_config("classification")
    config.data.classes = tuple("abcdefghij")
    assert dataset_info(config).classes[2] == "c"
    assert with_class_names(config) is config
    config.data.classes = ("a", "b")
    with pytest.raises(UserError, match="has 2 names; valid: one for each of the 10 classes of"):
        dataset_info(config)
    config.data.update({"classes": (), "split": 0.1})
    with pytest.raises(UserError, match=r"config.data.split=0.1 is for folders and tfds:NAME"):
        dataset_info(config)
    for name in ("digits:3", "tfds"):
        config.dataset = name
        with pytest.raises(UserError, match=f"'{name}'.*; valid: "):
            dataset_info(config)
    config.dataset = "scenes"
    config.data.split = 0.0
    with pytest.raises(
        UserError, match=r"no label, which .* valid: digits, .*, folder, tfds:NAME$"
    ):
        create_task(config)
