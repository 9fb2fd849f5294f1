"""The work of a dense task that the benchmark times."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_masks
import tiny_pose

from tokenvit_jax.measure import models
from tokenvit_jax.models.backbone import variable_shapes
from tokenvit_jax.tasks import create_task, default_config
from tokenvit_jax.training.task_speed import random_batch, task_kind

SIZE = (32, 64)


def recipe(name):
    """A model of one narrow block with a linear head."""
    config = default_config("segmentation")
    config.model, config.head = name, "linear"
    config.model_overrides = {
        "dim": 8, "depth": 1, "num_heads": 1, "position_size": (32, 32), "remat": False,
    }  # fmt: skip
    config.dataset = "scenes"
    return config


@pytest.fixture(scope="module")
def kind():
    return task_kind(recipe)


def test_training_step_has_the_loss_of_the_recipe(kind):
    model, work_of = kind.subject("vit_ti", dtype=jnp.dtype("float32"))
    images, targets, loss = work_of(SIZE, 2)
    assert images.shape == (2, *SIZE, 3) and targets["label"].shape == (2, *SIZE)
    assert abs(float(images.mean())) < 0.5  # normalised
    variables = jax.jit(lambda x: model.init(jax.random.key(0), x, train=False))(images[:1])
    step = jax.jit(models.train_step_of(model, loss))
    after, found = step(variables, images, targets)
    logits = model.apply(variables, images, train=True).astype(jnp.float32)
    log_probs = jax.nn.log_softmax(logits)
    own = jnp.take_along_axis(log_probs, targets["label"][..., None].astype(int), -1)
    assert float(found) == pytest.approx(-float(own.mean()), rel=1e-4)
    _, again = step(after, images, targets)
    assert float(again) < float(found)


def test_random_batch_has_the_arrays_of_the_task():
    config = recipe("vit_ti")
    config.image_size = SIZE
    batch = random_batch(create_task(config), 3)
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
        "image": ((3, *SIZE, 3), np.uint8), "label": ((3, *SIZE), np.uint8)
    }  # fmt: skip
    classes = create_task(config).info.num_classes
    assert np.unique(batch["label"]).tolist() == list(range(classes))
    assert batch["image"].max() > 250
    depth = default_config("depth")
    depth.dataset = "depth_scenes"
    depths = random_batch(create_task(depth), 2)["depth"]
    assert depths.dtype == np.float32 and 1 <= depths.min() < depths.max() <= 2


def test_settings_of_a_variant_reach_the_model(kind):
    assert kind.model("vit_ti", depth=2).backbone.settings.depth == 2
    assert kind.model("vit_ti").backbone.settings.depth == 1


def test_random_objects():
    config = default_config("detection")
    config.dataset, config.model, config.head = "scene_instances", "swin_t", "mask_rcnn"
    config.image_size, config.data.max_objects = SIZE, 20
    task = create_task(config)
    batch = random_batch(task, 2)
    shapes = jax.eval_shape(task.prepare, batch, jax.random.key(0))
    assert shapes["image"].shape == (2, *SIZE, 3) and shapes["keys"].shape == (2,)
    np.testing.assert_array_equal(batch["image_size"], [SIZE] * 2)
    boxes, objects = batch["boxes"], batch["classes"] >= 0
    np.testing.assert_array_equal(objects.sum(1), [8, 8])
    sides = boxes[..., 2:] - boxes[..., :2]
    assert (sides[objects] >= 0.09 * min(SIZE)).all() and (boxes[objects] <= max(SIZE)).all()


def test_random_segments():
    """Every image has eight stripes, and the training step takes them."""
    config = tiny_masks.get_config("semantic")
    config.image_size, config.data.max_segments = SIZE, 20
    config.head_overrides.num_queries = 20
    batch = random_batch(create_task(config), 2)
    np.testing.assert_array_equal(np.unique(batch["segments"]), range(1, 9))
    np.testing.assert_array_equal((batch["classes"] >= 0).sum(1), [8, 8])
    model, work_of = task_kind(lambda name: config).subject("swin_t", dtype=jnp.dtype("float32"))
    images, targets, loss = work_of(SIZE, 2)
    variables = variable_shapes(model, images)
    after, found = jax.eval_shape(models.train_step_of(model, loss), variables, images, targets)
    assert found.shape == () and jax.tree.structure(after) == jax.tree.structure(variables)


def test_random_keypoints():
    """All keypoints are labelled and lie in the crop, and the training step takes them."""
    config = tiny_pose.get_config("deconvolution")
    config.image_size = SIZE
    keypoints = random_batch(create_task(config), 2)["keypoints"]
    assert keypoints.shape == (2, 133, 3) and (keypoints[..., 2] > 0).all()
    assert (keypoints >= 1).all() and (keypoints <= 2).all()
    model, work_of = task_kind(lambda name: config).subject("swin_t", dtype=jnp.dtype("float32"))
    images, targets, loss = work_of(SIZE, 2)
    variables = variable_shapes(model, images)
    after, found = jax.eval_shape(models.train_step_of(model, loss), variables, images, targets)
    assert found.shape == () and jax.tree.structure(after) == jax.tree.structure(variables)
