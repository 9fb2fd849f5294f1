"""The embedded scenes with objects."""

from pathlib import Path

import numpy as np
import pytest

from tokenvit_jax.data.datasets import scene_instances
from tokenvit_jax.data.datasets.scenes import ScenesSource
from tokenvit_jax.run_lengths import decode_mask, encode_mask, encode_part

GOLDEN = np.load(Path(__file__).parent / "golden" / "scene_instances.npz")
SIZE = 128, 128


@pytest.mark.parametrize("split", ["train", "test"])
def test_objects_are_those_of_the_reference(split):
    source = scene_instances.SceneInstancesSource(split)
    for index in (0, 1, 2, 7):
        objects = source.read(index)["instances"]
        wanted = {
            name.removeprefix(f"{split}/{index}/"): GOLDEN[name]
            for name in GOLDEN.files
            if name.startswith(f"{split}/{index}/")
        }
        masks = np.stack([decode_mask(counts, SIZE) for counts in objects.masks])
        bits = np.unpackbits(wanted["masks_packed"])[: masks.size].reshape(masks.shape)
        np.testing.assert_array_equal(masks, bits)
        np.testing.assert_array_equal(objects.classes, wanted["labels"])
        np.testing.assert_array_equal(objects.boxes, wanted["boxes_xyxy"])
        np.testing.assert_array_equal(masks.sum((1, 2)), wanted["areas"])
        assert not objects.crowd.any()


def test_objects_make_the_label_map_of_the_scene():
    source, scenes = scene_instances.SceneInstancesSource("test"), ScenesSource("test")
    for index in range(100):
        record, scene = source.read(index), scenes.read(index)
        label_map = np.zeros(SIZE, np.uint8)
        for label, counts in zip(*record["instances"][1::2], strict=True):
            mask = decode_mask(counts, SIZE)
            assert not label_map[mask].any()
            label_map[mask] = label + 1
        np.testing.assert_array_equal(label_map, scene["label_map"])
        np.testing.assert_array_equal(record["image"], scene["image"])
        stuff = record["stuff_map"]
        np.testing.assert_array_equal(stuff < 4, scene["label_map"] > 0)
        np.testing.assert_array_equal(stuff[stuff < 4] + 1, scene["label_map"][stuff < 4])
        assert set(np.unique(stuff[stuff >= 4])) == {4 + source.draw(index).photograph}


def test_annotations_list_every_object():
    found = scene_instances.annotations(None, "test")
    assert [image["id"] for image in found["images"]] == list(range(200))
    assert {entry["category_id"] for entry in found["annotations"]} == {1, 2, 3, 4}
    areas = np.array([entry["area"] for entry in found["annotations"]])
    assert len(areas) == 468 and areas.min() > 250 and areas.max() < 2500


def test_a_part_is_encoded_as_the_whole_mask():
    rng = np.random.default_rng(0)
    for corner, shape in {(0, 0): (9, 13), (4, 0): (9, 5), (3, 2): (5, 6), (7, 3): (6, 6),
                          (5, 5): (0, 3)}.items():  # fmt: skip
        for part in (rng.random(shape) < 0.5, np.ones(shape, bool), np.zeros(shape, bool)):
            mask = np.zeros((9, 13), bool)
            mask[corner[1] : corner[1] + shape[0], corner[0] : corner[0] + shape[1]] = part
            assert encode_part(part, corner, mask.shape) == encode_mask(mask)
