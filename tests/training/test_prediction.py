"""Names of pictures and tables of results."""

import csv
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure
from PIL import Image

from tokenvit_jax.errors import UserError
from tokenvit_jax.tasks.task import Prediction, by_class
from tokenvit_jax.training.prediction import Table, picture_names, predict_files

ROWS = [
    {"image": "a,b.png", "class": "cat", "probabilities": {"cat": 0.75, "dog": 0.25}},
    {"image": "ä.png", "class": "dog", "probabilities": {"cat": 0.25, "dog": 0.75}},
]


def test_names_of_pictures():
    files = [Path(name) for name in ("x/a.png", "b.png", "y/a.jpg", "a_3.png", "A.png")]
    names = picture_names(files)
    assert names[:4] == ["a_1", "b", "a_8", "a_3"] and names[4] == "A_5"
    same = picture_names([Path("a.png")] * 2 + [Path("a_1.png"), Path("A_1.png")])
    assert len({name.casefold() for name in same}) == 4


def test_files_are_read_when_their_turn_comes(tmp_path):
    """Memory does not grow with the number of files, and finished rows are in the file."""
    read = []
    row = {"class": "cat"}
    run = SimpleNamespace(
        read=lambda file: read.append(file.name),
        predictor=lambda image: Prediction({}, row, "cat 100.0%", lambda caption: {}),
    )
    files = [Path(f"{number}.png") for number in range(3)]
    lines = predict_files(run, files, tmp_path / "out", Table(tmp_path / "a.json"))
    for number in range(3):
        assert next(lines) == f"{number}.png: cat 100.0%"
        assert read == [f"{n}.png" for n in range(number + 1)]
        assert (tmp_path / "a.json").read_text().count('"class": "cat"') == number + 1
    lines.close()
    assert [row["image"] for row in json.loads((tmp_path / "a.json").read_text())] == [
        "0.png", "1.png", "2.png",
    ]  # fmt: skip
    assert not (tmp_path / "out").exists()


class FakeRun:
    """Predicts nothing; draws two small pictures of each image that it can read."""

    def read(self, file):
        if b"broken" in os.fsencode(file.name):
            raise UserError(f"{file}: cannot decode 3 bytes as an image")
        return Image.new("RGB", (2, 2))

    def predictor(self, image):
        def draw(caption):
            caption.encode()  # matplotlib needs a text
            return {"classes": Figure(figsize=(0.1, 0.1)), "labels": image}

        return Prediction({}, {"class": "cat"}, "cat 100.0%", draw)


def write_images(folder, names):
    files = [folder / os.fsdecode(name) for name in names]
    for number, file in enumerate(files):
        file.write_bytes(b"image %d" % number)
    return files


def test_no_output_replaces_an_image_or_another_output(tmp_path):
    """Images and pictures are in the same folder, and images have the names of pictures."""
    names = [
        b"a.jpg", b"a.png", b"A.bmp", b"a_1.png", b"a_1_classes.png", b"b.png", b"b_labels.png",
        b"b_2.png", b"a,b.png", b"cost $5_a$ %s {0} 'x' \"y\".png", b"new\nline\x1b.png",
        b"not utf-8 \xff.png", b"x" * 251 + b".png", b"x" * 250 + b"y.png", "漢".encode() * 83,
    ]  # fmt: skip
    files = write_images(tmp_path, names)
    (tmp_path / "c_classes.png").symlink_to(files[0])  # also through a link
    files.append(*write_images(tmp_path, [b"c.png"]))
    before = {file: file.read_bytes() for file in files}
    for results in ("a.json", "a.csv"):
        table = Table(tmp_path / results, files)
        lines = list(predict_files(FakeRun(), files, tmp_path, table))
        assert len(lines) == len(files)
        assert all(line.isprintable() for line in lines)
    assert {file: file.read_bytes() for file in files} == before
    rows = json.loads((tmp_path / "a.json").read_text())
    assert [Path(row["image"]) for row in rows] == files
    pictures = [tmp_path / path for row in rows for path in row["pictures"].values()]
    assert len({str(path).casefold() for path in pictures}) == 2 * len(files)
    for path in pictures:
        assert Image.open(path).format == "PNG"
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
        assert sum(1 for _ in csv.DictReader(file)) == len(files)
    assert len(list(tmp_path.iterdir())) == 3 * len(files) + 3  # the link and two tables


def test_pictures_replace_only_pictures_of_earlier_calls(tmp_path):
    files = write_images(tmp_path, [b"a.png", b"b.png"])
    (tmp_path / "a_labels.png").write_bytes(b"ground truth")
    (tmp_path / "b_classes.png").mkdir()
    for _ in range(2):
        list(predict_files(FakeRun(), files, tmp_path, Table(tmp_path / "table.json", files)))
        assert (tmp_path / "a_labels.png").read_bytes() == b"ground truth"
        assert sorted(path.name for path in tmp_path.glob("*_*.png")) == [
            "a_2_classes.png", "a_2_labels.png", "a_labels.png",
            "b_2_classes.png", "b_2_labels.png", "b_classes.png",
        ]  # fmt: skip


def test_a_broken_image_does_not_stop_the_others(tmp_path):
    files = write_images(tmp_path, [b"broken 1.png", b"good.png", b"broken 2.png"])
    table = Table(tmp_path / "a.json", files)
    lines = predict_files(FakeRun(), files, tmp_path / "out", table)
    assert next(lines).startswith(f"{files[1]}: cat 100.0%")
    with pytest.raises(UserError, match=r"2 of 3 cannot be read: .*broken 1.png: .*broken 2.png"):
        next(lines)
    assert len(json.loads((tmp_path / "a.json").read_text())) == 1


def test_results_replace_only_results(tmp_path):
    (file,) = write_images(tmp_path, [b"a.json"])  # an image may have any suffix
    with pytest.raises(UserError, match=r"--results=.*a\.json is an input, which is never replace"):
        Table(file, [file])
    for name, content in (("config.json", '{"task": 1}'), ("b.json", "[1]"), ("c.csv", "id,x\n")):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match="is a file, but no table of results; valid: a new"):
            Table(tmp_path / name)
        assert (tmp_path / name).read_text() == content
    for name in ("new.json", "new.csv"):
        for row in ROWS:  # the second table replaces the first
            table = Table(tmp_path / name)
            table.add(row)
            table.close()
        assert (tmp_path / name).read_text().count(".png") == 1
    for path in ("/proc/a.json", tmp_path / "a.json" / "b.json", tmp_path / f"{'x' * 300}.json"):
        with pytest.raises(UserError, match=f"--results={path} cannot be written: "):
            Table(Path(path))


def test_json(tmp_path):
    table = Table(tmp_path / "new" / "a.json")
    for row in ROWS:
        table.add(row)
    table.close()
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == ROWS


def test_csv(tmp_path):
    table = Table(tmp_path / "a.csv")
    for row in ROWS:
        table.add({**row, "features": [1.5, 2.0]})
    table.add({"class": "owl", "image": "c.png"})  # in another order
    table.close()
    with (tmp_path / "a.csv").open(newline="") as file:
        first, second, third = csv.DictReader(file)
    assert first == {
        "image": "a,b.png", "class": "cat", "probabilities.cat": "0.75",
        "probabilities.dog": "0.25", "features.0": "1.5", "features.1": "2.0",
    }  # fmt: skip
    assert second["probabilities.dog"] == "0.75"
    assert (third["image"], third["class"], third["features.0"]) == ("c.png", "owl", "")


def test_a_table_without_rows_is_not_written(tmp_path):
    Table(tmp_path / "a.json").close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a.txt", "a", ".json", "folder.csv"])
def test_other_files_are_refused(tmp_path, name):
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(UserError, match=r"is not valid; valid: a file NAME.json or NAME.csv"):
        Table(tmp_path / name)


def test_classes_of_the_same_name_stay_apart():
    found = by_class(["crane", "owl", "crane"], [0.1, 0.2000000123, 0.7])
    assert found == {"crane (0)": 0.1, "owl": 0.2, "crane (2)": 0.7}
