"""The embedded scenes with depth, and the photograph of scikit-image."""

import importlib.util

import numpy as np
import pytest
from make_task import open_dataset
from ml_collections import ConfigDict

from tokenvit_jax.data.datasets import depth_scenes, motorcycle
from tokenvit_jax.data.datasets.scenes import SIDE
from tokenvit_jax.data.depth_transforms import FRAMES, change_look, train_depth_scene
from tokenvit_jax.errors import UserError
from tokenvit_jax.tasks import default_config


@pytest.fixture(scope="module")
def sources():
    return {split: open_dataset("depth_scenes", split) for split in ("train", "test")}


def test_scenes_are_the_same_each_time(sources):
    assert {split: len(source) for split, source in sources.items()} == depth_scenes.INFO.splits
    record, same = sources["train"].read(7), open_dataset("depth_scenes", "train").read(7)
    np.testing.assert_array_equal(np.asarray(same["image"]), np.asarray(record["image"]))
    np.testing.assert_array_equal(same["depth"], record["depth"])
    for other in (sources["train"].read(8), sources["test"].read(7)):
        assert (np.asarray(other["image"]) != np.asarray(record["image"])).any()
    assert sources["test"].name(7) == "depth_scenes split 'test', record 7"


def test_depth_follows_from_the_size_of_a_board(sources):
    slope = depth_scenes.slope_depth()
    assert slope[0] == 16 and slope[-1] == 8
    # The inverse depth of a plane is linear in the row.
    np.testing.assert_allclose(np.diff(1 / slope), (1 / 8 - 1 / 16) / (SIDE - 1), rtol=1e-3)
    whole = 0
    for index in range(40):
        record = sources["train"].read(index)
        image, depth = record["image"], record["depth"]
        assert image.mode == "RGB" and image.size == (SIDE, SIDE)
        assert depth.shape == (SIDE, SIDE) and depth.dtype == np.float32
        for value in np.unique(depth[depth < 8]):
            rows, columns = np.nonzero(depth == value)
            side = depth_scenes.FOCAL_LENGTH * depth_scenes.BOARD / value
            assert side == pytest.approx(round(side)) and 18 <= side <= 64
            extent = max(np.ptp(rows), np.ptp(columns)) + 1
            # Hidden boards show less of themselves; boards of equal size more.
            whole += extent == round(side) and len(rows) == round(side) ** 2
        assert (depth[depth >= 8] == np.repeat(slope[:, None], SIDE, 1)[depth >= 8]).all()
    assert whole > 40


def augment(**changes) -> ConfigDict:
    config = default_config("depth").augment
    config.update(changes)
    return config


def test_a_rotation_turns_image_and_depth_together(sources):
    record, rng = sources["train"].read(0), np.random.default_rng(3)
    for _ in range(8):
        pixels, depth = train_depth_scene(
            record["image"], record["depth"], 128, augment(rotation=45.0), (1, 2, 3), rng
        )
        outside = (pixels == (1, 2, 3)).all(-1)
        assert (depth[outside] == 0).mean() > 0.95 if outside.any() else (depth > 0).all()
        assert set(np.unique(depth)) <= {0, *np.unique(record["depth"])}  # nothing is mixed


def test_a_small_image_is_enlarged(sources):
    record = sources["train"].read(0)
    pixels, depth = train_depth_scene(
        record["image"], record["depth"], (256, 160), augment(), (0,) * 3, np.random.default_rng(0)
    )
    assert pixels.shape == (256, 160, 3) and depth.shape == (256, 160)
    # Twice the size: every pixel occurs four times, from the same place.
    np.testing.assert_array_equal(depth[::2, ::2], depth[1::2, 1::2])


def test_colours_change_in_every_second_image_and_alpha_never():
    pixels = np.full((2, 2, 4), 100, np.uint8)
    changes = augment(gamma_range=(0.9, 1.1), brightness_range=(0.8, 1.2), color_range=(0.9, 1.1))
    found = [change_look(pixels, changes, np.random.default_rng(seed)) for seed in range(200)]
    changed = [bool((x != pixels).any()) for x in found]
    assert 70 < sum(changed) < 130
    assert all((x[..., 3] == 100).all() for x in found)
    levels = np.array([x[0, 0, :3] for x, other in zip(found, changed, strict=True) if other])
    assert levels.min() >= 60 and levels.max() <= 145 and levels.std(1).max() > 3


def test_frames():
    assert FRAMES["kitti"](375, 1242) == (13, 23, 1229, 375)
    assert FRAMES["nyu"](480, 640) == (43, 45, 608, 472)


def test_motorcycle_needs_scikit_image(monkeypatch):
    monkeypatch.setattr(motorcycle.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs a package .* valid: pip install scikit-image"):
        open_dataset("motorcycle", "train")


@pytest.mark.skipif(not importlib.util.find_spec("skimage"), reason="needs scikit-image")
def test_depth_of_the_motorcycle():
    train, test = (open_dataset("motorcycle", split).read(0) for split in ("train", "test"))
    assert train["image"].size == (480, 500) and test["depth"].shape == (500, 229)
    known = np.concatenate([x["depth"][x["depth"] > 0] for x in (train, test)])
    assert ((train["depth"] > 0).sum(), (test["depth"] > 0).sum()) == (223_563, 105_622)
    assert known.min() == pytest.approx(2.110, abs=1e-3)
    assert known.max() == pytest.approx(5.017, abs=1e-3)
