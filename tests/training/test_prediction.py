"""Names of pictures and tables of results."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

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
    table.close()
    with (tmp_path / "a.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert first == {
        "image": "a,b.png", "class": "cat", "probabilities.cat": "0.75",
        "probabilities.dog": "0.25", "features.0": "1.5", "features.1": "2.0",
    }  # fmt: skip
    assert second["probabilities.dog"] == "0.75"


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
