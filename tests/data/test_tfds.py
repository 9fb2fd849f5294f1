"""Datasets that tensorflow_datasets prepared: their metadata give classes and splits."""

import io
import json
import pickle
import re
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.core.read_only_builder import ReadOnlyBuilder

from tokenvit_jax.data import dataset_info, open_split
from tokenvit_jax.data.tfds_files import count_records, open_metadata, read_split, write_splits
from tokenvit_jax.errors import UserError
from tokenvit_jax.tasks import create_task, default_config

PETS = ("cat", "dog", "bird")


def config_of(name, data_dir, task="classification", **data):
    config = default_config(task)
    config.dataset = f"tfds:{name}"
    config.data.update({"data_dir": str(data_dir), **data})
    return config


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    buffer.seek(0)
    return buffer


def examples(number):
    for i in range(number):
        yield (
            str(i),
            {
                "picture": png(np.full((4, 6, 3), i, np.uint8)),
                "species": PETS[i % 3],
                "trimap": png(np.full((4, 6), i % 2, np.uint8)),
            },
        )


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Pets in two versions and configurations; their features have unusual names."""
    folder = tmp_path_factory.mktemp("tfds")
    features = {
        "picture": tfds.features.Image(),
        "species": tfds.features.ClassLabel(names=PETS),
        "trimap": tfds.features.LabeledImage(labels=["pet", "ground"], shape=(None, None, 1)),
    }
    for name, version, sizes in (
        ("pets", "3.2.0", {"train": 20, "test": 3}),
        ("pets", "3.10.0", {"train": 10, "test": 3, "validation": 2}),
        ("more/small", "1.0.0", {"train": 10}),
        ("more/large", "1.0.0", {"other": 1}),
    ):
        write_splits(folder, name, version, features, {s: examples(n) for s, n in sizes.items()})
    return folder


def test_metadata_give_classes_and_splits(data_dir):
    config = config_of("pets", data_dir)
    info = create_task(config).info
    assert (info.name, info.classes, info.num_classes) == ("tfds:pets", PETS, 3)
    assert info.splits == {"train": 10, "test": 3, "validation": 2}
    assert (info.train_split, info.eval_split) == ("train", "validation")
    source = pickle.loads(pickle.dumps(open_split(config, "train")))
    records = [source.read(index) for index in range(len(source))]
    levels = [int(np.asarray(record["image"])[0, 0, 0]) for record in records]
    assert sorted(levels) == list(range(10))
    assert [record["label"] for record in records] == [level % 3 for level in levels]
    assert source.name(2) == "tfds:pets split 'train', record 2"


@pytest.mark.parametrize("version", [":3.2.0", "/3.2.*", ":3.2"])
def test_versions(data_dir, version):
    if version == ":3.2":
        with pytest.raises(UserError, match=r"tfds:pets:3.2 not found in data.data_dir="):
            dataset_info(config_of(f"pets{version}", data_dir))
        return
    assert dataset_info(config_of(f"pets{version}", data_dir)).splits == {"train": 20, "test": 3}
    assert dataset_info(config_of("pets/3.*", data_dir)).splits["train"] == 10


def test_label_maps(data_dir):
    config = config_of("pets", data_dir, "segmentation")
    assert create_task(config).info.classes == ("pet", "ground")
    record = open_split(config, "validation").read(1)
    assert record["label_map"].shape == (4, 6) and record["label_map"].max() <= 1
    # The names of a run may stand in another order.
    config.data.classes = ("ground", "pet")
    other = open_split(config, "validation").read(1)
    np.testing.assert_array_equal(other["label_map"], 1 - record["label_map"])


def test_a_part_of_the_training_split_is_kept(data_dir):
    config = config_of("more/small", data_dir, split=0.3)
    info = dataset_info(config)
    assert (info.splits, info.eval_split) == ({"train": 7, "val": 3}, "val")
    levels = []
    for split in ("train", "val"):
        source = open_split(config, split)
        levels.append({int(np.asarray(source.read(i)["image"]).min()) for i in range(len(source))})
    assert [len(found) for found in levels] == [7, 3]
    assert levels[0] | levels[1] == set(range(10))


def test_recorded_classes_need_no_files():
    info = create_task(config_of("pets", "/nowhere", classes=PETS)).info
    assert (info.name, info.classes) == ("tfds:pets", PETS)


@pytest.mark.parametrize(
    "name, task, data, message",
    [
        ("pet", "classification", {}, "tfds:pet not found in data.data_dir={d}; prepare it"),
        ("pets/x/y/z", "classification", {}, "valid: tfds:NAME or tfds:NAME/CONFIG, also with"),
        ("more", "classification", {}, "valid: tfds:more/large, tfds:more/small"),
        ("more/small", "classification", {}, "has no split for evaluation (validation, val, vali"),
        ("more/large", "classification", {}, "has the splits other; valid: one is 'train'"),
        ("maps", "classification", {}, "has no feature that is a ClassLabel, which config.ta"),
        ("maps", "segmentation", {}, "feature 'mask' of tfds:maps has no names of classes; valid:"),
        ("pets", "classification", {"classes": ("a",)}, "differ from config.data.classes: 3 ins"),
    ],
)  # fmt: skip
def test_datasets_that_do_not_fit(data_dir, name, task, data, message):
    if name == "maps" and not (data_dir / "maps").exists():
        features = {
            "image": tfds.features.Image(),
            "mask": tfds.features.Image(shape=(None, None, 1)),
        }
        example = {"image": png(np.zeros((4, 6, 3), np.uint8)), "mask": png(np.eye(4, 6) > 0)}
        splits = {split: iter([("0", example)]) for split in ("train", "test")}
        write_splits(data_dir, "maps", "1.0.0", features, splits)
    with pytest.raises(UserError, match=re.escape(message.format(d=data_dir))):
        open_split(config_of(name, data_dir, task, **data), "train")


SHARD = "pets-train.array_record-00000-of-00001"


def change_metadata(folder, change):
    file = folder / "dataset_info.json"
    entries = json.loads(file.read_text())
    change(next(split for split in entries["splits"] if split["name"] == "train"))
    file.write_text(json.dumps(entries))


def cut(file, length):
    content = file.read_bytes()
    file.write_bytes(content[: length if length >= 0 else len(content) + length])


@pytest.mark.parametrize(
    "change, message",
    [
        *(
            (lambda f, n=name, t=text: (f / n).write_text(t), f"{name} is damaged (")
            for name in ("dataset_info.json", "features.json")
            for text in ("", "{}", "{", "null", "[]", "\0\0", "words")
        ),
        (lambda f: (f / "features.json").unlink(), "features.json is missing; delete {f} and pr"),
        (lambda f: (f / "dataset_info.json").unlink(), "dataset_info.json is missing; delete {f} "),
        (
            lambda f: (f / "features.json").write_bytes(b"\xff\xfe"),
            "features.json is damaged (",
        ),
        (lambda f: (f / SHARD).unlink(), SHARD + " is missing; delete {f} and prepare the dataset"),
        (lambda f: cut(f / SHARD, 0), SHARD + " is damaged (ArrayRecord file should be at least"),
        (lambda f: cut(f / SHARD, -1), SHARD + " is damaged ("),
        (lambda f: cut(f / SHARD, 66_000), SHARD + " is damaged ("),
        (
            lambda f: change_metadata(f, lambda split: split.update(shardLengths=["9"])),
            SHARD + " is damaged (10 records, not 9); delete {f} and prepare the dataset again",
        ),
        (
            lambda f: change_metadata(f, lambda split: split.update(shardLengths=["5", "5"])),
            "pets-train.array_record-00000-of-00002 is missing",
        ),
        (
            lambda f: change_metadata(f, lambda split: split.update(shardLengths=["-1"])),
            "dataset_info.json is damaged (a split has a negative number of records)",
        ),
        (
            lambda f: change_metadata(f, lambda split: split.update(filepathTemplate="../{SPLIT}")),
            "{f}/../train is missing; delete {f} and prepare",
        ),
    ],
)
def test_damaged_files_are_named(data_dir, tmp_path, change, message):
    folder = tmp_path / "pets" / "3.10.0"
    shutil.copytree(data_dir / "pets" / "3.10.0", folder)
    change(folder)
    with pytest.raises(UserError) as error:
        open_split(config_of("pets", tmp_path), "train")
    assert message.replace("{f}", str(folder)) in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError):  # `prepare` reads them, too
        count_records(folder)


def test_names_that_the_metadata_lack(data_dir):
    builder = open_metadata(data_dir / "pets" / "3.10.0")
    with pytest.raises(UserError, match=r"has no split 'val'; it has test, train, validat"):
        read_split(builder, "val", ())
    with pytest.raises(UserError, match=r"has no feature 'image'; it has picture, species, tr"):
        read_split(builder, "train", ("image",))


def test_another_file_format(data_dir, tmp_path):
    (tmp_path / "pets").mkdir()
    source = data_dir / "pets" / "3.2.0"
    target = tmp_path / "pets" / "3.2.0"
    target.mkdir()
    for file in source.glob("*.json"):
        target.joinpath(file.name).write_text(file.read_text().replace("array_record", "tfrecord"))
    for file in source.glob("*.txt"):
        target.joinpath(file.name).write_text(file.read_text())
    with pytest.raises(UserError, match="is not in the array_record format; into another fold"):
        open_split(config_of("pets", tmp_path), "train")


@pytest.fixture(params=["oxford_iiit_pet", "cifar10"])
def published(request, tmp_path):
    """Metadata that tensorflow_datasets' own code gives, with splits of five records."""
    name = request.param
    builder = tfds.builder(name, data_dir=str(tmp_path), file_format="array_record")
    folder = tmp_path / name / str(builder.version)
    folder.mkdir(parents=True)
    builder.info.write_to_directory(folder)
    builder.info.features.save_config(folder)
    file = folder / "dataset_info.json"
    for split in ("train", "test"):
        path = folder / f"{name}-{split}.array_record-00000-of-00001"
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for _ in range(5):
            writer.write(b"made up")
        writer.close()
    splits = [{"name": s, "shardLengths": ["5"], "numBytes": "9"} for s in ("train", "test")]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"splits": splits}))
    return builder


def test_published_datasets(published, tmp_path):
    name, classes = published.name, published.info.features["label"].names
    record = {
        "image": png(np.full((8, 9, 3), 7, np.uint8)).getvalue(),
        "label": 3,
        "segmentation_mask": png(np.full((8, 9), 3, np.uint8)).getvalue(),
        "file_name": b"a.jpg",
    }
    config = config_of(name, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReadOnlyBuilder, "as_data_source", lambda *_, **__: [record] * 5)
        assert create_task(config).info.classes == tuple(classes)
        source = open_split(config, "test")
        found = source.read(4)
        assert (found["image"].size, found["label"], found["id"]) == ((9, 8), 3, 4)
        assert source.name(4) == f"tfds:{name} split 'test', record 4 (a.jpg)"
        if name == "oxford_iiit_pet":  # values 1 to 3, without names
            config = config_of(f"{name}/{published.version.major}.*", tmp_path, "segmentation")
            config.data.classes = ("nothing", "pet", "background", "border")
            assert open_split(config, "train").read(0)["label_map"].min() == 3


def test_metadata_without_features(published, tmp_path):
    next(tmp_path.glob("*/*/features.json")).unlink()
    with pytest.raises(UserError, match=r"features.json is missing; delete .* and prepare the dat"):
        dataset_info(config_of(published.name, tmp_path))
