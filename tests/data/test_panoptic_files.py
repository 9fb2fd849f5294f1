"""Datasets in COCO's panoptic format: preparation, records, and messages for bad input."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from tokenvit_jax.data import builtin_info
from tokenvit_jax.data.datasets import (
    coco,
    coco_panoptic,
    panoptic_files,
    scene_instances,
    scene_segments,
)
from tokenvit_jax.data.datasets.panoptic_files import Layout, PanopticSource
from tokenvit_jax.data.datasets.scene_instances import SceneInstancesSource
from tokenvit_jax.data.record import Segments
from tokenvit_jax.data.segments import encode_ids, panoptic_annotations, thing_instances
from tokenvit_jax.errors import UserError

SPLITS = "train", "val"
LAYOUT = Layout(
    images={split: split for split in SPLITS},
    annotations={split: f"annotations/{split}.json" for split in SPLITS},
    segments={split: (f"annotations/{split}", f"png_{split}") for split in SPLITS},
    how_to_get="valid: a folder",
)
INFO = dataclasses.replace(
    scene_segments.INFO, name="few", splits={}, eval_split="val", fields=frozenset({"image"})
)
SIZES = {21: (8, 6), 4: (5, 9), 13: (7, 7)}  # identifier of an image -> width and height


def segments(identifier: int) -> Segments:
    """Returns three segments and void; the identifiers take all three bytes."""
    width, height = SIZES[identifier]
    ids = np.zeros((height, width), np.int32)
    numbers = np.array([5, 700 + identifier, 2**24 - 1], np.int32)
    ids[1, :], ids[2:4, :2], ids[4:, 2:] = numbers
    return Segments(
        ids=ids,
        numbers=numbers,
        classes=np.array([4, identifier % 4, 3], np.int32),
        crowd=np.array([False, False, identifier == 4]),
        areas=np.array([width, 4, 1000 + identifier]),
    )


def write_files(folder: Path) -> Path:
    """Writes both splits; the PNG files of "val" are in the other folder that is allowed."""
    content = panoptic_annotations(
        [(identifier, segments(identifier)) for identifier in SIZES], INFO.classes, INFO.things
    )
    for split, place in zip(SPLITS, ("annotations/train", "png_val"), strict=True):
        (folder / split).mkdir(parents=True)
        (folder / place).mkdir(parents=True)
        (folder / LAYOUT.annotations[split]).write_text(json.dumps(content))
        for identifier, size in SIZES.items():
            image = Image.new("RGB", size, (identifier, 0, 0))
            image.save(folder / split / f"{identifier}.png")
            png = encode_ids(segments(identifier).ids)
            (folder / place / f"{identifier}.png").write_bytes(png)
    return folder


def assert_equal(found: Segments, wanted: Segments):
    for name, a, b in zip(Segments._fields, found, wanted, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
        assert a.dtype == b.dtype


def test_records_are_those_of_the_files(tmp_path):
    folder = panoptic_files.prepare(INFO, LAYOUT, write_files(tmp_path / "manual"), tmp_path)
    assert folder == tmp_path / "panoptic/few/1.0.0"
    for split in SPLITS:
        source = PanopticSource(INFO, split, str(tmp_path))
        assert len(source) == len(SIZES)
        for index, (identifier, size) in enumerate(SIZES.items()):
            record = source.read(index)
            assert record["id"] == identifier and record["image"].size == size
            assert record["image"].getpixel((0, 0)) == (identifier, 0, 0)
            assert_equal(record["segments"], segments(identifier))
            assert source.name(index).endswith(f"({identifier}.png)")
        assert source.portrait().tolist() == [False, True, False]
    assert panoptic_files.prepare(INFO, LAYOUT, Path("nowhere"), tmp_path) == folder


def test_scenes_written_as_coco_files_are_read_back(tmp_path):
    scenes = scene_segments.SceneSegmentsSource("test")
    content = panoptic_annotations(
        [(index, scenes.read(index)["segments"]) for index in range(5)],
        scene_segments.INFO.classes, scene_segments.INFO.things,
    )  # fmt: skip
    for split in SPLITS:
        for place in (split, f"annotations/{split}"):
            (tmp_path / place).mkdir(parents=True)
        (tmp_path / LAYOUT.annotations[split]).write_text(json.dumps(content))
        for index in range(5):
            record = scenes.read(index)
            record["image"].save(tmp_path / split / f"{index}.png")
            png = tmp_path / "annotations" / split / f"{index}.png"
            png.write_bytes(encode_ids(record["segments"].ids))
    panoptic_files.prepare(INFO, LAYOUT, tmp_path, tmp_path)
    source = PanopticSource(INFO, "val", str(tmp_path))
    for index in range(5):
        found, wanted = source.read(index), scenes.read(index)
        np.testing.assert_array_equal(np.asarray(found["image"]), np.asarray(wanted["image"]))
        assert_equal(found["segments"], wanted["segments"])


def test_scene_segments_have_images_and_objects_of_scene_instances():
    source, others = scene_segments.SceneSegmentsSource("train"), SceneInstancesSource("train")
    photographs = set()
    for index in range(40):
        record, other = source.read(index), others.read(index)
        np.testing.assert_array_equal(np.asarray(record["image"]), np.asarray(other["image"]))
        things = thing_instances(record["segments"], scene_segments.INFO.things)
        for found in (record["instances"], things):
            for a, b in zip(found, other["instances"], strict=True):
                np.testing.assert_array_equal(a, b)
        found = record["segments"]
        assert found.ids.min() == 1 and found.areas.sum() == 128**2  # no void
        assert found.numbers.tolist() == list(range(1, len(other["instances"].classes) + 2))
        photographs.add(int(found.classes[-1]))
    assert photographs == {4, 5}


def test_objects_of_scene_segments_have_its_categories():
    found, other = (
        module.annotations(None, "test") for module in (scene_segments, scene_instances)
    )
    assert found["annotations"] == other["annotations"] and found["images"] == other["images"]
    names = [entry["name"] for entry in found["categories"]]
    assert names == ["0", "1", "2", "3", "china", "flower"]
    assert found["categories"][:4] == other["categories"]


def test_the_class_of_stuff_is_the_photograph_that_is_seen():
    """On their right quarters, the photographs differ in red minus blue."""
    source, redness = scene_segments.SceneSegmentsSource("test"), {"china": [], "flower": []}
    for index in range(60):
        record = source.read(index)
        found = record["segments"]
        stuff = np.asarray(record["image"], float)[found.ids == found.numbers[-1]].mean(0)
        redness[scene_segments.INFO.classes[found.classes[-1]]].append(stuff[0] - stuff[2])
    china, flower = (
        load_sample_image(f"{name}.jpg")[:, 480:].mean((0, 1)) for name in ("china", "flower")
    )
    assert flower[0] - flower[2] < china[0] - china[2]
    assert max(redness["flower"]) < min(redness["china"])


def test_classes_of_coco_are_its_objects_and_53_of_stuff():
    info = builtin_info("coco_panoptic")
    assert info.num_classes == len(set(info.classes)) == 133
    assert info.classes[:80] == coco.INFO.classes and info.things == frozenset(range(80))
    assert info.classes[80] == "banner" and info.classes[132] == "rug-merged"
    assert coco_panoptic.LAYOUT.annotations["val"] == "annotations/panoptic_val2017.json"


@pytest.fixture(scope="module")
def manual(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("panoptic") / "manual")


def change(content, *, image=0, segment=None, **values):
    """Changes values of the annotation of an image, or of one of its segments."""
    annotation = content["annotations"][image]
    entry = annotation if segment is None else annotation["segments_info"][segment]
    entry.update(values)


def edited(what, **values):
    return lambda content: content[what][0].update(values)


BAD = {
    "category": (
        lambda content: change(content, segment=1, category_id=77),
        "train.json: segments of image 21: segment 721 has category_id 77, which the file does not",
    ),
    "twice": (
        lambda content: change(content, segment=1, id=5),
        "train.json: segments of image 21 have the id 5 twice; valid: one each",
    ),
    "image twice": (
        lambda content: change(content, image_id=4),
        "train.json: annotations have the image_id 4 twice; valid: one each",
    ),
    "no image": (
        lambda content: change(content, image_id=8),
        "train.json: an annotation has image_id 8, which the file does not list",
    ),
    "no annotation": (
        lambda content: content["annotations"].pop(),
        "train.json: image 13 has no annotation; valid: one for each image",
    ),
    "void": (
        lambda content: change(content, segment=0, id=0),
        "train.json: segments of image 21: entry 0 has id=0; valid: 1 to 16,777,215",
    ),
    "area": (
        lambda content: change(content, segment=0, area=None),
        "segments of image 21: entry 5 has area=None; valid: a number of pixels",
    ),
    "list": (
        lambda content: change(content, segments_info=[3]),
        "annotations: entry at place 0 has segments_info=[3]; valid: a list of segments",
    ),
    "not drawn": (
        lambda content: change(content, segment=1, id=99),
        "train/21.png: pixels have the id 721, which is no segment of image 21 in the annotations",
    ),
    "no pixels": (
        lambda content: content["annotations"][0]["segments_info"].append(
            {"id": 99, "category_id": 1, "area": 3}
        ),
        "train/21.png: no pixel has segment 99 of image 21",
    ),
    "no PNG": (
        lambda content: change(content, file_name="none.png"),
        "annotations/train/none.png not found, image 21 of ",
    ),
    "no file": (edited("images", file_name="none.png"), "train/none.png not found, image 21 of "),
    "image size": (
        edited("images", width=9),
        "train/21.png has 8 x 6 pixels; image 21 of the annotations has 9 x 6 (width x height)",
    ),
    "PNG size": (
        lambda content: change(content, file_name="4.png"),
        "annotations/train/4.png: PNG of segments has 5 x 9 pixels, its image 8 x 6 (width x hei",
    ),
    "names": (
        edited("categories", name="horse"),
        "train.json: the categories are not those of few: 'horse', not '0'",
    ),
    "thing": (
        edited("categories", isthing=0),
        "train.json: category 1 (0) has isthing=0; in few it is 1",
    ),
    "format": (lambda content: content.pop("images"), "train.json is not in COCO's format (KeyErr"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_file_and_identifier(name, manual, tmp_path):
    spoil, message = BAD[name]
    content = copy.deepcopy(json.loads((manual / LAYOUT.annotations["val"]).read_text()))
    spoil(content)
    (manual / LAYOUT.annotations["train"]).write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        panoptic_files.prepare(INFO, LAYOUT, manual, tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "panoptic/few/1.0.0").exists()


def test_missing_files_say_what_is_needed(manual, tmp_path):
    wanted = r"annotations/train.json not found in --manual_dir=.*valid: a folder"
    with pytest.raises(UserError, match=wanted):
        panoptic_files.prepare(INFO, LAYOUT, tmp_path, tmp_path)
    shutil.copytree(manual, tmp_path / "manual")
    shutil.copy(manual / LAYOUT.annotations["val"], tmp_path / "manual" / "annotations/train.json")
    shutil.rmtree(tmp_path / "manual" / "annotations/train")
    with pytest.raises(UserError, match=r"annotations/train/21.png not found, image 21 of .* 3\)"):
        panoptic_files.prepare(INFO, LAYOUT, tmp_path / "manual", tmp_path)
