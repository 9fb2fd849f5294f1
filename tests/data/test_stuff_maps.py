"""Maps of stuff: views of them, and their preparation beside the images of COCO."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from tokenvit_jax.data.box_transforms import View
from tokenvit_jax.data.datasets import coco, coco_files, scene_instances
from tokenvit_jax.data.datasets.coco_files import CocoSource, Layout
from tokenvit_jax.data.stuff_maps import view_stuff
from tokenvit_jax.errors import UserError

LAYOUT = Layout(
    images={"train": "train", "val": "val"},
    annotations={"train": "train.json", "val": "val.json"},
    how_to_get="valid: a folder",
    stuff={"train": "maps/train", "val": "maps/val"},
    num_stuff=scene_instances.NUM_STUFF,
)
INFO = dataclasses.replace(
    coco.INFO, name="few", num_classes=4, classes=scene_instances.INFO.classes
)
COUNT = 2  # images of a split


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Writes a few scenes in COCO's format, with their maps."""
    folder = tmp_path_factory.mktemp("files")
    content = scene_instances.annotations(None, "test")
    images = content["images"][:COUNT]
    few = {image["id"] for image in images}
    objects = [entry for entry in content["annotations"] if entry["image_id"] in few]
    scenes = scene_instances.SceneInstancesSource("test")
    for split in ("train", "val"):
        (folder / split).mkdir()
        (folder / "maps" / split).mkdir(parents=True)
        (folder / f"{split}.json").write_text(
            json.dumps(content | {"images": images, "annotations": objects})
        )
        for entry in images:
            record = scenes.read(entry["id"])
            record["image"].save(folder / split / entry["file_name"])
            Image.fromarray(record["stuff_map"]).save(folder / "maps" / split / entry["file_name"])
    return folder


def prepare(files, data_dir):
    coco_files.prepare(INFO, LAYOUT, files, data_dir)


def test_maps_of_training_images_are_read_back(files, tmp_path):
    prepare(files, tmp_path)
    scenes = scene_instances.SceneInstancesSource("test")
    train, val = (CocoSource(INFO, split, str(tmp_path)) for split in ("train", "val"))
    assert len(train) == COUNT
    for index in range(COUNT):
        wanted = scenes.read(index)["stuff_map"]
        np.testing.assert_array_equal(train.read(index)["stuff_map"], wanted)
    assert "stuff_map" not in val.read(0)


@pytest.fixture
def copied(files, tmp_path):
    return shutil.copytree(files, tmp_path / "copied")


def test_without_maps_the_dataset_is_prepared_without_them(copied, tmp_path):
    shutil.rmtree(copied / "maps")
    prepare(copied, tmp_path / "data")
    assert "stuff_map" not in CocoSource(INFO, "train", str(tmp_path / "data")).read(0)


def remove_split(maps):
    shutil.rmtree(maps / "val")


def remove_map(maps):
    (maps / "val" / "1.png").unlink()


def unknown_class(maps):
    Image.fromarray(np.full((128, 128), 9, np.uint8)).save(maps / "train" / "0.png")


def other_size(maps):
    Image.fromarray(np.zeros((128, 64), np.uint8)).save(maps / "train" / "0.png")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove_split, "maps/val is missing; valid: maps of stuff for all splits, or for none"),
        (remove_map, "1.png not found, image 1 of "),
        (unknown_class, "train/0.png: label map has the value 9; valid: 0 to 5, 255"),
        (other_size, "train/0.png: label map has 64 x 128 pixels, its image 128 x 128 (width x"),
    ],
)
def test_bad_maps_are_named(spoil, message, copied, tmp_path):
    spoil(copied / "maps")
    with pytest.raises(UserError, match=re.escape(message)) as error:
        prepare(copied, tmp_path / "data")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flip", [False, True])
def test_views(flip):
    """Against a loop over the pixels of the view."""
    labels = np.random.default_rng(0).integers(0, 7, (30, 50)).astype(np.uint8)
    labels[:4] = 255
    view = View((5.0, 0.0, 45.0, 30.0), (60, 45), flip)
    found = view_stuff(labels, view, (64, 72), 7)
    expected = np.full((8, 9), 255)
    for row in range(0, 45, 8):
        for column in range(0, 60, 8):
            place = 59 - column if flip else column
            source = int((row + 0.5) / 1.5), 5 + int((place + 0.5) / 1.5)
            expected[row // 8, column // 8] = labels[source]
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.uint8
