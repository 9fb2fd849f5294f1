"""Panoptic label maps: COCO's format both ways, and segments from masks and label maps."""

import io

import numpy as np
import pytest
from PIL import Image

from tokenvit_jax.data.record import Record, Segments
from tokenvit_jax.data.segments import (
    class_segments,
    decode_ids,
    encode_ids,
    label_map_of,
    panoptic_annotations,
    read_segments,
    segment_entries,
    segments_of,
    thing_instances,
)
from tokenvit_jax.errors import UserError
from tokenvit_jax.run_lengths import decode_mask


def png(array, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


def test_a_pixel_holds_24_bits_of_an_identifier():
    ids = np.array([[0, 1, 255, 256], [65_535, 65_536, 3 + 256 * 5 + 65_536 * 7, 2**24 - 1]])
    content = encode_ids(ids)
    pixels = np.asarray(Image.open(io.BytesIO(content)))
    assert pixels[1, 2].tolist() == [3, 5, 7] and pixels[0, 3].tolist() == [0, 1, 0]
    found = decode_ids(content, (4, 2))
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, ids)


@pytest.mark.parametrize("wrong", [-1, 2**24])
def test_other_identifiers_are_refused(wrong):
    with pytest.raises(ValueError, match=rf"ids are from .*{wrong}.*; valid: 0 to 16,777,215"):
        encode_ids(np.array([[0, wrong]]))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"no image", "cannot decode 8 bytes as a PNG of segments: no known format"),
        (png(np.zeros((2, 4), np.uint8)), "PNG of segments has mode L; valid: RGB, three bytes"),
        (png(np.zeros((2, 4, 3), np.uint8), "JPEG"), "PNG of segments is a JPEG, which changes"),
        (png(np.zeros((2, 5, 3), np.uint8)), "has 5 x 2 pixels, its image 4 x 2 (width x height)"),
    ],
)
def test_files_that_hold_no_identifiers(content, message):
    with pytest.raises(UserError) as error:
        decode_ids(content, (4, 2))
    assert message in str(error.value)


def some_segments():
    ids = np.zeros((4, 6), np.int32)
    ids[:2], ids[2:, :3] = 70_000, 9
    return Segments(
        ids=ids,
        numbers=np.array([9, 70_000, 11], np.int32),
        classes=np.array([2, 0, 0], np.int32),
        crowd=np.array([False, True, False]),
        areas=np.array([6, 14, 3]),
    )


def assert_equal(found, wanted):
    for name, a, b in zip(Segments._fields, found, wanted, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


def test_entries_are_read_back():
    segments = some_segments()
    entries = segment_entries(segments)
    assert entries[1] == {"id": 70_000, "category_id": 1, "area": 14, "iscrowd": 1}
    assert_equal(read_segments(segments.ids, entries), segments)
    none = Segments(np.zeros((2, 2), np.int32), *(array[:0] for array in segments[1:]))
    assert_equal(read_segments(none.ids, segment_entries(none)), none)


def test_annotations_have_the_format_of_coco():
    found = panoptic_annotations([(7, some_segments())], ["cat", "dog", "sky"], {0, 1})
    assert found["images"] == [{"id": 7, "height": 4, "width": 6, "file_name": "7.png"}]
    assert [category["isthing"] for category in found["categories"]] == [1, 1, 0]
    assert found["annotations"] == [
        {"image_id": 7, "file_name": "7.png", "segments_info": segment_entries(some_segments())}
    ]


def test_segments_of_masks_and_of_label_maps():
    masks = [np.eye(3, dtype=bool), ~np.eye(3, dtype=bool)]
    found = segments_of(masks, [4, 2])
    assert found.classes.tolist() == [4, 2] and found.areas.tolist() == [3, 6]
    for number, mask in zip(found.numbers, masks, strict=True):
        np.testing.assert_array_equal(found.ids == number, mask)

    label_map = np.array([[0, 0, 149], [255, 255, 3]], np.uint8)
    found = class_segments(label_map)
    assert found.classes.tolist() == [0, 3, 149] and found.areas.tolist() == [2, 1, 1]
    for number, label in zip(found.numbers, found.classes, strict=True):
        np.testing.assert_array_equal(found.ids == number, label_map == label)
    np.testing.assert_array_equal(found.ids == 0, label_map == 255)
    void = class_segments(np.full((2, 2), 255, np.uint8))
    assert not len(void.classes)
    for wanted in (label_map, np.full((2, 2), 255, np.uint8)):
        back = label_map_of(Record(segments=class_segments(wanted)))
        np.testing.assert_array_equal(back, wanted)


def test_things_become_objects():
    segments = some_segments()
    found = thing_instances(segments, {0})  # segment 11 has no pixels, 9 is stuff
    assert found.classes.tolist() == [0] and found.crowd.tolist() == [True]
    assert found.boxes.tolist() == [[0, 0, 6, 2]]
    np.testing.assert_array_equal(decode_mask(found.masks[0], (4, 6)), segments.ids == 70_000)
    assert thing_instances(segments, {5}).boxes.shape == (0, 4)
