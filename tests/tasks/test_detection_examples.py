"""Examples for detection: canvases, objects and their number."""

import numpy as np
import pytest
from PIL import Image

from tokenvit_jax.data import eval_batches, train_batches
from tokenvit_jax.data.box_transforms import MASK_SIDE
from tokenvit_jax.data.datasets.scene_instances import SceneInstancesSource
from tokenvit_jax.data.instances import instances_of
from tokenvit_jax.data.record import Record
from tokenvit_jax.tasks import default_config
from tokenvit_jax.tasks.detection.examples import NO_OBJECT, DetectionExamples

CANVAS = 48, 80
FILL = 124, 116, 104  # the mean colour of ImageNet, rounded


def make_examples(*, train=True, has_masks=True, **entries):
    config = default_config("detection")
    config.image_size = CANVAS
    config.update_from_flattened_dict(entries)
    return DetectionExamples(config, has_masks=has_masks, train=train)


def make_record(size=(100, 60), count=3, crowd=()):
    """Returns an image with `count` squares; the i-th has sides of 4 + 2 i pixels and class i."""
    masks = np.zeros((count, size[1], size[0]), bool)
    for i, mask in enumerate(masks):
        mask[5 : 9 + 2 * i, 3 * i : 5 * i + 4] = True
    instances = instances_of(masks, range(count))
    instances.crowd[list(crowd)] = True
    return Record(id=0, image=Image.new("RGB", size, (9, 8, 7)), instances=instances)


def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize(("size", "canvas"), [
    ((100, 60), (48, 80)), ((60, 100), (80, 48)), ((50, 50), (48, 80)),
])  # fmt: skip
def test_an_image_lies_at_the_top_left_of_the_canvas_of_its_orientation(size, canvas):
    examples = make_examples(**{"augment.flip": 0.0})
    example = examples(make_record(size), rng())
    assert example["image"].shape == (*canvas, 3) and canvas in examples.canvases
    scale = min(48 / min(size), 80 / max(size))
    height, width = (int(side * scale + 0.5) for side in size[::-1])
    assert example["image_size"].tolist() == [height, width]
    assert (example["image"][:height, :width] == (9, 8, 7)).all()
    assert (example["image"][height:] == FILL).all()
    assert (example["image"][:, width:] == FILL).all()
    boxes = make_record(size)["instances"].boxes * np.tile([width, height], 2) / np.tile(size, 2)
    np.testing.assert_allclose(example["boxes"][:3], boxes, rtol=1e-6)
    assert example["classes"].tolist() == [0, 1, 2] + [NO_OBJECT] * 97
    assert np.unpackbits(example["masks"][:3]).all()  # squares fill their boxes
    assert not example["boxes"][3:].any() and not example["masks"][3:].any()


def test_the_largest_objects_are_kept_in_order_and_the_others_counted():
    examples = make_examples(**{"data.max_objects": 3})
    example = examples(make_record(count=7, crowd=(5,)), rng())
    assert example["classes"].tolist() == [3, 4, 6]  # 5 is a crowd, which is background
    assert example["objects_left_out"] == 3
    assert example["objects_left_out"].dtype == np.int32


@pytest.mark.parametrize("has_masks", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_examples_have_the_specs_that_they_declare(train, has_masks):
    examples = make_examples(train=train, has_masks=has_masks)
    for example in (examples(make_record(), rng() if train else None), examples.empty()):
        assert example.keys() == examples.specs.keys()
        for name, spec in examples.specs.items():
            assert example[name].shape == spec.shape and example[name].dtype == spec.dtype, name
    assert ("masks" in examples.specs) == (train and has_masks)
    assert not make_examples(image_size=64).canvases  # both orientations have the same


def test_images_without_objects_are_examples_too():
    for record in (make_record(count=0), make_record(count=1, crowd=(0,))):
        example = make_examples()(record, rng())
        assert (example["classes"] == NO_OBJECT).all() and example["objects_left_out"] == 0


def test_objects_outside_of_a_crop_are_not_left_out():
    examples = make_examples(image_size=(480, 800), **{"augment.detr_crop": True})
    record, generator, lost = make_record((640, 480)), rng(), 0
    for _ in range(40):
        example = examples(record, generator)
        found = example["classes"] >= 0
        lost += 3 - found.sum()
        assert example["objects_left_out"] == 0
        sides = example["boxes"][found][:, 2:] - example["boxes"][found][:, :2]
        assert (sides > 0).all()
    assert lost > 0


def test_evaluation_has_a_buffer_for_both_orientations():
    examples = make_examples(train=False)
    for size in ((100, 60), (60, 100)):
        example = examples(make_record(size), None)
        assert example["image"].shape == (80, 80, 3)
        assert example["original_size"].tolist() == [*size[::-1]]
        assert max(example["image_size"]) == 80 and min(example["image_size"]) == 48


def test_batches_of_scenes_hold_their_objects():
    config = default_config("detection")
    config.image_size, config.batch_size, config.data.eval_batch_size = (96, 128), 4, 4
    source = SceneInstancesSource("train")
    data = train_batches(source, make_examples(image_size=(96, 128)), config)
    batch = next(iter(data))
    data.close()
    assert (
        batch["image"].shape == (4, 96, 128, 3) and batch["image_size"].tolist() == [[96, 96]] * 4
    )
    for i, index in enumerate(batch["index"]):
        objects = source.read(index)["instances"]
        found = batch["classes"][i] >= 0
        assert batch["classes"][i][found].tolist() == objects.classes.tolist()
        areas = [(box[2:] - box[:2]).prod() * 0.75**2 for box in objects.boxes]
        boxes = batch["boxes"][i][found]
        np.testing.assert_allclose((boxes[:, 2:] - boxes[:, :2]).prod(1), areas, rtol=1e-5)
        filled = np.unpackbits(batch["masks"][i][found], axis=2).mean((1, 2))
        assert (filled > 0.1).all() and (filled < 0.9).all()
    assert batch["masks"].shape == (4, 100, MASK_SIDE, MASK_SIDE // 8)
    data = eval_batches(SceneInstancesSource("test"), make_examples(train=False), config)
    batch = next(iter(data))
    data.close()
    assert batch["original_size"].tolist() == [[128, 128]] * 4


def test_large_scale_jitter():
    """Factors of the size at which an image just fits; larger images are cropped to the canvas."""
    whole = 80 / 100  # 48 pixels high
    for factors, found in (((0.5, 0.5), (24, 40)), ((1.0, 1.0), (48, 80)), ((2.0, 2.0), CANVAS)):
        examples = make_examples(**{"augment.jitter": factors})
        example = examples(make_record(), rng())
        assert tuple(example["image_size"]) == found
        assert (example["image"][found[0] :] == FILL).all()
        sides = (example["boxes"][:, 2:] - example["boxes"][:, :2])[example["classes"] >= 0]
        assert len(sides) and (sides <= np.array([8, 8]) * whole * factors[0] + 1e-4).all()


def test_classes_of_pixels_on_an_upright_canvas():
    config = default_config("detection")
    config.image_size = CANVAS
    examples = DetectionExamples(config, has_masks=True, train=True, num_stuff=3)
    record = make_record((60, 100)) | {"stuff_map": np.full((100, 60), 2, np.uint8)}
    found = examples(record, rng())
    assert found["image"].shape == (80, 48, 3) and found["stuff_map"].shape == (10, 6)
    assert examples.specs["stuff_map"].shape == (6, 10) and (found["stuff_map"] == 2).all()
