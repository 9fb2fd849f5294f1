"""Names, folders and patterns of image files."""

from pathlib import Path

import pytest

from tokenvit_jax.data.image_files import find_images
from tokenvit_jax.errors import UserError

FILES = (
    "a.png",
    "b.JPG",
    "a,b.png",
    "Photo, 2.jpg",
    "x[1].png",
    "x1.png",
    "inner/deep/c.webp",
    "inner/a.png",
    "inner/notes.txt",
    "inner/.hidden.png",
    "inner/._a.png",
    "inner/model.h5",
    ".cache/d.png",
    "only text/e.txt",
    "no suffix",
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in FILES:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.png"], ["a.png"]),
        (["a.png,b.JPG", "no suffix"], ["a.png", "b.JPG", "no suffix"]),
        (["b.JPG, a.png,"], ["b.JPG", "a.png"]),
        (["a,b.png"], ["a,b.png"]),
        (["b.JPG,Photo, 2.jpg,a,b.png,a.png"], ["b.JPG", "Photo, 2.jpg", "a,b.png", "a.png"]),
        (["inner"], ["inner/a.png", "inner/deep/c.webp"]),
        (["inner,inner/a.png,a.png"], ["inner/a.png", "inner/deep/c.webp", "a.png"]),
        (["inner/*"], ["inner/a.png", "inner/deep/c.webp"]),
        (["**/a.png"], ["a.png", "inner/a.png"]),
        (["x[1].png"], ["x[1].png"]),  # the file itself, not the pattern for x1.png
        (["?.*,x?.png"], ["a.png", "b.JPG", "x1.png"]),
        (["inner/.hidden.png"], ["inner/.hidden.png"]),
        ([""], []),
        ([","], []),
    ],
)
def test_names(folder, names, expected):
    assert find_images(names) == [Path(name) for name in expected]


def test_circles_of_links(folder):
    (folder / "inner" / "back").symlink_to(folder / "inner")
    expected = [Path("inner/a.png"), Path("inner/deep/c.webp")]
    for name in ("inner", "inner/**", "inner/**/*.*"):
        assert find_images([name]) == expected


def test_dangling_links_are_left_to_the_reader(folder):
    (folder / "gone.png").symlink_to("nowhere")
    assert find_images(["gone.png,a.png"]) == [Path("gone.png"), Path("a.png")]


def test_the_home_folder(folder):
    assert find_images(["~/a.png,~/inner/*.png"]) == [folder / "a.png", folder / "inner/a.png"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.png,none.png,b.JPG"], "^none.png: No such file or directory$"),
        (["only text"], "^only text: the folder holds no image$"),
        (["only*/*"], r"^only\*/\*: the pattern holds no image$"),
        (["~nobody.png"], "^~nobody.png: No such file or directory$"),  # no user has this name
        (["x" * 300], "^x+: No such file or directory$"),
        (["*.gif"], r"^\*.gif: the pattern holds no image$"),
    ],
)
def test_mistakes_are_named(folder, names, message):
    with pytest.raises(UserError, match=message):
        find_images(names)
