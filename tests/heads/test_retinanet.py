"""RetinaNet against mmdetection's head: maps, detections, losses, and gradients of the maps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from detectors import golden, maps_of, params_of
from flax import linen as nn

from tokenvit_jax.heads import RetinaNet, Targets
from tokenvit_jax.heads.detection import focal_sums, l1_sums
from tokenvit_jax.heads.retinanet import best_pairs

STRIDES = (8, 16, 32)  # of the maps that the pyramid reads
SETTINGS = {"channels": 16, "num_candidates": 60, "max_detections": 20}


def test_maps_equal_mmdetections():
    """The logits of a cell are anchor by anchor, and class by class for each."""
    arrays, head = golden("retinanet"), RetinaNet(5, **SETTINGS)
    maps = maps_of(arrays, "head/in/p")
    predict = jax.jit(lambda params, maps: head.apply({"params": params}, maps, method="predict"))
    for kind, found in zip(("cls", "reg"), predict(params_of(arrays), maps), strict=True):
        expected = maps_of(arrays, f"head/out/{kind}")
        assert len(found) == len(expected) == 4
        for level, wanted in zip(found, expected, strict=True):
            np.testing.assert_allclose(level, wanted.reshape(level.shape), atol=1e-5)


def test_detections_equal_mmdetections():
    arrays, head = golden("retinanet"), RetinaNet(5, **SETTINGS)

    @jax.jit
    def detect(params, levels, size):
        return head.apply({"params": params}, levels, STRIDES, size, method="detect")

    size = jnp.asarray(arrays["inference/in/image_shape"], jnp.int32)[None]
    found = detect(params_of(arrays), maps_of(arrays, "inference/in/p"), size)
    assert found.masks is None
    np.testing.assert_array_equal(found.classes[0], arrays["inference/out/labels"])
    np.testing.assert_allclose(found.scores[0], arrays["inference/out/scores"], atol=1e-6)
    np.testing.assert_allclose(found.boxes[0], arrays["inference/out/boxes_unscaled"], atol=1e-4)


@pytest.mark.parametrize("shape", [(40, 5), (3, 5), (40, 1)])
def test_best_pairs_equal_a_selection_among_all(shape):
    """With many equal logits, and with fewer pairs than asked for."""
    logits = np.random.default_rng(0).integers(-2, 6, shape).astype(np.float32)
    logits[1], logits[2] = 50, 40  # both have the probability 1
    order = np.argsort(-np.asarray(nn.sigmoid(logits)).ravel(), kind="stable")[:24]
    rows, columns, scores = best_pairs(jnp.asarray(logits), 24)
    np.testing.assert_array_equal(rows * shape[1] + columns, order)
    np.testing.assert_array_equal(scores, nn.sigmoid(logits).ravel()[order])


def targets_of(arrays, num=8):
    """Returns the objects of the two images of mmdetection's losses, padded to ``num``."""
    boxes, classes = np.zeros((2, num, 4), np.float32), np.full((2, num), -1, np.int32)
    for i in range(2):
        count = len(arrays[f"loss/in/{i}/labels"])
        boxes[i, :count], classes[i, :count] = (
            arrays[f"loss/in/{i}/{name}"] for name in ("boxes", "labels")
        )
    sizes = np.stack([arrays[f"loss/in/{i}/image_shape"] for i in range(2)]).astype(np.int32)
    return Targets(sizes, boxes, classes)


def test_losses_and_gradients_equal_mmdetections():
    arrays, head = golden("retinanet"), RetinaNet(5, **SETTINGS)
    params, targets = params_of(arrays), targets_of(arrays)

    @jax.jit
    def differentiate(levels):
        def total(levels):
            losses = head.apply({"params": params}, levels, STRIDES, targets, method="level_losses")
            return sum(jax.tree.leaves(losses))[0], losses

        return jax.value_and_grad(total, has_aux=True)(levels)

    (_, losses), gradients = differentiate(maps_of(arrays, "loss/in/p"))
    for ours, name in (("class", "cls"), ("box", "bbox")):
        assert losses[ours].shape == (1,)  # one group of two images
        expected = arrays[f"loss/out/loss_{name}_per_level"].sum()
        np.testing.assert_allclose(losses[ours][0], expected, atol=2e-6)
    for gradient, expected in zip(gradients, maps_of(arrays, "loss/grad/p"), strict=True):
        np.testing.assert_allclose(gradient[..., ::4], expected, atol=2e-7)


def test_focal_loss_equals_mmdetections():
    arrays = {k: jnp.asarray(x) for k, x in golden("detection_losses").items()}
    labels = arrays["focal/in/labels_K_is_background"]
    classes = jnp.where(labels == 5, -1, labels)[:, None]  # an image of one anchor each

    @jax.jit
    def weighted(logits):
        sums = focal_sums(logits[:, None], classes, jnp.ones_like(classes, bool))
        return (sums * arrays["focal/in/weights"]).sum() / 7, sums

    (loss, sums), gradient = jax.jit(jax.value_and_grad(weighted, has_aux=True))(
        arrays["focal/in/logits"]
    )
    np.testing.assert_allclose(loss, arrays["focal/sum_weighted_over_7"], atol=1e-5)
    np.testing.assert_allclose(sums, arrays["focal/elements"].sum(1), atol=1e-5)
    np.testing.assert_allclose(gradient, arrays["focal/grad"], atol=1e-5)


@pytest.mark.parametrize(
    ("beta", "name"), [(0.0, "l1"), (1.0, "smooth_l1_beta_1"), (1 / 9, "smooth_l1_beta_1_9")]
)
def test_box_loss_equals_mmdetections(beta, name):
    arrays = golden("detection_losses")
    boxes = (arrays["box/in/pred"][:, None], arrays["box/in/target"][:, None])
    for counted in (True, False):  # an image of one anchor each
        found = l1_sums(*boxes, np.full((30, 1), counted), beta)
        expected = arrays[f"box/{name}_elements"].sum(1) * counted
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_first_weights():
    head = RetinaNet(3, channels=64, num_convs=1)
    levels = [jnp.zeros((1, 1, 1, 64))]
    params = jax.jit(lambda: head.init(jax.random.key(0), levels, method="predict"))()["params"]
    np.testing.assert_allclose(params["class_logits"]["bias"], -4.59512, atol=1e-5)
    for name in ("class_convs_0", "box_convs_0", "class_logits", "box_deltas"):
        np.testing.assert_allclose(params[name]["kernel"].std(), 0.01, rtol=0.05)
        assert name == "class_logits" or not params[name]["bias"].any()
