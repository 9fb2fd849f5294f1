"""KITTI and NYUv2 are prepared from small files in their layouts, and bad files are named."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from make_task import open_dataset
from PIL import Image

from tokenvit_jax.data import datasets
from tokenvit_jax.data.datasets import nyu_depth_v2
from tokenvit_jax.data.depth_maps import decode_depth
from tokenvit_jax.errors import UserError

WIDTH, HEIGHT = 13, 9
DRIVE = "2011_09_26/2011_09_26_drive_0002_sync"
STEPS = {"kitti_depth": 256, "nyu_depth_v2": 1000}
LISTS = {name: datasets._module(name).LAYOUT.lists for name in STEPS}
# Split -> (image, depth, where the depth lies); None: a line without depth.
FILES = {
    "kitti_depth": {
        "train": [
            (f"{DRIVE}/image_02/data/0000000069.png",
             "2011_09_26_drive_0002_sync/proj_depth/groundtruth/image_02/0000000069.png", "train"),
            (f"{DRIVE}/image_02/data/0000000070.png", None, ""),
        ],
        "test": [
            (f"{DRIVE}/image_02/data/0000000071.png",
             "2011_09_26_drive_0002_sync/proj_depth/groundtruth/image_02/0000000071.png", "val"),
        ],
    },
    "nyu_depth_v2": {
        "train": [("/kitchen_0028b/rgb_00045.jpg", "/kitchen_0028b/sync_depth_00045.png", "sync"),
                  ("/study_0001/rgb_00001.jpg", "/study_0001/sync_depth_00001.png", "sync")],
        "test": [("bathroom/rgb_00046.jpg", "bathroom/sync_depth_00046.png", "")],
    },
}  # fmt: skip


def values(number: int) -> np.ndarray:
    """Returns stored values, (HEIGHT, WIDTH) uint16; a third of the pixels is unknown."""
    found = np.random.default_rng(number).integers(1, 65536, (HEIGHT, WIDTH))
    return np.where(np.arange(WIDTH) % 3 == 0, 0, found).astype(np.uint16)


def write_files(name: str, folder: Path) -> dict[str, list[Path]]:
    """Writes the files of a dataset and its lists; returns the depth maps of each split."""
    written, number = {}, 0
    for split, files in FILES[name].items():
        lines = [f"{image} {depth} 721.5377" for image, depth, _ in files]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LISTS[name][split]).write_text("\n".join(lines) + "\n")
        for image, depth, place in files:
            base = folder / (place if name == "nyu_depth_v2" else "")
            path = base / image.lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (WIDTH, HEIGHT), (number, 2, 3)).save(path)
            if depth is not None:
                path = folder / place / depth.lstrip("/")
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(values(number)).save(path)
                written.setdefault(split, []).append(path)
                number += 1
    return written


@pytest.mark.parametrize("name", FILES)
def test_files_are_stored_with_their_depth(name, tmp_path, capsys):
    write_files(name, tmp_path / "downloads")
    folder = datasets.prepare(name, tmp_path / "downloads", tmp_path)
    assert folder == tmp_path / "depth" / name / "1.0.0"
    assert ("images of the list have no depth map" in capsys.readouterr().out) == (name[0] == "k")
    number, found = 0, {}
    for split, files in FILES[name].items():
        source = open_dataset(name, split, str(tmp_path))
        listed = [image.lstrip("/") for image, depth, _ in files if depth]
        assert len(source) == len(listed)
        for index in range(len(source)):
            record = source.read(index)
            (path,) = [path for path in listed if f"({path})" in source.name(index)]
            found[split, path] = record["depth"]
            assert record["image"].size == (WIDTH, HEIGHT) and record["image"].mode == "RGB"
        for path in listed:
            expected = values(number).astype(np.float32) / STEPS[name]
            np.testing.assert_array_equal(found[split, path], expected)
            number += 1
    assert number == len(found) == (2 if name[0] == "k" else 3)


def eight_bits(path):
    Image.new("L", (WIDTH, HEIGHT), 9).save(path)


def unknown(path):
    Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint16)).save(path)


def larger(path):
    Image.fromarray(np.ones((HEIGHT + 1, WIDTH), np.uint16)).save(path)


def cut(path):
    path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (eight_bits, "depth map is a PNG of mode L; valid: PNG, grey levels of 16 bits"),
        (unknown, "depth map has no known pixel: all values are 0"),
        (larger, r"depth map has 13 x 10 pixels, its image 13 x 9 \(width x height\)"),
        (cut, "cannot decode 60 bytes as a depth map"),
        (Path.unlink, r"is missing, but listed in .*nyudepthv2_test_files_with_gt.txt; looked in"),
    ],
)
def test_a_bad_depth_map_is_named_and_nothing_is_written(spoil, message, tmp_path):
    (path,) = write_files("nyu_depth_v2", tmp_path / "downloads")["test"]
    spoil(path)
    with pytest.raises(UserError, match=message) as error:
        datasets.prepare("nyu_depth_v2", tmp_path / "downloads", tmp_path)
    assert "bathroom/sync_depth_00046.png" in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.glob("depth/nyu_depth_v2/*"))


def test_lists_that_are_missing_or_malformed(tmp_path):
    with pytest.raises(UserError, match=r"eigen_train_files_with_gt.txt not found in --manual"):
        datasets.prepare("kitti_depth", tmp_path, tmp_path)
    write_files("kitti_depth", tmp_path)
    path = tmp_path / LISTS["kitti_depth"]["test"]
    path.write_text("a.png b.png 1\nc.png\n")
    with pytest.raises(UserError, match=r"test_files_with_gt.txt, line 2: 'c.png'; valid: image"):
        datasets.prepare("kitti_depth", tmp_path, tmp_path)


def test_pixels_of_16_bits():
    with np.load(Path(__file__).parent / "golden" / "depth_png.npz") as golden:
        for steps, name in ((256, "kitti"), (1000, "nyu")):
            found = decode_depth(golden["png"].tobytes(), steps, (53, 37))
            np.testing.assert_array_equal(found, golden[f"metres_{name}"])
            assert found.dtype == np.float32


def test_a_colour_image_is_no_depth_map():
    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, "JPEG")
    with pytest.raises(UserError, match="depth map is a JPEG of mode RGB; valid: PNG"):
        decode_depth(file.getvalue(), 256, (2, 2))


def test_labelled_images_need_h5py(tmp_path, monkeypatch):
    (tmp_path / nyu_depth_v2.LABELED).write_bytes(b"")
    with pytest.raises(UserError, match=r"splits.mat: .*; valid: splits.mat of NYU Depth v2"):
        datasets.prepare("nyu_depth_v2", tmp_path, tmp_path)
    write_splits_file(tmp_path)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UserError, match=r"is an HDF5 file, which needs .*; valid: pip install"):
        datasets.prepare("nyu_depth_v2", tmp_path, tmp_path)


def write_splits_file(folder):
    from scipy.io import savemat

    indices = {"trainNdxs": np.array([[1], [3]]), "testNdxs": np.array([[2]])}
    savemat(folder / nyu_depth_v2.SPLITS, indices)


def test_labelled_images(tmp_path):
    h5py = pytest.importorskip("h5py")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 3, 640, 480), np.uint8)
    depth = rng.uniform(0.5, 9.9, (3, 640, 480)).astype(np.float32)
    with h5py.File(tmp_path / nyu_depth_v2.LABELED, "w") as file:
        file["images"], file["rawDepths"] = images, depth
    write_splits_file(tmp_path)
    datasets.prepare("nyu_depth_v2", tmp_path, tmp_path)
    (test,) = [open_dataset("nyu_depth_v2", "test", str(tmp_path)).read(0)]
    expected = np.floor(depth[1].T.astype(np.float64) * 1000) / 1000
    np.testing.assert_allclose(test["depth"], expected, atol=1.1e-3)
    pixels = np.asarray(test["image"])
    np.testing.assert_array_equal(pixels[7:474, 7:632], images[1].transpose(2, 1, 0)[7:474, 7:632])
    assert pixels.shape == (480, 640, 3) and not pixels[:7].any() and not pixels[:, 632:].any()
    assert len(open_dataset("nyu_depth_v2", "train", str(tmp_path))) == 2
