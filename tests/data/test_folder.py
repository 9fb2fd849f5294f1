"""Folders of images: one folder per class, or label maps beside the images."""

import json
import os
import pickle
import re
import shutil

import numpy as np
import pytest
from make_task import open_dataset
from PIL import ExifTags, Image
from png_file import png

from tokenvit_jax.data import (
    check_data,
    dataset_info,
    open_split,
    read_image,
    with_class_names,
)
from tokenvit_jax.data.held_out import held_out
from tokenvit_jax.errors import UserError
from tokenvit_jax.tasks import create_task, default_config
from tokenvit_jax.training.workdir import check_same_run, read_config, write_config


def config_of(folder, task="classification", **data):
    config = default_config(task)
    config.dataset = "folder"
    config.data.update({"data_dir": str(folder), **data})
    return config


def write_image(path, level=0, size=(6, 4), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level,) * 3).save(path, **options)
    return path


@pytest.fixture
def classes(tmp_path):
    """Cats and dogs in nested folders, of all kinds, beside files that are no images."""
    for split, number in (("train", 4), ("val", 1)):
        for level, name in enumerate(("cat", "dog")):
            for i in range(number):
                suffix = (".png", ".JPG", ".webp", ".TIFF")[i]
                write_image(
                    tmp_path / split / name / ("in" * (i % 2)) / f"{i}{suffix}", level * 200
                )
    for name in ("._0.png", ".hidden.png", "notes.txt", "__MACOSX/1.png", ".cache/1.png"):
        path = tmp_path / "train" / "cat" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(4))
    (tmp_path / "train" / ".git").mkdir()
    return tmp_path


def test_images_of_every_class_are_found(classes):
    config = config_of(classes)
    info = dataset_info(config)
    assert (info.classes, info.num_classes) == (("cat", "dog"), 2)
    source = pickle.loads(pickle.dumps(open_dataset("folder", "train", str(classes))))
    records = [source.read(index) for index in range(len(source))]
    assert [record["label"] for record in records] == [0] * 4 + [1] * 4
    assert [record["id"] for record in records] == list(range(8))
    levels = [np.asarray(record["image"]).mean() for record in records]
    np.testing.assert_allclose(levels, [0] * 4 + [200] * 4, atol=2)
    assert source.name(1) == f"folder split 'train', record 1 ({classes}/train/cat/2.webp)"
    assert len(open_dataset("folder", "val", str(classes))) == 2


def test_recorded_classes_need_no_files(classes):
    config = config_of("/nowhere", classes=("cat", "dog"))
    assert create_task(config).info.classes == ("cat", "dog")
    # The labels follow the names of the run.
    source = open_dataset("folder", "val", str(classes), classes=("dog", "cat"))
    levels = {source.read(i)["label"]: np.asarray(source.read(i)["image"]).mean() for i in (0, 1)}
    assert levels == {0: 200, 1: 0}


def test_a_run_keeps_its_classes(classes, tmp_path):
    config = with_class_names(config_of(classes))
    write_config(tmp_path / "run", config)
    assert read_config(tmp_path / "run").data.classes == ("cat", "dog")
    check_same_run(tmp_path / "run", with_class_names(config_of(classes)), 0)
    for split in ("train", "val"):
        write_image(classes / split / "bird" / "1.png")
    with pytest.raises(
        UserError, match=r"the classes differ from the run in .*: 3 instead of 2 na"
    ):
        check_same_run(tmp_path / "run", with_class_names(config_of(classes)), 0)
    # A run that was written before there were names of classes has the built-in ones.
    config = default_config("classification")
    entries = config.to_dict()
    del entries["data"]["classes"], entries["data"]["split"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(entries))
    check_same_run(tmp_path / "run", config, 0)


def test_label_files_must_have_as_many_records(classes, tmp_path):
    np.save(tmp_path / "classes.npy", np.zeros((7, 1, 1, 1), np.uint8))
    np.save(tmp_path / "scores.npy", np.ones((7, 1, 1, 1), np.float16))
    config = config_of(classes)
    config.token_labels.update({"weight": 0.5, "files": str(tmp_path)})
    with pytest.raises(UserError, match=r"must both be \(8 records, height, width"):
        create_task(config).examples(train=True)


def test_one_folder_is_split_by_the_seed(tmp_path):
    for name, number in (("a", 20), ("b", 10), ("c", 1)):
        for i in range(number):
            write_image(tmp_path / name / f"{i:02d}.png")

    def files(split, seed=0):
        config = config_of(tmp_path, split=0.1)
        config.seed = seed
        source = open_split(config, split)
        return {source.name(i).split("(")[1] for i in range(len(source))}

    train, val = files("train"), files("val")
    assert (len(train), len(val), len(train & val)) == (28, 3, 0)
    assert sum("/a/" in path for path in val) == 2 and sum("/b/" in path for path in val) == 1
    assert files("val") == val != files("val", seed=1)
    names = [str(i) for i in range(200)]
    kept = held_out(names, 0.2, 3)
    assert kept == held_out(names[::-1], 0.2, 3) and len(kept) == 40
    more = held_out([*names, "new"], 0.2, 3)
    assert len(kept - more) <= 1


@pytest.fixture
def label_maps(tmp_path):
    for split in ("train", "val"):
        write_image(tmp_path / split / "images" / "in" / "1.JPG", 90)
        labels = tmp_path / split / "labels" / "in"
        labels.mkdir(parents=True)
        Image.fromarray(np.array([[0, 1, 2, 255, 0, 0]] * 4, np.uint8)).save(labels / "1.png")
        (labels / "._1.png").write_bytes(bytes(4))
    (tmp_path / "classes.txt").write_text("sky\nground\nred car\n")
    return tmp_path


def test_label_maps(label_maps):
    config = config_of(label_maps, "segmentation")
    assert create_task(config).info.classes == ("sky", "ground", "red car")
    record = open_split(config, "train").read(0)
    np.testing.assert_array_equal(record["label_map"][0], [0, 1, 2, 255, 0, 0])
    # The labels follow the names of a run.
    (label_maps / "classes.txt").write_text("ground\nsky\nred car")
    config.data.classes = ("sky", "ground", "red car")
    record = open_split(config, "train").read(0)
    np.testing.assert_array_equal(record["label_map"][0], [1, 0, 2, 255, 1, 1])
    with pytest.raises(UserError, match=r"classes.txt differs from .*: 3 instead of 2 names, wi"):
        open_split(config_of(label_maps, "segmentation", classes=("sky", "car")), "train")
    # images/train and labels/train are read, too.
    for kind in ("images", "labels"):
        for split in ("train", "val"):
            shutil.move(label_maps / split / kind, label_maps / kind / split)
    assert len(open_split(config, "val")) == 1
    for kind in ("images", "labels"):  # one folder is split
        for number in range(9):
            shutil.copytree(label_maps / kind / "val", label_maps / kind / f"{number}")
    config.data.split = 0.5
    sizes = [len(open_split(config, split)) for split in ("train", "val")]
    assert sum(sizes) == 11 and abs(sizes[0] - sizes[1]) == 1


def test_label_maps_and_images_are_not_rotated_apart(label_maps):
    path = label_maps / "train" / "images" / "in" / "1.JPG"
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    write_image(path, exif=exif)
    assert read_image(path).size == (4, 6)
    record = open_split(config_of(label_maps, "segmentation"), "train").read(0)
    assert record["image"].size == (6, 4) and record["label_map"].shape == (4, 6)


def remove(folder, name):
    shutil.rmtree(folder / name)


@pytest.mark.parametrize(
    "change, data, message",
    [
        (lambda f: remove(f, "train"), {}, "{f} has no folder 'train', it has val; valid: train/C"),
        (lambda f: remove(f, "val"), {}, "{f} has no folder 'val', it has train; valid: train/C"),
        (lambda f: remove(f, "val/cat"), {}, "{f}/val differ: 1 instead of 2 names, without cat"),
        (
            lambda f: [remove(f, f"{s}/{c}") for s in ("train", "val") for c in ("cat", "dog")],
            {},
            "{f}/train has no classes; valid: one folder per class",
        ),
        (lambda f: None, {"split": 0.1}, "data.split=0.1 is for one folder of classes, {f} has tr"),
        (lambda f: None, {"split": 1.5}, "config.data.split=1.5 is not valid; valid: numbe"),
        (lambda f: remove(f, "."), {}, "config.data.data_dir={f} is no folder"),
    ],
)  # fmt: skip
def test_folders_that_do_not_fit(classes, change, data, message):
    change(classes)
    config = config_of(classes, **data)
    with pytest.raises(UserError, match=re.escape(message.format(f=classes))):
        check_data(config)
        for split in ("train", "val"):
            open_split(config, split)


def test_links_are_followed_and_circles_are_not(classes):
    cats, dogs = (classes / "train" / name for name in ("cat", "dog"))
    write_image(classes / "elsewhere" / "more" / "5.png")
    (cats / "linked").symlink_to(classes / "elsewhere")
    (classes / "elsewhere" / "back").symlink_to(cats)  # a circle
    (cats / "itself").symlink_to(cats)
    (dogs / "dangling.png").symlink_to("/nowhere/1.png")
    (classes / "train" / "circle").symlink_to("circle")
    source = open_dataset("folder", "train", str(classes))
    assert len(source) == 10
    names = [source.name(index) for index in range(10)]
    assert sum("cat/linked/more/5.png" in name for name in names) == 1
    with pytest.raises(UserError, match=r"dog/dangling.png\): No such file or directory$"):
        source.read(next(i for i, name in enumerate(names) if "dangling" in name))


def test_what_is_no_file_is_named_at_once(classes, label_maps):
    """A pipe would wait for its writer for ever."""
    pipe = classes / "train" / "cat" / "pipe.png"
    os.mkfifo(pipe)
    source = open_dataset("folder", "train", str(classes))
    index = next(i for i in range(len(source)) if "pipe" in source.name(i))
    with pytest.raises(UserError, match=r"cat/pipe.png\): is a pipe or a device; valid: a file"):
        source.read(index)
    label = label_maps / "train" / "labels" / "in" / "1.png"
    label.unlink()
    os.mkfifo(label)
    with pytest.raises(UserError, match=r"images/in/1.JPG\): .*labels/in/1.png: is a pipe or a d"):
        open_split(config_of(label_maps, "segmentation"), "train").read(0)


def test_names_of_folders(tmp_path):
    names = ("Ärger", "a b", "a,b", "日本", "x$y")
    for split in ("train", "val"):
        for name in (*names, ".hidden"):
            write_image(tmp_path / split / name / "1.png")
    assert dataset_info(config_of(tmp_path)).classes == names[1:3] + names[4:] + (names[0], "日本")
    (tmp_path / "train" / os.fsdecode(b"caf\xe9")).mkdir()
    with pytest.raises(UserError, match=r"train has the folder 'caf\\udce9'; valid: names that"):
        dataset_info(config_of(tmp_path))
    write_image(tmp_path / "one" / "train" / "cat" / "1.png")
    with pytest.raises(UserError, match="one has one class, 'cat'; valid: two or more"):
        dataset_info(config_of(tmp_path / "one"))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1", "utf-16-le"])
def test_encodings_of_names_of_classes(label_maps, encoding):
    names = ("Straße", "Bäume", "Schnee")
    (label_maps / "classes.txt").write_text("\r\n".join(names), encoding)
    config = config_of(label_maps, "segmentation")
    if encoding in ("latin-1", "utf-16-le"):
        with pytest.raises(UserError, match=r"classes.txt is not a text in UTF-8: .*save it as UT"):
            dataset_info(config)
    else:
        assert dataset_info(config).classes == names


def test_files_that_do_not_fit(classes, tmp_path):
    with pytest.raises(
        UserError, match=r"differ from config.data.classes: 2 instead of 2 names, wi"
    ):
        open_dataset("folder", "val", str(classes), classes=("cat", "bird"))
    (classes / "train" / "cat" / "0.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"record 0 \(.*cat/0.png\): cannot decode 8 bytes as an"):
        open_dataset("folder", "train", str(classes)).read(0)
    remove(classes, "val/dog")
    (classes / "val" / "dog").mkdir()
    with pytest.raises(UserError, match="val/dog holds no image that Pillow reads"):
        open_dataset("folder", "val", str(classes))
    for name in "ab":
        write_image(tmp_path / "one" / name / "1.png")
    with pytest.raises(UserError, match=r"no image for the split 'val'; config.data.split=0.5 nee"):
        open_split(config_of(tmp_path / "one", split=0.5), "val")


def write_label_map(folder, mode, file_format="PNG", size=(6, 4)):
    Image.new(mode, size).save(folder / "train/labels/in/1.png", file_format)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda f: (f / "classes.txt").unlink(), "classes.txt not found; valid: one class per lin"),
        (lambda f: (f / "classes.txt").write_text("a\na\n"), "classes.txt has an empty line, a na"),
        (lambda f: remove(f, "train/labels"), "has the folders train, val; valid: train/images/*"),
        (
            lambda f: (f / "train/labels/in/1.png").rename(f / "train/labels/in/2.png"),
            "train/images/in/1.JPG has no label map in",
        ),
        (lambda f: (f / "train/images/in/1.JPG").unlink(), "train/labels/in/1.png has no image in"),
        (
            lambda f: (f / "classes.txt").write_text("a\nb\n"),
            "train/labels/in/1.png: label map has the value 2; valid: 0 to 1, 255",
        ),
        (lambda f: (f / "classes.txt").write_text("a\n"), "has one class, 'a'; valid: two or more"),
        (
            lambda f: write_label_map(f, "RGB"),
            "labels/in/1.png: label map has mode RGB; valid: L or P, one byte per pixel",
        ),
        (
            lambda f: write_label_map(f, "L", size=(3, 3)),
            "labels/in/1.png: label map has 3 x 3 pixels, its image 6 x 4 (width x height)",
        ),
        (
            lambda f: write_label_map(f, "L", "JPEG"),
            "labels/in/1.png: label map is a JPEG, which changes values; valid: PNG",
        ),
        (
            lambda f: (f / "train/labels/in/1.png").write_bytes(png(6, 4, 4, bytes(16))),
            "labels/in/1.png: label map has grey levels of mode L;4; valid: one byte per pixel",
        ),
        (
            lambda f: (f / "train/labels/in/1.png").write_bytes(b""),
            "labels/in/1.png: cannot decode 0 bytes as a label map",
        ),
        (
            lambda f: shutil.copy(f / "train/labels/in/1.png", f / "train/labels/in/1.bmp"),
            "train/labels has two label maps for one image: in/1.bmp and in/1.png",
        ),
        (
            lambda f: (f / "classes.txt").write_text("\n".join(map(str, range(256)))),
            "classes.txt has 256 classes; valid: up to 255",
        ),
    ],
)
def test_label_maps_that_do_not_fit(label_maps, change, message):
    change(label_maps)
    with pytest.raises(UserError, match=re.escape(message)):
        open_split(config_of(label_maps, "segmentation"), "train").read(0)
