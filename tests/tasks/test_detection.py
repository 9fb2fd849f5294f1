"""Detection: canvases, draws, losses, boxes in pixels of the image, pictures and bad input."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_task import check_config, make_task, open_dataset
from ml_collections import ConfigDict
from PIL import Image
from random_variables import random_variables

from tokenvit_jax.errors import UserError
from tokenvit_jax.heads import Detections
from tokenvit_jax.output import figure_bytes
from tokenvit_jax.tasks import default_config
from tokenvit_jax.tasks.detection import pictures
from tokenvit_jax.training.batches import check_train_batch

LOW, HIGH = 64, 96  # sides of the canvas


def make_config(**entries) -> ConfigDict:
    config = default_config("detection")
    config.dataset, config.image_size, config.data.max_objects = "scene_instances", (LOW, HIGH), 3
    config.augment.flip = 0.0
    for key, value in entries.items():
        if key.endswith("_overrides"):
            config[key] = value
        else:
            config.update_from_flattened_dict({key: value})
    return config


def image_of(size):
    """Returns an image of a size (width, height)."""
    pixels = np.random.default_rng(0).integers(256, size=(*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# ------------------------------------------------------------------------------------------------
# Images on canvases
# ------------------------------------------------------------------------------------------------


def test_a_detector_without_masks_reads_none():
    task = make_task(make_config(head="retinanet"))
    assert "masks" not in task.examples(train=True).specs
    assert task.score({"eval/box_ap": 0.25}) == 0.25
    assert make_task(make_config()).score({"eval/box_ap": 0.25, "eval/mask_ap": 0.5}) == 0.5


def test_evaluation_batches_hold_one_orientation(monkeypatch):
    task, examples = make_task(make_config()), make_task(make_config()).examples(train=False)
    sizes = [(40, 80), (80, 40), (64, 64), (40, 80), (50, 60)]  # three are upright
    found = [
        {**examples({"image": image_of(size)}, None), "mask": np.float32(1), "index": np.int32(i)}
        for i, size in enumerate(sizes)
    ]
    batches = [
        {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        for rows in (found[:2], found[2:4], [found[4], {**found[0], "mask": np.float32(0)}])
    ]
    seen = []
    for batch in task.grouped(batches):
        upright = batch["image"].shape[1:3] == (HIGH, LOW)
        assert upright or batch["image"].shape[1:3] == (LOW, HIGH)
        for i in np.flatnonzero(batch["mask"]):
            width, height = sizes[batch["index"][i]]
            assert upright == (height > width)
            size = tuple(batch["image_size"][i])
            whole = found[batch["index"][i]]["image"]
            np.testing.assert_array_equal(
                batch["image"][i][: size[0], : size[1]], whole[: size[0], : size[1]]
            )
            seen.append(int(batch["index"][i]))
    assert sorted(seen) == list(range(5))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert task.grouped(batches) is batches  # processes need equal shapes


def test_features_see_the_whole_image_on_the_canvas():
    task = make_task(make_config())
    image = image_of((40, 80))
    view = task.view(image)
    assert view.shape == (LOW, HIGH, 3)
    expected = image.resize((32, 64), Image.Resampling.BILINEAR)
    assert abs(view[:, :32].astype(int) - np.asarray(expected)).max() <= 1
    assert (view[:, 32:] == [124, 116, 104]).all()


# ------------------------------------------------------------------------------------------------
# The step and the evaluation
# ------------------------------------------------------------------------------------------------


class Stub:
    """A model with given losses and detections."""

    def __init__(self, losses=None, detections=None):
        self._losses, self._detections = losses, detections

    def apply(self, variables, images, train, **kwargs):
        if not train:
            return self._detections
        assert kwargs["targets"].masks is not None and kwargs["keys"].shape == (4,)
        return self._losses, {}


def training_batch(index):
    index = np.asarray(index, np.int32)
    count = len(index)
    return {
        "index": index,
        "image": np.zeros((count, LOW, HIGH, 3), np.uint8),
        "image_size": np.full((count, 2), LOW, np.int32),
        "boxes": np.zeros((count, 3, 4), np.float32),
        "classes": np.full((count, 3), -1, np.int32),
        "masks": np.zeros((count, 3, 112, 14), np.uint8),
        "objects_left_out": np.array([0, 0, 2, 4], np.int32),
    }


def test_classes_of_every_eighth_pixel_are_trained():
    """As in the view: mirrored, and without a class beside it."""
    task = make_task(make_config(head="htc", **{"augment.flip": 1.0}))
    examples, record = task.examples(train=True), open_dataset("scene_instances", "train").read(0)
    found = examples(record, np.random.default_rng(0))
    assert found["image_size"].tolist() == [LOW, LOW]
    expected = np.full((LOW // 8, HIGH // 8), 255)
    expected[:, : LOW // 8] = record["stuff_map"][1::16, 127::-16]
    np.testing.assert_array_equal(found["stuff_map"], expected)
    assert {*np.unique(found["stuff_map"])} > {255}
    assert (examples.empty()["stuff_map"] == 255).all()
    batch = training_batch([0]) | {"stuff_map": found["stuff_map"][None]}
    stuff = jax.jit(task.prepare)(batch, jax.random.key(0))["stuff_map"]
    np.testing.assert_array_equal(stuff[0], np.where(expected == 255, -1, expected))


def test_missing_and_unknown_classes_of_pixels_are_named():
    record = open_dataset("scene_instances", "train").read(0)
    config = make_config(head="htc", head_overrides={"num_stuff": 4})
    examples = make_task(config).examples(train=True)
    rng = np.random.default_rng(0)
    unknown = record["stuff_map"].max()
    message = f"stuff_map has the class {unknown}; valid: 0 to 3, 255 (config.head_overrides.num_"
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        examples(record, rng)
    del record["stuff_map"]
    with pytest.raises(UserError, match=r"^it has no stuff_map, which the head reads: [^\n]*$"):
        examples(record, rng)


def test_draws_depend_on_the_image_and_the_step_and_not_on_the_place():
    prepare = jax.jit(make_task(make_config()).prepare)

    def keys(index, seed):
        return jax.random.key_data(prepare(training_batch(index), jax.random.key(seed))["keys"])

    found, moved, later = keys([7, 3, 9, 4], 0), keys([4, 9, 7, 3], 0), keys([7, 3, 9, 4], 1)
    np.testing.assert_array_equal(found, moved[jnp.array([2, 3, 1, 0])])
    assert len(np.unique(np.concatenate([found, later]), axis=0)) == 8


def training_records(task, count):
    """Returns a training batch of the first records of the dataset."""
    examples, source = task.examples(train=True), open_dataset("scene_instances", "train")
    rows = [
        {**examples(source.read(i), np.random.default_rng(i)), "index": np.int32(i)}
        for i in range(count)
    ]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.slow
def test_losses_of_retinanet_depend_on_groups_alone():
    """Eight images on a device; two micro-batches on each of two devices; images for themselves."""
    config = make_config(head="retinanet", image_size=64, **{"data.max_objects": 5})
    config.model_overrides = {
        "dims": (4, 4, 8, 8), "num_heads": (1, 1, 1, 1), "depths": (0, 0, 1, 0), "mlp_ratio": 1,
        "window_size": 2,
    }  # fmt: skip
    config.head_overrides = {"channels": 4, "num_convs": 1, "init_std": 0.1}
    task = make_task(config)
    model, images = task.make_model(), jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    params = random_variables(model, images)["params"]
    rngs = dict.fromkeys(("dropout", "routing", "sample"), jax.random.key(0))

    def losses(model, batch):
        inputs = task.prepare(batch, jax.random.key(0))
        loss, aux = task.loss(model, params, {}, inputs, rngs)
        return {**aux.metrics, "loss": loss}

    def micro_batches(batch):
        found = jax.lax.map(functools.partial(losses, model), batch)
        return jax.tree.map(lambda x: jax.lax.pmean(x.mean(0), "devices"), found)

    batch = training_records(task, 8)
    expected = jax.jit(functools.partial(losses, model))(batch)
    parts = {name: x.reshape(2, 2, 2, *x.shape[1:]) for name, x in batch.items()}
    found = jax.pmap(micro_batches, "devices", devices=jax.devices()[:2])(parts)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], [value] * 2, rtol=1e-6, err_msg=name)
    assert expected["loss/class"] > 0 and expected["loss/box"] > 0
    # The groups have different counts: with images of their own, the losses are others.
    alone = dataclasses.replace(model.head, loss_group=1)
    other = jax.jit(functools.partial(losses, model.copy(head=alone)))(batch)
    assert abs(other["loss/class"] / expected["loss/class"] - 1) > 1e-3


def test_losses_are_logged_one_by_one():
    losses = {"class": jnp.array([1.0, 3.0]), "box": jnp.array([0.5, 0.0])}
    task = make_task(make_config())
    inputs = task.prepare(training_batch(range(4)), jax.random.key(0))
    rngs = dict.fromkeys(("dropout", "routing", "sample"), jax.random.key(0))
    loss, aux = task.loss(Stub(losses), {}, {}, inputs, rngs)
    assert float(loss) == 2.25
    assert {name: float(value) for name, value in aux.metrics.items()} == {
        "loss/class": 2.0, "loss/box": 0.25, "data/objects_left_out": 1.5
    }  # fmt: skip


def test_boxes_are_evaluated_in_pixels_of_the_original_image():
    """The first image was halved; the second was resized by other factors in rows and columns."""
    boxes = np.array([[[4, 6, 40, 33], [0, 0, 0, 0]], [[10, 10, 20, 20], [0, 0, 1, 1]]], np.float32)
    found = Detections(
        jnp.asarray(boxes), jnp.array([[2, -1], [0, 1]]), jnp.array([[0.9, 0], [0.5, 0.4]])
    )
    batch = {
        "image": np.zeros((2, LOW, LOW, 3), np.uint8),
        "image_size": np.array([[32, 40], [20, 10]], np.int32),
        "original_size": np.array([[64, 80], [21, 30]], np.int32),
        "index": np.array([5, 6]), "mask": np.ones(2, np.float32),
    }  # fmt: skip
    task = make_task(make_config(head="retinanet"))
    outcome = jax.jit(functools.partial(task.evaluate, Stub(detections=found), {}))(batch)
    assert set(outcome.rows) == {
        "boxes", "classes", "scores", "index", "mask", "original_size"
    }  # fmt: skip
    expected = [
        [[8, 12, 80, 64], [0, 0, 0, 0]],  # 33 is beyond the image, which ends at 32
        [[30, 10.5, 30, 21], [0, 0, 3, 1.05]],
    ]
    np.testing.assert_allclose(outcome.rows["boxes"], expected, rtol=1e-6)


# ------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------


def test_a_picture_has_masks_boxes_and_names_of_what_is_likely():
    image = np.full((40, 60, 3), 200, np.uint8)
    mask = np.zeros((40, 60), bool)
    mask[5:25, 10:30] = True
    found = {
        "boxes": np.array([[10, 5, 30, 25], [0, 0, 60, 40]], np.float32),
        "classes": np.array([1, 0]),
        "scores": np.array([0.8, 0.1], np.float32),
        "masks": np.stack([mask, np.ones_like(mask)]),
    }
    drawn = pictures.draw(image, found, ["cat", "dog"], "a $caption")
    (axis,) = drawn["detections"].axes
    (shown,) = axis.get_images()
    shown = np.asarray(shown.get_array())
    assert (shown[~mask] == 200).all() and (shown[mask] != 200).any(-1).all()
    (box,) = axis.patches
    assert box.get_bbox().bounds == (9.5, 4.5, 20, 20)
    assert [text.get_text() for text in axis.texts] == ["dog 0.80"]
    assert figure_bytes(drawn["detections"], "png").startswith(b"\x89PNG")
    assert axis.texts[0].get_va() == "bottom"
    del found["masks"]
    found["scores"] = np.array([0.8, 0.3], np.float32)
    (axis,) = pictures.draw(image, found, ["cat", "dog"], "")["detections"].axes
    # At the upper border, a name is inside; the highest score is drawn last.
    assert [(text.get_text(), text.get_va()) for text in axis.texts] == [
        ("cat 0.30", "top"), ("dog 0.80", "bottom")
    ]  # fmt: skip
    assert (np.asarray(axis.get_images()[0].get_array()) == 200).all()


def test_a_line_counts_what_is_likely():
    names = ["cat", "dog", "bird"]
    scores = np.array([0.9, 0.8, 0.7, 0.2])
    assert pictures.describe(names, np.array([1, 0, 1, 2]), scores) == "2 x dog, 1 x cat"
    nothing = pictures.describe(names, np.array([0]), np.array([0.2]))
    assert nothing == "nothing with a score from 0.3 on"


# ------------------------------------------------------------------------------------------------
# Bad input
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"model": "vit_ti"}, "config.model='vit_ti' is not valid: detectors read the maps of a h"),
        ({"head": "mask_rcn"}, "config.head='mask_rcn' is not valid; valid: mask_rcnn, retinanet"),
        ({"head_overrides": {"score_threshold": 1.5}}, "score_threshold=1.5 is not valid; valid: "),
        ({"head_overrides": {"iou_threshold": -0.1}}, "iou_threshold=-0.1 is not valid; valid: "),
        ({"head_overrides": {"max_detections": 0}}, "max_detections=0 is not valid; valid: "),
        ({"head_overrides": {"num_convs": 4}}, "'num_convs'"),  # of the other head
        ({"data.max_objects": 0}, "config.data.max_objects=0 is not valid; valid: "),
        (
            {"data.long_side": 97},
            "config.data.long_side: 97 pixels do not fit config.image_size=64",
        ),
        ({"augment.short_sides": (48, 65)}, "config.augment.short_sides: 65 pixels do not fit"),
        (
            {"head": "htc", "dataset": "ade20k_instances"},
            "config.dataset='ade20k_instances' has no stuff_map, which config.head='htc' reads; "
            "valid: coco, scene_instances",
        ),
        ({"head": "htc", "head_overrides": {"num_stuff": 0}}, "num_stuff=0 is not valid; valid: "),
        ({"data.eval_short_side": 96}, "config.data.eval_short_side: 96 pixels do not fit"),
    ],
)
def test_wrong_settings_are_named(entries, message):
    config = make_config(**entries)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        check_config(config)
    assert "\n" not in str(error.value)


def test_groups_of_images_stay_on_a_device():
    config = make_config(batch_size=48)
    check_train_batch(make_task(config), 8)
    message = (
        "config.batch_size=48 is not a multiple of 16 devices x 1 accumulate_steps x 2 images of a "
        "group"
    )
    with pytest.raises(UserError, match=f"^{message}$"):
        check_train_batch(make_task(config), 16)
    config.head_overrides = {"loss_group": 3}
    check_train_batch(make_task(config), 16)
