"""Crops of persons: frames, pixels and keypoints, and what changes them at random."""

from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from tokenvit_jax.data.person_crops import (
    Frame,
    crop_image,
    crop_matrix,
    draw_frame,
    frame_of_box,
    inverse_matrix,
    mirror,
    transform_points,
)
from tokenvit_jax.data.record import Person
from tokenvit_jax.data.whole_body import WHOLE_BODY

GOLDEN = np.load(Path(__file__).parent / "golden" / "pose_affine.npz")
SIZE = tuple(GOLDEN["output_size_wh"][::-1].tolist())
INPUT = 256, 192
OFF = ConfigDict({"shift": 0.0, "half_body": 0.0, "scale": 0.0, "rotation": 0.0})


def golden_frame(case):
    left, top, width, height = GOLDEN["boxes_xywh"][case]
    frame = frame_of_box(np.array([left, top, left + width, top + height]), SIZE)
    return frame._replace(rotation=float(GOLDEN["rotation"][case]))


def crop_slowly(image, matrix, size):
    """Interpolates the four pixels around every place, with zeros around the image."""
    inverse, crop = inverse_matrix(matrix), np.zeros((*size, image.shape[2]))
    for row in range(size[0]):
        for column in range(size[1]):
            x, y = inverse @ (column, row, 1)
            left, top = int(np.floor(x)), int(np.floor(y))
            for i, weight_x in ((left, left + 1 - x), (left + 1, x - left)):
                for j, weight_y in ((top, top + 1 - y), (top + 1, y - top)):
                    if 0 <= i < image.shape[1] and 0 <= j < image.shape[0]:
                        crop[row, column] += weight_x * weight_y * image[j, i]
    return crop


@pytest.mark.parametrize("case", range(4))
def test_frames_matrices_and_points_are_those_of_the_reference(case):
    frame = golden_frame(case)
    np.testing.assert_allclose(frame.center, GOLDEN["centers"][case], atol=1e-5)
    np.testing.assert_allclose(frame.size, GOLDEN["scales"][case], atol=1e-5)
    matrix = crop_matrix(frame, SIZE)
    np.testing.assert_allclose(matrix, GOLDEN["matrices"][case], atol=1e-4)
    points = transform_points(GOLDEN["points"][case], matrix)
    np.testing.assert_allclose(points, GOLDEN["points_in_crop"][case], atol=1e-4)


@pytest.mark.parametrize("case", range(4))
def test_crops_are_those_of_the_reference_within_a_level(case):
    image = GOLDEN["image"]
    matrix = crop_matrix(golden_frame(case), SIZE)
    crop = crop_image(Image.fromarray(image), matrix, SIZE)
    assert crop.dtype == np.uint8
    assert np.abs(crop.astype(int) - GOLDEN["crops"][case]).max() <= 1
    assert np.abs(crop - crop_slowly(image, matrix, SIZE)).max() <= 1


@pytest.mark.parametrize("unbiased", [False, True])
def test_crops_of_any_frame_are_bilinear(unbiased):
    image, rng = GOLDEN["image"], np.random.default_rng(0)
    for _ in range(8):
        frame = Frame(rng.uniform(-20, 130, 2), rng.uniform(10, 150, 2), rng.uniform(-90, 90))
        matrix = crop_matrix(frame, (20, 13), unbiased=unbiased)
        crop = crop_image(Image.fromarray(image), matrix, (20, 13))
        assert np.abs(crop - crop_slowly(image, matrix, (20, 13))).max() <= 1


def test_a_frame_outside_of_the_image_is_black():
    matrix = crop_matrix(Frame(np.array([-90.0, 500.0]), np.array([30.0, 40.0])), (20, 15))
    crop = crop_image(Image.fromarray(GOLDEN["image"]), matrix, (20, 15))
    np.testing.assert_array_equal(crop, np.zeros((20, 15, 3)))


def test_images_with_other_channels_keep_them():
    image = Image.fromarray(GOLDEN["image"])
    matrix = crop_matrix(golden_frame(2), SIZE)
    assert crop_image(image.convert("L"), matrix, SIZE).shape == (*SIZE, 1)
    assert crop_image(image.convert("RGBA"), matrix, SIZE).shape == (*SIZE, 4)


def test_unbiased_crops_put_the_frame_on_the_outermost_pixels():
    frame = Frame(np.array([40.0, 30.0]), np.array([48.0, 64.0]))
    corners = np.array([[16.0, -2.0, 2.0], [64.0, 62.0, 1.0]])
    unbiased = transform_points(corners, crop_matrix(frame, INPUT, unbiased=True))
    np.testing.assert_allclose(unbiased, [[0, 0, 2], [191, 255, 1]], atol=1e-9)
    plain = transform_points(corners, crop_matrix(frame, INPUT))
    np.testing.assert_allclose(plain, [[0, 0, 2], [192, 256, 1]], atol=1e-9)


@pytest.mark.parametrize("unbiased", [False, True])
def test_inverse_maps_back(unbiased):
    frame, rng = (
        Frame(np.array([40.0, 30.0]), np.array([50.0, 70.0]), 33.0),
        np.random.default_rng(1),
    )
    matrix, points = crop_matrix(frame, INPUT, unbiased=unbiased), rng.normal(0, 50, (2, 9, 3))
    back = transform_points(transform_points(points, matrix), inverse_matrix(matrix))
    np.testing.assert_allclose(back, points, atol=1e-9)


@pytest.mark.parametrize("box", [(3, 4, 3, 9), (3, 4, 8, 4), (8, 4, 3, 9), (3, 4, np.nan, 9)])
def test_a_box_without_area_is_named(box):
    with pytest.raises(ValueError, match=r"box=\[.*\] has no area; valid: x1 < x2 and y1 < y2"):
        frame_of_box(np.array(box, np.float32), INPUT)


def a_person(seed=0, count=133):
    """Returns a person with some keypoints without label, and its frame."""
    rng = np.random.default_rng(seed)
    keypoints = np.zeros((133, 3), np.float32)
    seen = rng.permutation(133)[:count]
    keypoints[seen] = np.column_stack([rng.uniform(40, 90, count), rng.uniform(20, 160, count),
                                       rng.choice([0.3, 1, 2], count)])  # fmt: skip
    person = Person(np.array([40, 20, 90, 160], np.float32), keypoints)
    return person, frame_of_box(person.box, INPUT)


def test_mirrored_points_lie_on_mirrored_pixels():
    person, frame = a_person()
    keypoints = transform_points(person.keypoints, crop_matrix(frame, INPUT))
    crop = np.zeros((*INPUT, 1), np.uint8)
    places = keypoints[:, :2].round().astype(int)
    crop[places[:, 1], places[:, 0], 0] = np.arange(1, 134)
    flipped, moved = mirror(crop, keypoints, WHOLE_BODY)
    partners = dict(WHOLE_BODY.flip_pairs) | {b: a for a, b in WHOLE_BODY.flip_pairs}
    for point, (x, y, visible) in enumerate(moved):
        other = partners.get(point, point)
        column, row = places[other]
        assert flipped[row, 191 - column, 0] == crop[row, column, 0]
        np.testing.assert_allclose((x, y), (191 - keypoints[other, 0], keypoints[other, 1]))
        assert visible == keypoints[other, 2]
    again = mirror(flipped, moved, WHOLE_BODY)
    np.testing.assert_array_equal(again[0], crop)
    np.testing.assert_allclose(again[1], keypoints, atol=1e-4)


def draw(changes, count=4000, person=None):
    person, frame = person or a_person()
    rng, augment = np.random.default_rng(5), ConfigDict({**OFF, **changes})
    return frame, [draw_frame(rng, person, frame, WHOLE_BODY, augment) for _ in range(count)]


def test_frames_do_not_change_where_all_is_off():
    frame, drawn = draw({}, 20)
    for found in drawn:
        np.testing.assert_array_equal(found.center, frame.center)
        np.testing.assert_array_equal(found.size, frame.size)
        assert found.rotation == 0


def test_shifts_are_uniform_and_every_third():
    frame, drawn = draw({"shift": 0.16})
    shifts = np.array([(found.center - frame.center) / frame.size for found in drawn])
    moved = shifts[np.abs(shifts).max(1) > 0]
    assert abs(len(moved) / len(drawn) - 0.3) < 0.03
    assert 0.155 < np.abs(moved).max() <= 0.16
    np.testing.assert_allclose(moved.mean(0), 0, atol=0.015)
    np.testing.assert_allclose(moved.std(0), 0.16 / np.sqrt(3), rtol=0.05)


def test_scales_are_a_clipped_normal_distribution():
    frame, drawn = draw({"scale": 0.5})
    scales = np.array([found.size / frame.size for found in drawn])
    np.testing.assert_allclose(scales[:, 0], scales[:, 1])
    assert abs(np.median(scales) - 1) < 0.03
    for limit in (0.5, 1.5):  # 15.9 % of a normal distribution are beyond a standard deviation
        assert abs(np.isclose(scales[:, 0], limit).mean() - 0.159) < 0.02


def test_rotations_are_a_clipped_normal_distribution_of_some():
    _, drawn = draw({"rotation": 40.0})
    rotations = np.array([found.rotation for found in drawn])
    turned = rotations[rotations != 0]
    assert abs(len(turned) / len(drawn) - 0.6) < 0.03
    assert np.abs(turned).max() == 80
    assert abs((np.abs(turned) == 80).mean() - 0.0455) < 0.012
    assert abs((np.abs(turned) < 40).mean() - 0.683) < 0.03


def test_half_bodies_frame_the_keypoints_of_a_half():
    person, frame = a_person()
    _, drawn = draw({"half_body": 0.3})
    seen = person.keypoints[:, 2] > 0
    counts = []
    for half in (np.arange(133) < 11, np.arange(133) >= 11):
        points = person.keypoints[half & seen, :2]
        width, height = np.ptp(points, axis=0)
        size = 1.5 * np.array([max(width, 0.75 * height), max(height, width / 0.75)])
        counts.append(sum(
            np.allclose(found.center, points.mean(0)) and np.allclose(found.size, size)
            for found in drawn
        ))  # fmt: skip
    kept = sum(np.array_equal(found.center, frame.center) for found in drawn)
    assert sum(counts) + kept == len(drawn)
    assert abs(kept / len(drawn) - 0.7) < 0.03
    assert abs(counts[0] / sum(counts) - 0.691) < 0.04


def test_half_bodies_need_more_than_eight_keypoints():
    person, frame = a_person(count=8)
    _, drawn = draw({"half_body": 1.0}, 50, (person, frame))
    assert all(np.array_equal(found.center, frame.center) for found in drawn)
    person, frame = a_person(count=9)
    _, drawn = draw({"half_body": 1.0}, 50, (person, frame))
    assert not any(np.array_equal(found.center, frame.center) for found in drawn)


def test_a_half_with_two_keypoints_is_not_taken():
    person, frame = a_person()
    person.keypoints[2:11] = 0  # two of the upper half are left
    _, drawn = draw({"half_body": 1.0}, 50, (person, frame))
    expected = person.keypoints[11:, :2].mean(0)
    assert all(np.allclose(found.center, expected) for found in drawn)


def test_a_half_without_extent_leaves_the_frame():
    person, frame = a_person()
    person.keypoints[:, :2] = 50
    _, drawn = draw({"half_body": 1.0}, 20, (person, frame))
    assert all(np.array_equal(found.size, frame.size) for found in drawn)
