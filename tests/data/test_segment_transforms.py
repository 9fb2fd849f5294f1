"""Views of images with segments: what is drawn, what is seen, and the targets of training."""

import numpy as np
import pytest
from PIL import Image

from tokenvit_jax.data.box_transforms import View
from tokenvit_jax.data.datasets import scene_segments
from tokenvit_jax.data.instances import instances_of
from tokenvit_jax.data.record import Segments
from tokenvit_jax.data.segment_transforms import (
    GREY,
    LAYERS,
    NO_SEGMENT,
    cropped_view,
    jittered_view,
    view_canvas,
    view_instances,
    view_segments,
)
from tokenvit_jax.data.segments import class_segments

SIZE = 50, 40  # width and height
CANVAS = 48, 64  # height and width
# Enlarged and reduced views, with and without room for padding, some of them mirrored.
VIEWS = [
    View((0, 0, 50, 40), (60, 48)),
    View((0, 0, 50, 40), (23, 19), flip=True),
    View((7.25, 3.5, 41.75, 37.25), (46, 45)),
    View((20.3, 0, 50, 11.7), (64, 25), flip=True),
]


def source_pixel(view, x, y):
    """Returns the pixel of the image whose area holds the centre of a pixel of a view."""
    left, top, right, bottom = view.part
    if view.flip:
        x = view.size[0] - 1 - x
    return (
        int(left + (x + 0.5) / view.size[0] * (right - left)),
        int(top + (y + 0.5) / view.size[1] * (bottom - top)),
    )


def some_segments():
    """Returns 6 segments and void; 2 is a crowd, and 40 has no pixels."""
    rng = np.random.default_rng(0)
    numbers = np.array([9, 2, 700_000, 31, 40, 5], np.int32)
    ids = np.zeros(SIZE[::-1], np.int32)
    for number in (9, 2, 700_000, 31, 5, 9, 2, 700_000, 0):
        y, x = rng.integers(0, 30, 2)
        ids[y : y + 14, x : x + 17] = number
    return Segments(
        ids=ids,
        numbers=numbers,
        classes=np.array([3, 1, 0, 3, 2, 4], np.int32),
        crowd=numbers == 2,
        areas=np.zeros(6, np.int64),
    )


def seen_pixels(segments, view):
    """Returns the identifiers of a view on the canvas, pixel by pixel; 0 on the padding."""
    seen = np.zeros(CANVAS, int)
    for y in range(view.size[1]):
        for x in range(view.size[0]):
            column, row = source_pixel(view, x, y)
            seen[y, x] = segments.ids[row, column]
    return seen


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("classes", [None, {3, 2}])
@pytest.mark.parametrize("keep_empty", [True, False])
def test_targets_are_the_segments_that_are_seen(view, classes, keep_empty):
    segments = some_segments()
    seen = seen_pixels(segments, view)
    wanted = [
        (number, label)
        for number, label in zip(segments.numbers, segments.classes, strict=True)
        if number != 2 and (classes is None or label in classes)
        and (keep_empty or (seen == number).any())
    ]  # fmt: skip
    found = view_segments(segments, view, CANVAS, 8, classes=classes, keep_empty=keep_empty)
    assert found["segments"].dtype == np.int16 and found["segments"].shape == CANVAS
    assert found["classes"].dtype == np.int32 and found["segments_left_out"].dtype == np.int32
    padding = [NO_SEGMENT] * (8 - len(wanted))
    assert found["classes"].tolist() == [label for _, label in wanted] + padding
    assert found["segments_left_out"] == 0
    places = {number: place for place, (number, _) in enumerate(wanted, 1)}
    expected = np.vectorize(lambda number: places.get(number, 0))(seen)
    np.testing.assert_array_equal(found["segments"], expected)
    assert any(number == 40 for number, _ in wanted) == keep_empty


@pytest.mark.parametrize("keep_empty", [True, False])
def test_the_largest_segments_remain_and_the_others_are_counted(keep_empty):
    segments, view = some_segments(), VIEWS[0]
    seen = seen_pixels(segments, view)
    areas = {number: (seen == number).sum() for number in (9, 700_000, 31, 40, 5)}
    largest = sorted(areas, key=areas.get)[-2:]
    wanted = [number for number in areas if number in largest]
    assert len(set(areas.values())) == 5 and areas[40] == 0
    found = view_segments(segments, view, CANVAS, 2, keep_empty=keep_empty)
    assert found["segments_left_out"] == (3 if keep_empty else 2)
    for place, number in enumerate(wanted, 1):
        np.testing.assert_array_equal(found["segments"] == place, seen == number)
    assert found["segments"].max() == 2


def test_an_image_without_targets():
    segments = some_segments()
    crowds = segments._replace(crowd=np.ones(6, bool))
    none = Segments(np.zeros(SIZE[::-1], np.int32), *(array[:0] for array in segments[1:]))
    for empty in (crowds, none):
        found = view_segments(empty, VIEWS[0], CANVAS, 3, keep_empty=True)
        assert not found["segments"].any() and set(found["classes"]) == {NO_SEGMENT}
        assert found["segments_left_out"] == 0


def test_semantic_targets_are_the_classes_that_are_seen():
    label_map = np.full(SIZE[::-1], 255, np.uint8)
    label_map[:, :4], label_map[10:20, 30:] = 7, 149
    view = View((20.0, 0, 50, 40), (36, 48))
    found = view_segments(class_segments(label_map), view, CANVAS, 4)
    assert found["classes"].tolist() == [149, -1, -1, -1]
    assert (found["segments"] == 1).sum() == 12 * 24  # 10 x 20 pixels, 1.2 times as large


def masks_of(example, count):
    """Returns the masks of the first objects of an example (count, H, W)."""
    places = np.arange(1, count + 1).reshape(-1, 1, 1, 1)
    return (example["segments"] == places).any(1)


@pytest.mark.parametrize("view", VIEWS)
def test_objects_overlap_and_those_outside_are_dropped(view):
    rng = np.random.default_rng(1)
    masks = [np.zeros(SIZE[::-1], bool) for _ in range(4)]
    masks[0][3:39, 2:49] = rng.random((36, 47)) < 0.7
    masks[1][:30, 21:] = True
    masks[2][-1, 0] = True  # seen by two of the views
    masks[3][:] = True
    objects = instances_of(masks, [5, 1, 7, 2])._replace(crowd=np.array([0, 0, 0, 1], bool))
    expected = np.zeros((3, *CANVAS), bool)
    for y in range(view.size[1]):
        for x in range(view.size[0]):
            column, row = source_pixel(view, x, y)
            expected[:, y, x] = [mask[row, column] for mask in masks[:3]]
    kept = [i for i in range(3) if expected[i].any()]
    areas = expected.sum((1, 2))
    kept.sort(key=lambda i: -areas[i])
    found = view_instances(objects, SIZE, view, CANVAS, 4)
    assert found["segments"].shape == (LAYERS, *CANVAS) and found["segments"].dtype == np.int16
    np.testing.assert_array_equal(masks_of(found, len(kept)), expected[kept])
    assert found["segments"].max() == len(kept) and found["segments_left_out"] == 0
    assert found["classes"].tolist() == [[5, 1, 7][i] for i in kept] + [-1] * (4 - len(kept))

    one = view_instances(objects, SIZE, view, CANVAS, 1)
    assert one["classes"].tolist() == [[5, 1, 7][int(areas.argmax())]]
    assert one["segments_left_out"] == len(kept) - 1
    np.testing.assert_array_equal(masks_of(one, 1), expected[[areas.argmax()]])


def test_no_objects():
    found = view_instances(instances_of([], []), SIZE, VIEWS[0], CANVAS, 2)
    assert not found["segments"].any() and found["classes"].tolist() == [-1, -1]


def test_objects_that_overlap_others_in_all_maps_are_left_out():
    masks = [np.zeros(SIZE[::-1], bool) for _ in range(LAYERS + 2)]
    for number, mask in enumerate(masks[:-1]):
        mask[: 30 - number, :20] = True
    masks[-1][-3:] = True  # apart from the others, and small
    objects = instances_of(masks, range(LAYERS + 2))
    found = view_instances(objects, SIZE, View((0, 0, *SIZE), SIZE), CANVAS, LAYERS + 2)
    kept = [*range(LAYERS), LAYERS + 1]
    assert found["segments_left_out"] == 1
    assert found["classes"].tolist() == [*kept, -1]
    expected = np.zeros((len(kept), *CANVAS), bool)
    expected[:, : SIZE[1], : SIZE[0]] = [masks[i] for i in kept]
    np.testing.assert_array_equal(masks_of(found, len(kept)), expected)
    assert found["segments"][0].max() == len(kept)  # in the first map, as there is room


def test_both_forms_of_the_digits_of_a_scene_agree():
    source = scene_segments.SceneSegmentsSource("train")
    things, rng, compared = scene_segments.INFO.things, np.random.default_rng(2), 0
    for index in range(20):
        record = source.read(index)
        view = jittered_view((128, 128), (96, 96), (0.3, 2), flip=0.5, rng=rng)
        a = view_segments(record["segments"], view, (96, 96), 3, classes=things)
        b = view_instances(record["instances"], (128, 128), view, (96, 96), 3)
        assert a["segments_left_out"] == b["segments_left_out"]
        count = int((b["classes"] >= 0).sum())
        order = np.argsort(
            [-(a["segments"] == i).sum() for i in range(1, count + 1)], kind="stable"
        )
        assert b["classes"][:count].tolist() == a["classes"][order].tolist()
        for place, mask in zip(order + 1, masks_of(b, count), strict=True):
            np.testing.assert_array_equal(a["segments"] == place, mask)
            compared += bool(mask.any())
    assert compared > 20


# ------------------------------------------------------------------------------------------------
# Drawing views
# ------------------------------------------------------------------------------------------------


def naive_jitter(image, canvas, scale_range, mirrored, scale, place):
    """Returns the canvas by whole images: mirrored, resized, cropped, padded, one after another."""
    height, width = canvas
    if mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    low, high = scale_range
    scale = low + (high - low) * scale
    factor = min(width * scale / image.width, height * scale / image.height)
    size = int(image.width * factor + 0.5), int(image.height * factor + 0.5)
    image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = (round(max(a - b, 0) * place) for a, b in zip(size, (width, height), strict=True))
    image = image.crop((left, top, min(left + width, size[0]), min(top + height, size[1])))
    result = Image.new("RGB", (width, height), (GREY,) * 3)
    result.paste(image, (0, 0))
    return np.asarray(result, int)


@pytest.mark.parametrize("canvas", [(64, 64), (48, 80)])
@pytest.mark.parametrize("seed", range(12))  # 8 and 11 are mirrored and cropped
def test_jitter_is_mirror_resize_crop_and_pad(seed, canvas):
    noise = np.random.default_rng(5).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    rng = np.random.default_rng(seed)
    view = jittered_view(SIZE, canvas, (0.1, 2.0), flip=0.5, rng=rng)
    draws = np.random.default_rng(seed)
    mirrored, scale, place = draws.random() < 0.5, draws.random(), draws.random()
    assert rng.random() == draws.random()  # it draws these three numbers
    expected = naive_jitter(image, canvas, (0.1, 2.0), mirrored, scale, place)
    found = view_canvas(image, view, canvas).astype(int)
    assert found.shape == (*canvas, 3)
    difference = abs(found - expected)  # few pixels of a crop, or mirrored, are rounded otherwise
    assert difference.max() <= 2 and difference.mean() < 0.1


def test_jitter_uses_one_number_for_both_directions():
    rng, both = np.random.default_rng(0), 0
    for _ in range(200):
        view = jittered_view((100, 90), (40, 30), (0.5, 2.0), flip=0.0, rng=rng)
        left, top, right, bottom = view.part
        if right - left < 80 and bottom - top < 80 * 0.9:
            both += 1
            assert abs(left / (100 - (right - left)) - top / (90 - (bottom - top))) < 0.1
    assert both > 20


def test_jitter_covers_its_range_and_keeps_the_aspect():
    rng, factors, flips = np.random.default_rng(1), [], []
    for _ in range(400):
        view = jittered_view((120, 60), (64, 64), (0.1, 2.0), flip=0.25, rng=rng)
        x, y = (view.size[i] / (view.part[i + 2] - view.part[i]) for i in (0, 1))
        assert abs(x / y - 1) < 0.2 and max(view.size) <= 64  # a side of 3 pixels is rounded
        factors.append(x * 120 / 64)
        flips.append(view.flip)
    assert 0.08 < min(factors) < 0.15 and 1.95 < max(factors) < 2.05
    assert abs(np.mean(factors) - 1.05) < 0.08 and 0.18 < np.mean(flips) < 0.32


def test_crops_have_a_short_side_of_the_list():
    rng, sides, corners = np.random.default_rng(2), set(), []
    for _ in range(300):
        view = cropped_view((100, 80), (64, 64), (32, 64, 96), 1000, flip=0.5, rng=rng)
        scale = view.size[1] / (view.part[3] - view.part[1])
        sides.add(round(80 * scale))
        assert view.size == {32: (40, 32), 64: (64, 64), 96: (64, 64)}[round(80 * scale)]
        if round(80 * scale) == 96:
            corners.append((view.part[0] * scale, view.part[1] * scale))
    assert sides == {32, 64, 96}
    corners = np.array(corners)
    np.testing.assert_allclose(corners.min(0), 0, atol=1.5)
    np.testing.assert_allclose(corners.max(0), (120 - 64, 96 - 64), atol=1.5)
    assert abs(np.corrcoef(corners.T)[0, 1]) < 0.3  # two numbers place these crops


def test_the_longer_side_limits_the_resized_image():
    view = cropped_view((400, 40), (64, 64), (80,), 200, flip=0.0, rng=np.random.default_rng(0))
    assert view.size == (64, 20)
    assert view.part[2] - view.part[0] == 128 and view.part[1::2] == (0, 40)


@pytest.mark.parametrize("view", VIEWS)
def test_image_and_segments_stay_aligned(view):
    """Pixels tell their column and row; so do the segments, one of every second pixel and row."""
    x, y = np.meshgrid(np.arange(SIZE[0]), np.arange(SIZE[1]))
    image = Image.fromarray(np.stack([4 * x, 4 * y, 0 * x], -1).astype(np.uint8))
    ids = (1 + (y // 2) * 25 + x // 2).astype(np.int32)
    numbers = np.arange(1, ids.max() + 1, dtype=np.int32)
    segments = Segments(ids, numbers, numbers, np.zeros(len(numbers), bool), numbers)
    pixels = view_canvas(image, view, CANVAS)
    found = view_segments(segments, view, CANVAS, len(numbers), keep_empty=True)["segments"]
    inside = found > 0
    assert inside.sum() == view.size[0] * view.size[1]
    assert (pixels[~inside] == GREY).all()
    rows, columns = np.divmod(found[inside] - 1, 25)
    distance = pixels[inside][:, :2] / 4 - 2 * np.stack([columns, rows], -1) - 0.5
    assert abs(distance).max() < 1.6


def test_colours_change_only_where_asked():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    plain = view_canvas(image, VIEWS[0], CANVAS)
    changed = [
        view_canvas(image, VIEWS[0], CANVAS, color_rng=np.random.default_rng(seed))
        for seed in range(3)
    ]
    assert any((pixels != plain).any() for pixels in changed)
    for pixels in changed:
        assert (pixels[:, 60:] == GREY).all()  # the padding has no colours to change
    filled = view_canvas(image, VIEWS[1], CANVAS, (1, 2, 3))
    assert filled[-1, -1].tolist() == [1, 2, 3]
