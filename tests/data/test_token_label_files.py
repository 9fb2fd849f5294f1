"""Label files for the cells of images: labels follow the crop and the flip of the image."""

import dataclasses
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tokenvit_jax.data import builtin_info, train_batches
from tokenvit_jax.data.images import View
from tokenvit_jax.data.token_labels import TokenLabelFiles, grid_size, relative_box, sample_labels
from tokenvit_jax.errors import UserError
from tokenvit_jax.tasks import default_config
from tokenvit_jax.tasks.classification.examples import ClassificationExamples

RECORDS, WIDTH, HEIGHT = 6, 120, 90


def naive_sample(label_map, box, flip, grid):
    """Interpolates a dense map (gh, gw, num_classes) bilinearly at the centres of the cells."""
    left, top, right, bottom = box
    height, width, num_classes = label_map.shape
    found = np.zeros((*grid, num_classes))
    for row in range(grid[0]):
        for column in range(grid[1]):
            place = grid[1] - 1 - column if flip else column
            y = (top + (row + 0.5) / grid[0] * (bottom - top)) * height - 0.5
            x = (left + (place + 0.5) / grid[1] * (right - left)) * width - 0.5
            y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
            for i in range(height):
                for j in range(width):
                    weight = max(0, 1 - abs(y - i)) * max(0, 1 - abs(x - j))
                    found[row, column] += weight * label_map[i, j]
    return found


def dense(labels, num_classes):
    classes, scores = labels["token_classes"], labels["token_scores"]
    return (np.eye(num_classes)[classes] * scores[..., None]).sum(-2)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("box", [(0, 0, 1, 1), (0.3, 0.1, 0.45, 0.95), (0.9, 0.6, 1, 1)])
def test_sampling_equals_loops(box, flip):
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 9, (5, 7, 2))
    scores = rng.dirichlet(np.ones(2), (5, 7))
    label_map = (np.eye(9)[classes] * scores[..., None]).sum(-2)
    grid = 4, 3
    found = sample_labels(classes, scores, box, flip, grid)
    assert found["token_classes"].shape == found["token_scores"].shape == (4, 3, 8)
    expected = naive_sample(label_map, box, flip, grid)
    np.testing.assert_allclose(dense(found, 9), expected, atol=1e-12)
    np.testing.assert_allclose(found["token_scores"].sum(-1), 1, atol=1e-12)


def test_same_grid_is_the_map_itself():
    classes = np.random.default_rng(0).integers(0, 9, (3, 3, 1))
    found = sample_labels(classes, np.ones((3, 3, 1)), (0, 0, 1, 1), True, (3, 3))
    np.testing.assert_allclose(dense(found, 9), np.eye(9)[classes[:, ::-1, 0]], atol=1e-12)


def test_view_as_part_of_the_image():
    whole = View(None, False)
    box = relative_box(View((10, 20, 60, 50), False), (100, 200), (96, 64))
    assert box == (0.1, 0.1, 0.6, 0.25)
    assert relative_box(whole, (200, 100), (96, 96)) == (0.25, 0, 0.75, 1)
    assert relative_box(whole, (100, 400), (96, 96)) == (0, 0.375, 1, 0.625)
    assert relative_box(whole, (200, 100), (64, 32)) == (0.375, 0, 0.625, 1)
    assert relative_box(whole, (100, 400), (32, 64)) == (0, 0.4375, 1, 0.5625)


class RampSource:
    """Images whose red grows to the right and whose green grows downwards."""

    def __len__(self):
        return RECORDS

    def read(self, index):
        pixels = np.zeros((HEIGHT, WIDTH, 3))
        pixels[..., 0] = (np.arange(WIDTH) + 0.5) / WIDTH
        pixels[..., 1] = ((np.arange(HEIGHT) + 0.5) / HEIGHT)[:, None]
        image = Image.fromarray(np.rint(255 * pixels).astype(np.uint8))
        return {"id": index, "image": image, "label": index}

    def name(self, index):
        return f"ramps, record {index}"


def write_files(folder, classes=None, scores=None):
    """Writes scores of class 0 (grow right), class 1 (grow down) and the record's own class."""
    grid = (9, 12)
    if classes is None:
        numbers = np.arange(RECORDS)[:, None, None]
        classes = np.stack(
            np.broadcast_arrays(np.uint8(0), np.uint8(1), 2 + numbers, np.zeros(grid, np.uint8)), -1
        )[..., :3]
    if scores is None:
        right = (np.arange(grid[1]) + 0.5) / grid[1]
        down = ((np.arange(grid[0]) + 0.5) / grid[0])[:, None]
        scores = np.stack(np.broadcast_arrays(right, down, 1.0), -1)
        scores = np.broadcast_to(scores, (RECORDS, *scores.shape)).astype(np.float16)
    folder.mkdir(exist_ok=True)
    np.save(folder / "classes.npy", classes)
    np.save(folder / "scores.npy", scores)
    return str(folder)


def train_dataset(config):
    info = dataclasses.replace(builtin_info("digits"), splits={"train": RECORDS})
    examples = ClassificationExamples(config, info, train=True)
    return train_batches(RampSource(), examples, config)


@pytest.fixture
def config(tmp_path):
    config = default_config("classification")
    config.image_size = (96, 64)
    config.batch_size = 12
    config.augment.crop_scale = (0.1, 0.6)
    config.augment.flip = 0.5
    config.token_labels.weight = 0.5
    config.token_labels.files = write_files(tmp_path / "labels")
    return config


def test_labels_show_what_the_image_shows(config):
    batch = next(iter(train_dataset(config)))
    assert grid_size(96) == (3, 3) and grid_size((97, 32)) == (4, 1)
    assert batch["token_classes"].shape == batch["token_scores"].shape == (12, 3, 2, 12)
    assert batch["token_classes"].dtype == np.int32
    assert batch["token_scores"].dtype == np.float32
    labels = dense(batch, 2 + RECORDS)
    centres = batch["image"][:, 16::32, 16::32, :2] / 255.0
    np.testing.assert_allclose(labels[..., :2], centres, atol=0.04)
    # Some are mirrored, some are not, and each shows its own record.
    mirrored = labels[:, 0, 0, 0] > labels[:, 0, -1, 0]
    assert 0 < mirrored.sum() < 12
    np.testing.assert_array_equal(labels[..., 2:].argmax(-1)[:, 0, 0], batch["label"])

    config.token_labels.weight = 0.0
    plain = next(iter(train_dataset(config)))
    assert set(plain) == {"image", "label", "index", "skipped"}
    np.testing.assert_array_equal(plain["image"], batch["image"])


def test_other_processes_map_the_files_themselves(config):
    files = TokenLabelFiles(config.token_labels.files, RECORDS, 10)
    pickled = pickle.dumps(files)
    assert len(pickled) < 1000
    view = View((3, 4, 100, 80), True)
    expected = files.read(2, view, (WIDTH, HEIGHT), (96, 96))
    found = pickle.loads(pickled).read(2, view, (WIDTH, HEIGHT), (96, 96))
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


ZEROS = np.zeros((RECORDS, 2, 2, 1), np.int32)


@pytest.mark.parametrize(
    ("classes", "scores", "message"),
    [
        (ZEROS[1:], ZEROS[1:] / 1, "must both be (6 records, height, width, classes per cell)"),
        (ZEROS, (ZEROS / 1).astype(np.float32)[:, :1], "scores.npy, (6, 1, 2, 1), must both be"),
        (ZEROS, ZEROS / 1, "scores.npy is float64; valid: integers, and float16 or float32"),
        (ZEROS.astype(np.float32), ZEROS.astype(np.float32), "classes.npy is float32"),
        (np.array({}), ZEROS, "classes.npy cannot be read: "),
    ],
)
def test_files_of_another_form(config, tmp_path, classes, scores, message):
    config.token_labels.files = write_files(tmp_path / "others", classes, scores)
    with pytest.raises(UserError, match=re.escape(message)):
        train_dataset(config)


def test_missing_files(config, tmp_path):
    config.token_labels.files = str(tmp_path)
    with pytest.raises(UserError, match=r"classes.npy cannot be read: No such file or directory"):
        train_dataset(config)


def test_scores_out_of_range(config):
    folder = Path(config.token_labels.files)
    scores = np.load(folder / "scores.npy")
    for value in (np.nan, np.inf, -0.5, 1.5):
        np.save(folder / "scores.npy", np.full_like(scores, value))
        with pytest.raises(UserError, match=r"scores.npy, record 0: scores .*; valid: 0 to 1"):
            TokenLabelFiles(str(folder), RECORDS, 10).read(0, View(None, False), (9, 9), (64, 64))


@pytest.mark.parametrize("content", [b"", b"no array", b"\x93NUMPY\x01\0", b"PK\3\4", "archive"])
def test_damaged_files(config, content):
    file = Path(config.token_labels.files) / "scores.npy"
    if content == "archive":
        with file.open("wb") as stream:
            np.savez(stream, scores=np.zeros(3))
    else:
        file.write_bytes(content)
    with pytest.raises(UserError, match=r"^token_labels.files: .*scores.npy (cannot be|is an)"):
        TokenLabelFiles(str(file.parent), RECORDS, 10)


def test_class_out_of_range(config, tmp_path):
    scores = np.ones(ZEROS.shape, np.float32)
    config.token_labels.files = write_files(tmp_path / "others", ZEROS + 10, scores)
    with pytest.raises(
        UserError, match=r"ramps, record (\d): .*, record \1: classes 10 to 10; valid: 0 to 9"
    ):
        next(iter(train_dataset(config)))
