"""ADE20K with segments and objects, from label maps and maps of instances."""

import copy

import numpy as np
import pytest
import segmentation_files
from make_task import open_dataset
from PIL import Image
from segmentation_files import HEIGHT, PAIRS, WIDTH

from tokenvit_jax import prepare
from tokenvit_jax.data import (
    builtin_info,
    dataset_info,
    datasets,
    open_annotations,
    train_batches,
)
from tokenvit_jax.data.datasets import ade20k, ade20k_panoptic
from tokenvit_jax.data.datasets.ade20k_panoptic import panoptic_segments, read_table
from tokenvit_jax.errors import UserError
from tokenvit_jax.run_lengths import decode_mask
from tokenvit_jax.tasks import create_task, default_config

# Made up, not ADE20K's: instance class i is class 151 - i, so that the last 100 classes are things.
TABLE = {instance: 151 - instance for instance in range(1, 101)}
THINGS = tuple(label - 1 for label in TABLE.values())


def table_text(table, title="Instance_id\tScene_id\tName\n"):
    rows = (f"{instance}\t{label}\tname of {label}\n" for instance, label in table.items())
    return title + "".join(rows)


def instance_map(number: int) -> np.ndarray:
    """Returns classes and numbers of three instances, uint8 (HEIGHT, WIDTH, 3)."""
    found = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    found[:9, :7, :2] = 1, 1
    found[20:, 5:30, :2] = 100, 2 + number
    found[8:15, 3:20, :2] = 40, 255
    return found


def write_files(folder):
    segmentation_files.write_dataset("ade20k", folder)
    for number, (_, label) in enumerate(PAIRS["ade20k"]):
        path = folder / label.replace("annotations/", "annotations_instance/")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(instance_map(number)).save(path)
    (folder / "categoryMapping.txt").write_text(table_text(TABLE))
    return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ade20k")
    found = datasets.prepare("ade20k_panoptic", write_files(folder / "manual"), folder)
    assert found == folder / "panoptic/ade20k_panoptic/1.0.0"
    assert datasets.prepare("ade20k_instances", None, folder) == found
    return folder


def config_of(name, data_dir):
    config = default_config("segmentation")
    config.dataset, config.data.data_dir = name, str(data_dir)
    return config


def labels(number):
    return segmentation_files.values("ade20k", number).astype(int) - 1  # -1: void


def test_things_lie_over_stuff_whose_area_is_counted_before(prepared):
    for split, start in (("train", 0), ("validation", 2)):
        source = open_dataset("ade20k_panoptic", split, str(prepared))
        assert not source.portrait().any() and len(source.portrait()) == len(source)
        assert len(source) == {"train": 2, "validation": 1}[split]
        for index in range(len(source)):
            record, number = source.read(index), start + index
            assert record["id"] == index
            stored, instances = labels(number), instance_map(number)
            np.testing.assert_array_equal(record["label_map"], np.where(stored < 0, 255, stored))
            segments = record["segments"]
            rows = {
                int(key): (int(label), int(area))
                for key, label, _, area in zip(*segments[1:], strict=True)
            }
            assert len(rows) == len(segments.numbers) and not segments.crowd.any()
            for y in range(HEIGHT):  # pixel by pixel
                for x in range(WIDTH):
                    label, instance, key = stored[y, x], instances[y, x], segments.ids[y, x]
                    if instance[1]:
                        assert rows[key][0] == 150 - instance[0]
                    elif 0 <= label < 50:
                        assert rows[key] == (label, (stored == label).sum())
                    else:
                        assert key == 0  # void, and things that are no instance
            things = {row for row in rows.values() if row[0] >= 50}
            areas = [(instances[..., 1] == i).sum() for i in (1, 2 + number, 255)]
            assert things == {(149, areas[0]), (50, areas[1]), (110, areas[2])}


def test_a_record_is_the_image_and_label_map_of_ade20k(prepared):
    datasets.prepare("ade20k", prepared / "manual", prepared)
    source, others = (open_dataset(name, "train", str(prepared))
                      for name in ("ade20k_panoptic", "ade20k"))  # fmt: skip
    by_file = {others.name(i).split("(")[1]: others.read(i) for i in range(len(others))}
    for index in range(len(source)):
        record, other = source.read(index), by_file[source.name(index).split("(")[1]]
        np.testing.assert_array_equal(np.asarray(record["image"]), np.asarray(other["image"]))
        np.testing.assert_array_equal(record["label_map"], other["label_map"])


def test_the_files_tell_the_things(prepared, tmp_path):
    assert builtin_info("ade20k_panoptic").things is None
    assert dataset_info(config_of("ade20k_panoptic", tmp_path)).things is None
    info = dataset_info(config_of("ade20k_panoptic", prepared))
    assert info.things == frozenset(range(50, 150)) and info.classes == ade20k.CLASSES
    assert dataset_info(config_of("ade20k_instances", tmp_path)).classes is None
    info = dataset_info(config_of("ade20k_instances", prepared))
    assert info.classes == tuple(reversed(ade20k.CLASSES[50:]))
    config = config_of("ade20k_instances", prepared)
    config.data.classes = ("a", "b")
    with pytest.raises(UserError, match="has 2 names; valid: one for each of the 100 classes of"):
        dataset_info(config)
    config.data.update({"classes": (), "split": 0.5})
    with pytest.raises(UserError, match=r"config.data.split=0.5 is for folders and tfds:NAME"):
        dataset_info(config)


def test_objects_are_the_instances_of_the_files(prepared):
    source = open_dataset("ade20k_instances", "validation", str(prepared))
    found = source.read(0)["instances"]
    assert found.classes.tolist() == [0, 99, 39] and not found.crowd.any()
    assert source.name(0).startswith("ade20k_instances split 'validation', record 0 (ADEChall")
    numbers = instance_map(2)[..., 1]
    for number, counts in zip((1, 4, 255), found.masks, strict=True):
        np.testing.assert_array_equal(decode_mask(counts, numbers.shape), numbers == number)
    truth = open_annotations(config_of("ade20k_instances", prepared), "validation")
    assert truth["images"] == [{"id": 0, "height": HEIGHT, "width": WIDTH, "file_name": "0.png"}]
    assert [entry["category_id"] for entry in truth["annotations"]] == [1, 100, 40]
    assert [entry["segmentation"]["counts"] for entry in truth["annotations"]] == found.masks
    assert truth["categories"][0] == {"id": 1, "name": "flag"}


def test_detection_trains_on_its_objects(prepared):
    config = default_config("detection")
    config.dataset, config.data.data_dir = "ade20k_instances", str(prepared)
    config.image_size, config.batch_size, config.data.workers = (32, 64), 2, 0
    task = create_task(config)
    assert task.info.num_classes == 100
    source = open_dataset("ade20k_instances", "train", str(prepared))
    batch = next(iter(train_batches(source, task.examples(train=True), config)))
    assert batch["image"].shape == (2, 32, 64, 3)
    assert set(batch["classes"].ravel().tolist()) == {-1, 0, 39, 99}


def test_the_command_prepares_it(prepared, capsys):
    flag_values = copy.deepcopy(prepare.FLAGS)
    flag_values(["prepare", f"--data_dir={prepared}"])
    prepare.main(flag_values, "ade20k_instances")
    assert "validation: 1 records, not 2,000" in capsys.readouterr().out


def test_stuff_that_things_cover_remains_a_segment():
    found = panoptic_segments(
        np.array([[3, 3, 140]], np.uint8), np.array([[[1, 7], [1, 7], [0, 0]]], np.uint8), THINGS
    )
    assert found.ids.tolist() == [[263, 263, 0]]
    assert found.numbers.tolist() == [4, 263] and found.classes.tolist() == [3, 149]
    assert found.areas.tolist() == [2, 2]


def test_the_table_of_classes(tmp_path):
    path = tmp_path / "categoryMapping.txt"
    path.write_text(table_text(dict(reversed(TABLE.items()))))
    assert read_table(path) == THINGS
    path.write_text(table_text(TABLE, title=""))
    assert read_table(path) == THINGS


@pytest.mark.parametrize(
    "text, message",
    [
        (table_text(TABLE | {7: 151}), "classes: 151; valid: 100 lines, with 100 of 1 to 150"),
        (table_text(TABLE | {7: 100}), "classes: 99 in 100 lines; valid: 100 lines, with 100 of 1"),
        (table_text(TABLE | {101: 3}), "instance classes: 101; valid: 100 lines, with 100 of 1 to"),
        (table_text(TABLE) + "7 144 again\n", "instance classes: 100 in 101 lines; valid: 100 lin"),
        (table_text({1: 3}), "categoryMapping.txt: instance classes: 1 in 1 lines; valid: 100"),
        ("a text", "categoryMapping.txt: instance classes: 0 in 0 lines; valid: 100 lines"),
    ],
)  # fmt: skip
def test_other_tables_are_refused(text, message, tmp_path):
    (tmp_path / "categoryMapping.txt").write_text(text)
    with pytest.raises(UserError) as error:
        read_table(tmp_path / "categoryMapping.txt")
    assert message in str(error.value) and "\n" not in str(error.value)


FILE = "ADEChallengeData2016/annotations_instance/training/ADE_train_00000001.png"


def spoiled(values):
    """Returns a function that changes the file of instances of the first image."""

    def spoil(folder):
        pixels = instance_map(0)
        pixels[0, 0, :2] = values
        Image.fromarray(pixels).save(folder / FILE)

    return spoil


BAD = {
    "two classes": (spoiled((2, 1)), f"{FILE}: instance 1 has the class 1, 2; valid: one of 1 to"),
    "unknown": (spoiled((101, 9)), f"{FILE}: instance 9 has the class 101; valid: one of 1 to 100"),
    "no class": (spoiled((0, 9)), f"{FILE}: instance 9 has the class 0; valid: one of 1 to 100"),
    "missing": (lambda folder: (folder / FILE).unlink(), f"{FILE} not found, the instances of ADE"),
    "size": (
        lambda folder: Image.new("RGB", (9, 8)).save(folder / FILE),
        f"{FILE}: PNG of segments has 9 x 8 pixels, its image {WIDTH} x {HEIGHT} (width x height)",
    ),
    "no table": (
        lambda folder: (folder / ade20k_panoptic.TABLE).unlink(),
        "categoryMapping.txt not found, the table of the 100 instance classes of ADE20K; valid: ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_the_file(name, tmp_path):
    spoil, message = BAD[name]
    spoil(write_files(tmp_path / "manual"))
    with pytest.raises(UserError) as error:
        datasets.prepare("ade20k_panoptic", tmp_path / "manual", tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "panoptic/ade20k_panoptic/1.0.0").exists()
