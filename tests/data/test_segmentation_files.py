import copy
import dataclasses
import importlib
import io
import shutil

import numpy as np
import pytest
import segmentation_files
from batches import eval_dataset
from make_task import open_dataset
from PIL import Image
from segmentation_files import HEIGHT, PAIRS, WIDTH, values

from tokenvit_jax import prepare
from tokenvit_jax.data import builtin_info, datasets
from tokenvit_jax.data.datasets import cityscapes
from tokenvit_jax.data.label_maps import decode_label_map, label_table
from tokenvit_jax.errors import UserError
from tokenvit_jax.tasks import default_config

# Class -> value in the label maps, from the table of labels of Cityscapes.
CITYSCAPES = {
    "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17,
    "traffic light": 19, "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23,
    "person": 24, "rider": 25, "car": 26, "truck": 27, "bus": 28, "train": 31, "motorcycle": 32,
    "bicycle": 33,
}  # fmt: skip


def expected_labels(name, number):
    found = values(name, number).astype(int)
    if name == "ade20k":
        return np.where(found == 0, 255, found - 1)
    if name == "pascal_context":
        return found
    names = builtin_info(name).classes
    labels = np.full((HEIGHT, WIDTH), 255)
    for class_name, value in CITYSCAPES.items():
        labels[found == value] = names.index(class_name)
    return labels


@pytest.mark.parametrize("name", PAIRS)
def test_images_are_stored_as_they_are_with_their_label_maps(name, tmp_path):
    segmentation_files.write_dataset(name, tmp_path / "downloads")
    folder = datasets.prepare(name, tmp_path / "downloads", tmp_path)
    assert folder == tmp_path / "segmentation" / name / "1.0.0"
    found = {}
    for split, size in (("train", 2), ("validation", 1)):
        source = open_dataset(name, split, str(tmp_path))
        assert len(source) == size
        for index in range(size):
            record = source._records[index]
            path = record["file_name"].decode()
            assert source.name(index) == f"{name} split {split!r}, record {index} ({path})"
            decoded = source.read(index)
            found[path] = record["image"], decoded["image"], decoded["label_map"]
            assert decoded["id"] == index
    assert sorted(found) == sorted(image for image, _ in PAIRS[name])
    for number, (path, _) in enumerate(PAIRS[name]):
        encoded, image, labels = found[path]
        assert encoded == (tmp_path / "downloads" / path).read_bytes()
        assert image.size == (WIDTH, HEIGHT) and labels.dtype == np.uint8
        np.testing.assert_array_equal(labels, expected_labels(name, number))
    written = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert datasets.prepare(name, tmp_path / "nowhere", tmp_path) == folder
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == written


def test_command_prepares_a_dataset(tmp_path, capsys):
    segmentation_files.write_dataset("ade20k", tmp_path)
    flag_values = copy.deepcopy(prepare.FLAGS)
    flag_values(["prepare", f"--manual_dir={tmp_path}", f"--data_dir={tmp_path / 'out'}"])
    prepare.main(flag_values, "ade20k")
    assert f"ade20k is prepared in {tmp_path / 'out'}" in capsys.readouterr().out
    assert len(open_dataset("ade20k", "train", str(tmp_path / "out"))) == 2


def test_suffixes_in_upper_case_and_hidden_files(tmp_path):
    segmentation_files.write_dataset("ade20k", tmp_path)
    (image, label), (other, _), _ = PAIRS["ade20k"]
    for path, suffix in ((image, ".JPG"), (other, ".jpeg"), (label, ".PNG")):
        (tmp_path / path).rename((tmp_path / path).with_suffix(suffix))
        hidden = (tmp_path / path).with_name(f"._{(tmp_path / path).name}")
        hidden.write_bytes(bytes(4))
    datasets.prepare("ade20k", tmp_path, tmp_path / "out")
    source = open_dataset("ade20k", "train", str(tmp_path / "out"))
    names = {source._records[index]["file_name"].decode() for index in range(len(source))}
    assert names == {image.replace(".jpg", ".JPG"), other.replace(".jpg", ".jpeg")}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_lists_that_windows_wrote(tmp_path, encoding):
    segmentation_files.write_dataset("pascal_context", tmp_path)
    for file in (tmp_path / "VOCdevkit/VOC2010/ImageSets/SegmentationContext").iterdir():
        file.write_text(file.read_text().replace("\n", "\r\n"), encoding)
    datasets.prepare("pascal_context", tmp_path, tmp_path / "out")
    assert len(open_dataset("pascal_context", "train", str(tmp_path / "out"))) == 2


@pytest.mark.parametrize("part", [0, 1])
def test_two_files_for_one_image_are_named(tmp_path, part):
    segmentation_files.write_dataset("ade20k", tmp_path)
    file = tmp_path / PAIRS["ade20k"][1][part]
    shutil.copy(file, file.with_suffix(file.suffix.upper()))
    with pytest.raises(UserError, match=r"ADE_train_00000002.* are the same image; delete one of"):
        datasets.prepare("ade20k", tmp_path, tmp_path / "out")


@pytest.mark.parametrize("part", [0, 1])
def test_a_file_that_is_no_image_is_named(tmp_path, part):
    segmentation_files.write_dataset("ade20k", tmp_path)
    file = tmp_path / PAIRS["ade20k"][1][part]
    for content in (b"", b"no image", None):
        file.unlink()
        file.mkdir() if content is None else file.write_bytes(content)
        with pytest.raises(UserError, match=f"^{file}: (cannot decode [08] bytes as|is a folder)"):
            datasets.prepare("ade20k", tmp_path, tmp_path / "out")


@pytest.mark.parametrize("name", PAIRS)
def test_missing_folders_are_named_with_instructions(name, tmp_path):
    with pytest.raises(UserError) as error:
        datasets.prepare(name, tmp_path, tmp_path / "out")
    layout = importlib.import_module(f"tokenvit_jax.data.datasets.{name}").LAYOUT
    where = (layout.lists or layout.images)["train"]
    expected = f"{where} not found in --manual_dir={tmp_path}; {layout.how_to_get}"
    assert str(error.value) == expected
    with pytest.raises(UserError, match=f"python -m tokenvit_jax.prepare {name} --manual_dir="):
        open_dataset(name, "train", str(tmp_path / "out"))


@pytest.mark.parametrize(
    "name, part, message",
    [
        ("ade20k", 0, "{label} is a label map without an image"),
        ("ade20k", 1, "{image} is an image without a label map"),
        ("cityscapes", 1, "{image} is an image without a label map"),
        (
            "pascal_context",
            0,
            "{image} is missing, but listed in VOCdevkit/VOC2010/ImageSets/SegmentationContext/"
            "train.txt",
        ),
    ],
)
def test_missing_file_is_named(name, part, message, tmp_path):
    segmentation_files.write_dataset(name, tmp_path)
    image, label = (tmp_path / path for path in PAIRS[name][1])
    (image, label)[part].unlink()
    with pytest.raises(UserError) as error:
        datasets.prepare(name, tmp_path, tmp_path / "out")
    assert str(error.value) == message.format(image=image, label=label)


@pytest.mark.parametrize(
    "name, value, valid",
    [
        ("ade20k", 151, "0 to 150"),
        ("cityscapes", 34, "0 to 33"),
        ("pascal_context", 255, "0 to 59"),
    ],
)
def test_unknown_value_is_found_when_preparing(name, value, valid, tmp_path):
    segmentation_files.write_dataset(name, tmp_path)
    label = tmp_path / PAIRS[name][2][1]
    changed = values(name, 2)
    changed[3, 4] = value
    Image.fromarray(changed).save(label)
    with pytest.raises(UserError) as error:
        datasets.prepare(name, tmp_path, tmp_path / "out")
    assert str(error.value) == f"{label}: label map has the value {value}; valid: {valid}"
    with pytest.raises(UserError, match="not found in"):  # nothing half prepared is left
        open_dataset(name, "train", str(tmp_path / "out"))


def test_unknown_value_is_found_when_reading(tmp_path, monkeypatch):
    segmentation_files.write_dataset("cityscapes", tmp_path)
    wrong = cityscapes.LAYOUT.labels | {33: 19}  # as if there were 20 classes
    monkeypatch.setattr(cityscapes, "LAYOUT", dataclasses.replace(cityscapes.LAYOUT, labels=wrong))
    datasets.prepare("cityscapes", tmp_path, tmp_path)
    config = default_config("segmentation")
    config.dataset, config.data.data_dir, config.image_size = "cityscapes", str(tmp_path), 32
    with pytest.raises(UserError) as error:
        next(iter(eval_dataset(config)))
    assert str(error.value) == (
        f"cityscapes split 'validation', record 0 ({PAIRS['cityscapes'][2][0]}): label map has the "
        'value 19; valid: 0 to 18, 255; data.on_corrupt="skip" passes over it'
    )


def encode(array, mode=None, file_format="PNG"):
    buffer = io.BytesIO()
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(buffer, file_format)
    return buffer.getvalue()


def test_label_map_may_have_a_palette():
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3)
    image = Image.fromarray(grey)
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    table = label_table({value: value for value in range(6)})
    np.testing.assert_array_equal(decode_label_map(buffer.getvalue(), table, (3, 2)), grey)


@pytest.mark.parametrize(
    "encoded, message",
    [
        (b"no image", "cannot decode 8 bytes as a label map"),
        (encode(np.zeros((2, 3), np.uint8), "RGB"), "label map has mode RGB; valid: L or P"),
        (
            encode(np.zeros((3, 2), np.uint8)),
            "label map has 2 x 3 pixels, its image 3 x 2 (width x height)",
        ),
    ],
)
def test_no_label_map_is_refused(encoded, message):
    with pytest.raises(UserError) as error:
        decode_label_map(encoded, label_table({0: 0}), (3, 2))
    assert message in str(error.value)
