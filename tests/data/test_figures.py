"""The embedded figures: images, keypoints, visibility and annotations."""

import numpy as np
import pytest

from tokenvit_jax.config import base_config
from tokenvit_jax.data.datasets import builtin_info, figures
from tokenvit_jax.data.datasets.figures import SIDE, FiguresSource
from tokenvit_jax.data.whole_body import PARTS, WHOLE_BODY

SPLITS = "train", "test"
LIMBS = {  # middles of limbs
    side: [
        tuple(WHOLE_BODY.names.index(f"{side}_{name}") for name in pair)
        for pair in (("elbow", "wrist"), ("knee", "ankle"), ("hip", "knee"))
    ]
    for side in ("left", "right")
}


@pytest.fixture(scope="module")
def drawings():
    return {split: [FiguresSource(split).draw(image) for image in range(45)] for split in SPLITS}


def test_records_are_the_same_each_time():
    record, same = (FiguresSource("train").read(7) for _ in range(2))
    assert set(record) == {"id", *builtin_info("figures").fields}
    np.testing.assert_array_equal(np.asarray(record["image"]), np.asarray(same["image"]))
    for a, b in zip(record["person"], same["person"], strict=True):
        np.testing.assert_array_equal(a, b)
    for other in (FiguresSource("train").read(8), FiguresSource("test").read(7)):
        assert (np.asarray(other["image"]) != np.asarray(record["image"])).any()


@pytest.mark.parametrize("split", SPLITS)
def test_every_figure_is_a_record(split, drawings):
    source = FiguresSource(split)
    assert len(source) == figures.INFO.splits[split]
    places = [source.place(index) for index in range(len(source))]
    assert places == sorted(set(places))
    images = {image for image, _ in places}
    assert images == set(range(len(source) * 3 // 4))
    for index in range(0, 60, 7):
        record, (image, place) = source.read(index), places[index]
        assert record["id"] == image and record["image"].mode == "RGB"
        assert record["image"].size == (SIDE, SIDE)
        expected = drawings[split][image].persons
        assert len(expected) == sum(other == image for other, _ in places)
        np.testing.assert_array_equal(record["person"].keypoints, expected[place].keypoints)


@pytest.mark.parametrize("split", SPLITS)
def test_keypoints_and_boxes_lie_in_the_image(split, drawings):
    visible, shares = [], []
    for drawing in drawings[split]:
        for person, area in zip(drawing.persons, drawing.areas, strict=True):
            box, keypoints = person.box, person.keypoints
            assert keypoints.shape == (133, 3) and keypoints.dtype == box.dtype == np.float32
            assert person.score == 1
            assert (box >= 0).all() and (box <= SIDE).all() and (box[2:] - box[:2] > 30).all()
            assert 1500 < area < (box[2:] - box[:2]).prod()
            seen = keypoints[:, 2] > 0
            assert not keypoints[~seen].any() and (keypoints[:, :2] <= SIDE - 1).all()
            assert (keypoints[PARTS["body"], 2] > 0).sum() > 8  # enough for half a body
            sure = keypoints[keypoints[:, 2] == 2, :2]
            assert (sure > box[:2] - 2).all() and (sure < box[2:] + 1).all()
            visible.append(keypoints[:, 2])
            shares.append(seen.mean())
    counts = np.bincount(np.ravel(visible).astype(int)) / np.size(visible)
    assert 0.02 < counts[0] < 0.15 and 0.002 < counts[1] < 0.05 and len(counts) == 3
    assert min(shares) < 0.8 and np.mean(np.array(shares) == 1) > 0.3


def middle_levels(image, keypoints, limb):
    """Returns the brightness (HSV) of the pixel in the middle of a limb."""
    x, y = keypoints[list(limb), :2].mean(0).round().astype(int)
    return image[y, x].max()


def test_left_limbs_are_darker_and_on_the_right():
    source, compared, sides = FiguresSource("train"), 0, []
    for index in range(0, 40, 4):  # images with one figure
        record = source.read(index)
        image, keypoints = np.asarray(record["image"]).astype(int), record["person"].keypoints
        for left, right in zip(*LIMBS.values(), strict=True):
            if (keypoints[[*left, *right], 2] == 2).all():
                levels = [middle_levels(image, keypoints, limb) for limb in (left, right)]
                compared += 1
                assert levels[0] < 0.7 * levels[1]
        shoulders = keypoints[[5, 6]]
        if (shoulders[:, 2] > 0).all():
            sides.append(shoulders[0, 0] - shoulders[1, 0])
    assert compared > 15 and min(sides) > 20


def test_a_visible_point_is_where_its_part_is_drawn():
    """Eyes are dark blue, and the corners of the lips are next to red."""
    source, eyes, lips = FiguresSource("test"), [], []
    for index in range(60):
        record = source.read(index)
        image, keypoints = np.asarray(record["image"]).astype(int), record["person"].keypoints
        for points, found in (((1, 2), eyes), ((23 + 51, 23 + 57), lips)):
            for x, y, visible in keypoints[list(points)]:
                if visible == 2:
                    found.append(image[round(float(y)), round(float(x))])
    assert len(eyes) > 80 and len(lips) > 80
    dark = np.array(eyes)
    assert np.mean((dark[:, 2] > dark[:, 0] + 20) & (dark.max(1) < 200)) > 0.9
    red = np.array(lips)
    assert np.mean(red[:, 0] > red[:, 1] + 60) > 0.8


def test_a_point_is_covered_where_the_second_figure_changes_its_pixel(monkeypatch):
    source, paint = FiguresSource("train"), figures.paint

    def only_the_first(layer, figure, first):
        return paint(layer, figure, first) if first == 1 else np.zeros(133, int)

    images = [image for image in range(200) if len(source.draw(image).persons) == 2]
    both = [source.draw(image) for image in images]
    monkeypatch.setattr(figures, "paint", only_the_first)
    monkeypatch.setattr(figures, "mask_box", lambda mask: np.zeros(4, np.float32))
    alone = [source.draw(image) for image in images]
    covered, changed = [], []
    for first, second in zip(both, alone, strict=True):
        pixels, before = (np.asarray(drawing.image).astype(int) for drawing in (first, second))
        points, seen = first.persons[0].keypoints, second.persons[0].keypoints
        free = seen[:, 2] == 2
        x, y = points[free, :2].round().astype(int).T
        covered.append(points[free, 2] == 1)
        changed.append(np.abs(pixels[y, x] - before[y, x]).max(1) > 0)
    covered, changed = map(np.concatenate, (covered, changed))
    assert covered.sum() > 20 and (covered == changed).mean() > 0.99
    assert (changed[covered]).mean() > 0.95


def test_test_figures_stand_before_photographs_of_their_own():
    sources = [FiguresSource(split) for split in SPLITS]
    widths = [[image.width for image in source._photographs] for source in sources]
    assert widths == [[480, 480], [160, 160]]


def test_annotations_list_every_figure():
    found, source = figures.annotations(base_config(), "test"), FiguresSource("test")
    assert [image["id"] for image in found["images"]] == list(range(90))
    assert found["categories"] == [{"id": 1, "name": "figure"}]
    assert found["records"] == [entry["image_id"] for entry in found["annotations"]]
    assert [entry["id"] for entry in found["annotations"]] == list(range(1, 121))
    for index in (0, 2, 3, 119):
        entry, record = found["annotations"][index], source.read(index)
        person = record["person"]
        assert entry["image_id"] == record["id"]
        np.testing.assert_array_equal(np.reshape(entry["keypoints"], (133, 3)), person.keypoints)
        left, top, width, height = entry["bbox"]
        assert [left, top, left + width, top + height] == person.box.tolist()
        assert entry["num_keypoints"] == (person.keypoints[:17, 2] > 0).sum()
