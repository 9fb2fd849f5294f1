"""Several views of an image in the evaluation of detectors."""

import functools
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_task import check_config, make_task
from PIL import Image

from tokenvit_jax.errors import UserError
from tokenvit_jax.heads import Detections, Htc
from tokenvit_jax.heads.two_stage import Candidates
from tokenvit_jax.models.backbone import variable_shapes
from tokenvit_jax.tasks import default_config
from tokenvit_jax.tasks.detection import views
from tokenvit_jax.tasks.detection.model import Detector

GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "detection_views.npz"))
NUM = 4  # views of the arrays
near = np.testing.assert_allclose


def make_config(**entries):
    config = default_config("detection")
    config.dataset, config.image_size = "scene_instances", (64, 96)
    config.update_from_flattened_dict(entries)
    return config


SEVERAL = {
    "inference.short_sides": (40, 64), "inference.long_side": 100, "inference.flip": True,
    "inference.min_sides": (32, 0), "inference.max_sides": (0, 96),
}  # fmt: skip


def test_boxes_of_views_and_their_suppression_equal_mmdetections():
    original = GOLDEN["in/original_shape"][None]
    parts = []
    for i in range(NUM):
        *size, flip = GOLDEN[f"in/view{i}/shape_flip"].tolist()
        sizes, boxes = np.array([size]), GOLDEN[f"in/view{i}/boxes"][None]
        move = jax.jit(functools.partial(views.to_original, mirrored=bool(flip)))
        found = move(boxes, sizes, original)
        near(found[0], GOLDEN[f"out/view{i}/boxes_original"], atol=5e-5)
        near(views.to_view(found, sizes, original, bool(flip)), boxes, atol=5e-5)
        scores = GOLDEN[f"in/view{i}/probabilities"][None, :, :-1]
        parts.append(Candidates(found[:, :, None], jnp.asarray(scores)))
    head = Htc(5, max_detections=20)
    found = jax.jit(lambda parts: head.select(views.joined(parts)))(parts)
    np.testing.assert_array_equal(found.classes[0], GOLDEN["out/labels"])
    near(found.boxes[0], GOLDEN["out/boxes_scores"][:, :4], atol=5e-5)
    near(found.scores[0], GOLDEN["out/boxes_scores"][:, 4], atol=2e-5)


def test_images_are_mirrored_within_their_size():
    rng = np.random.default_rng(0)
    images, sizes = rng.random((2, 5, 7, 3)), np.array([[5, 7], [4, 3]])
    found = jax.jit(views.mirror)(images, sizes)
    near(found[0], images[0, :, ::-1])
    near(found[1, :, :3], images[1, :, 2::-1])
    near(found[1, :, 3:], images[1, :, 3:])


def test_views_contribute_boxes_within_their_limits():
    sides = np.array([9.9, 10.0, 19.9, 20.0])
    boxes = np.stack([0 * sides, 0 * sides, sides, sides], -1)[None, :, None]
    candidates = Candidates(jnp.asarray(boxes), jnp.ones((1, 4, 2)))
    found = jax.jit(lambda x: views.limited(x, (10.0, 20.0)))(candidates)
    assert found.scores[0].tolist() == [[-1, -1], [1, 1], [1, 1], [-1, -1]]
    assert (views.limited(candidates, (0.0, np.inf)).scores == 1).all()


def test_an_example_has_every_view():
    config = make_config(**SEVERAL)
    found = views.eval_views(config)
    assert [view.name for view in found] == ["image", "image_1"]
    assert [view.limits for view in found] == [(32, np.inf), (0, 96)]
    task = make_task(config)
    examples = task.examples(train=False)
    pixels = np.random.default_rng(0).integers(256, size=(200, 100, 3), dtype=np.uint8)
    example = examples({"image": Image.fromarray(pixels)}, None)
    assert {name: x.shape for name, x in example.items()} == {
        "image": (128, 128, 3), "image_size": (2,), "image_1": (128, 128, 3),
        "image_1_size": (2,), "original_size": (2,),
    }  # fmt: skip
    assert example["image_size"].tolist() == [80, 40]
    assert example["image_1_size"].tolist() == [100, 50]  # the longer side ends it
    assert {name: x.shape for name, x in examples.empty().items()} == {
        name: x.shape for name, x in example.items()
    }
    batch = {name: x[None] for name, x in example.items()} | {"mask": np.ones(1)}
    (cut,) = task.grouped([batch])
    assert cut["image"].shape == (1, 128, 64, 3) and cut["image_1"].shape == (1, 128, 64, 3)
    near(cut["image_1"][0, :100, :50], example["image_1"][:100, :50])


class Head:
    """Finds one box per view, at a place that depends on the first pixel, and a mask."""

    def neck(self, maps):
        return maps

    def pyramid(self, levels, strides):
        return levels

    def candidates(self, levels, size):
        x = levels[0][:, 0, 0, 0]
        zero = jnp.zeros_like(x)
        boxes = jnp.stack([x, zero, x + 4, zero + 4], -1)[:, None, None]
        return Candidates(boxes, jnp.full((len(x), 1, 1), 0.5))

    def select(self, candidates):
        boxes = candidates.boxes[:, :, 0]
        self.found = candidates
        shape = boxes.shape[:2]
        return Detections(boxes, jnp.zeros(shape, int), candidates.scores[..., 0])

    def mask_probabilities(self, levels, boxes, classes):
        """Returns the left end of the boxes in the first column, and 0 elsewhere."""
        mask = jnp.zeros((*boxes.shape[:2], 2, 3))
        return mask.at[..., 0].set(boxes[..., :1])


def test_boxes_and_masks_of_mirrored_views():
    """The image in the canvas is 8 pixels wide, and 16 in the original."""
    head = Head()
    model = SimpleNamespace(head=head, head_inputs=lambda x, train: ([x], (4, 8, 16, 32)))
    image = np.zeros((1, 8, 12, 1), np.float32)
    image[0, 0, 0], image[0, 0, 7] = 1.0, 3.0  # places of the box, plain and mirrored
    size, original = np.array([[8, 8]]), np.array([[16, 16]])
    found = Detector.detect_views(
        model, [jnp.asarray(image)], [size], original, [(0.0, np.inf)], True
    )
    near(found.boxes[0], [[2, 0, 10, 8], [2, 0, 10, 8]])  # 8 - (3 + 4) = 1, too
    # The plain view writes 1 into the first column, the mirrored one 3 into the last.
    near(found.masks[0], np.tile([0.5, 0.0, 1.5], (2, 2, 1)))
    assert head.found.scores.shape == (1, 2, 1)
    few = Detector.detect_views(
        model, [jnp.asarray(image)], [size], original, [(9.0, np.inf)], False
    )
    assert few.scores.tolist() == [[-1.0]] and few.masks.shape == (1, 1, 2, 3)


@pytest.mark.slow
def test_shapes_of_two_mirrored_views_of_the_cascade():
    config = make_config(head="htc", **SEVERAL)
    config.model_overrides = {"depths": (0, 0, 1, 0), "dims": (8, 8, 8, 8), "num_heads": (1,) * 4}
    config.head_overrides = {
        "channels": 4, "num_candidates": 9, "num_proposals": 8, "num_box_convs": 1,
        "num_mask_convs": 1, "max_detections": 7, "global_head_dim": 4,
    }  # fmt: skip
    task = make_task(config)
    model, examples = task.make_model(), task.examples(train=False)
    variables = variable_shapes(model, jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32))
    batch = {
        name: jax.ShapeDtypeStruct((2, *spec.shape), spec.dtype)
        for name, spec in examples.specs.items()
    } | {name: jax.ShapeDtypeStruct((2,), np.float32) for name in ("index", "mask")}
    rows = jax.eval_shape(functools.partial(task.evaluate, model), variables, batch).rows
    assert rows["boxes"].shape == (2, 7, 4) and rows["masks"].shape == (2, 7, 28, 28)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {"inference.short_sides": (40, 64), "inference.min_sides": (1,)},
            "config.inference.min_sides has 1 numbers; valid: one for each of the 2 config.infer",
        ),
        (
            {"inference.flip": True, "head": "retinanet"},
            "config.inference.flip=True: the head retinanet has one view only; valid with it: "
            "mask_rcnn, htc",
        ),
        ({"inference.short_sides": (0,)}, "config.inference.short_sides=(0,) is not valid; valid"),
        ({"inference.min_sides": (3,)}, "config.inference.min_sides"),
    ],
)
def test_wrong_views_are_named(entries, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        check_config(make_config(**entries))
    assert "\n" not in str(error.value)
