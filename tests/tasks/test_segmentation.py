"""Segmenter: logits of pixels, windows, loss and the confusion matrix."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_task import make_task
from ml_collections import ConfigDict
from random_variables import random_variables

from tokenvit_jax.data import IGNORED
from tokenvit_jax.errors import UserError
from tokenvit_jax.heads import MaskTransformer
from tokenvit_jax.metrics.confusion import ConfusionMeter
from tokenvit_jax.ops.resize import resize_rows
from tokenvit_jax.tasks import Outcome, Segmentation, default_config
from tokenvit_jax.tasks.segmentation.inference import predict_logits
from tokenvit_jax.tasks.segmentation.losses import pixel_cross_entropy
from tokenvit_jax.tasks.segmentation.sliding_window import sliding_logits
from tokenvit_jax.training.batches import check_train_batch
from tokenvit_jax.training.validate import check_task

K = 3
RNG = np.random.default_rng(0)


def config(**overrides):
    config = default_config("segmentation")
    config.dataset = "scenes"
    config.model = "vit_ti"
    config.model_overrides = {
        "dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8, "position_size": (32, 48)
    }  # fmt: skip
    config.head_overrides = {"depth": 1, "head_dim": 8}
    config.image_size = 32
    config.update_from_flattened_dict(overrides)
    return config


@functools.cache
def model_and_variables():
    model = make_task(config(), K).make_model()
    return model, random_variables(model, jnp.zeros((1, 32, 48, 3)))


# ------------------------------------------------------------------------------------------------
# Model
# ------------------------------------------------------------------------------------------------


def naive_mask_transformer(x, params, head_dim):
    """Computes the mask transformer in float64 for one image: (n, C) -> (n, K)."""

    def linear(x, p):
        return x @ p["kernel"] + p.get("bias", 0)

    def norm(x, p):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]

    def attention(x, p):
        q, k, v = np.split(linear(x, p["qkv"]), 3, -1)
        heads = []
        for at in range(0, x.shape[-1], head_dim):
            here = slice(at, at + head_dim)
            logits = q[:, here] @ k[:, here].T / np.sqrt(head_dim)
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, here])
        return linear(np.concatenate(heads, -1), p["proj"])

    def mlp(x, p):
        x = linear(x, p["fc1"])
        erf = np.vectorize(__import__("math").erf)
        return linear(x * 0.5 * (1 + erf(x / np.sqrt(2))), p["fc2"])

    n = len(x)
    x = np.concatenate([linear(x, params["embedding"]), params["class_token"]])
    x = x + attention(norm(x, params["norm1_0"]), params["attention_0"])
    x = x + mlp(norm(x, params["norm2_0"]), params["mlp_0"])
    x = norm(x, params["norm"])
    patches = linear(x[:n], params["patch_projection"])
    classes = linear(x[n:], params["class_projection"])
    patches /= np.linalg.norm(patches, axis=-1, keepdims=True)
    classes /= np.linalg.norm(classes, axis=-1, keepdims=True)
    return norm(patches @ classes.T, params["mask_norm"])


def test_mask_transformer_equals_its_equations():
    head = MaskTransformer(num_classes=K, depth=1, head_dim=8)
    tokens = RNG.normal(size=(2, 6, 16)).astype(np.float32)
    _, variables = model_and_variables()
    params = variables["params"]["head"]
    found = head.apply({"params": params}, tokens, train=False)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    for image, logits in zip(tokens, found, strict=True):
        expected = naive_mask_transformer(image.astype(np.float64), params, 8)
        np.testing.assert_allclose(logits, expected, atol=2e-4)


def test_logits_of_pixels_are_between_those_of_patches():
    model, variables = model_and_variables()
    images = RNG.normal(size=(1, 32, 42, 3)).astype(np.float32)  # 6 of 8 columns are missing
    logits = jax.jit(functools.partial(model.apply, train=False))(variables, images)
    assert logits.shape == (1, 32, 42, K) and logits.dtype == jnp.float32

    def of_patches(model, images):
        tokens, restore = model.backbone.encode(images, False)
        return restore(model.head(tokens, train=False))

    patches = model.apply(variables, images, method=of_patches)
    assert patches.shape == (1, 4, 6, K)
    # Pixel 12 is 1 / 16 of a patch beyond the centre of patch 1: (12 + 1/2) / 8 - 1/2.
    row = 15 / 16 * patches[0, 1] + 1 / 16 * patches[0, 2]
    np.testing.assert_allclose(
        logits[0, 12, 20], 15 / 16 * row[2] + 1 / 16 * row[3], rtol=1e-4, atol=1e-5
    )


def test_the_same_parameters_serve_the_expedited_model():
    model, variables = model_and_variables()
    expedite = {"alpha": 1, "beta": 1, "clusters": (2, 3), "where": "logits"}
    faster = model.clone(backbone=model.backbone.clone(expedite=expedite))
    images = RNG.normal(size=(1, 32, 48, 3)).astype(np.float32)
    found = jax.jit(functools.partial(faster.apply, train=False))(variables, images)
    assert found.shape == (1, 32, 48, K) and np.isfinite(found).all()
    assert np.abs(found - model.apply(variables, images, train=False)).max() > 1e-3


def test_a_head_sees_all_maps_of_a_hierarchical_backbone():
    changed = config(head="linear")
    with changed.unlocked():
        changed.model, changed.head_overrides = "swin_t", {}
        changed.model_overrides = {
            "dims": (2, 4, 4, 8), "num_heads": (1, 1, 1, 1), "depths": (1, 1, 1, 1)
        }  # fmt: skip
    model = make_task(changed, K).make_model()
    images = RNG.normal(size=(1, 64, 48, 3)).astype(np.float32)
    variables = jax.jit(functools.partial(model.init, train=False))(jax.random.key(0), images)
    kernel = variables["params"]["head"]["classifier"]["kernel"]
    assert kernel.shape == (2 + 4 + 4 + 8, K)

    @jax.jit
    def run(variables, images):
        features = lambda model, images: model.backbone.features(images, False)  # noqa: E731
        return (
            model.apply(variables, images, train=False),
            model.apply(variables, images, method=features),
        )

    logits, maps = run(variables, images)
    assert logits.shape == (1, 64, 48, K)
    # Corners of a map and of the image are not between positions.
    column = np.concatenate([x[0, 0, 0] for x in maps])
    np.testing.assert_allclose(logits[0, 0, 0], column @ kernel, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"head": "mask_transfomer"}, r"config.head='mask_transfomer' is not valid.*did you mean"),
        ({"head_overrides.head_dim": 5}, "head_dim=5 does not divide 16 channels"),
        ({"head_overrides": ConfigDict({"layers": 2})}, "head_overrides=.*'layers'"),
    ],
)
def test_wrong_models_are_named(overrides, message):
    with pytest.raises(UserError, match=message):
        changed = config()
        with changed.unlocked():
            changed.update_from_flattened_dict(overrides)
        model = make_task(changed, K).make_model()
        jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), False))


# ------------------------------------------------------------------------------------------------
# Inference
# ------------------------------------------------------------------------------------------------


def test_windows_cover_what_is_image():
    """The logits equal those from windows cut from single images, as in Segmenter's code."""
    (tall, wide), (down, right) = window, stride = (8, 10), (5, 6)
    images = RNG.normal(size=(2, 20, 16, 3)).astype(np.float32)
    sizes = np.array([[20, 11], [9, 16]])

    def apply(x):  # depends on the position in the window
        return (x[..., :2] * (1 + jnp.arange(tall)[:, None, None])) ** 2

    found = jax.jit(functools.partial(sliding_logits, apply, window=window, stride=stride))(
        images, sizes
    )
    for image, (height, width), logits in zip(images, sizes, found, strict=True):
        sums, counts = np.zeros((height, width, 2)), np.zeros((height, width, 1))
        for top in [*(i for i in range(0, height, down) if i < height - tall), height - tall]:
            for left in [*(i for i in range(0, width, right) if i < width - wide), width - wide]:
                here = (slice(top, top + tall), slice(left, left + wide))
                sums[here] += apply(image[here])
                counts[here] += 1
        np.testing.assert_allclose(logits[:height, :width], sums / counts, rtol=1e-5)


@pytest.mark.parametrize(("size", "new_size"), [(5, 9), (7, 4), (1, 3), (6, 6)])
def test_resize_of_a_part_equals_resize(size, new_size):
    x = RNG.normal(size=(8, 2)).astype(np.float32)
    found = jax.jit(resize_rows)(x, size, new_size, jnp.arange(10))[:new_size]
    expected = jax.image.resize(x[:size], (new_size, 2), "bilinear", antialias=False)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("window", 40, "40 is not valid: windows of 40 x 40 pixels do not fit into config.data.ev"),
        ("window", (32, 49), "(32, 49) is not valid: windows of 32 x 49 pixels do not fit into"),
        ("stride", 33, "33 is not valid; valid: up to the windows' 32 x 32 pixels"),
        ("stride", (0, 33), "(0, 33) is not valid; valid: up to the windows' 32 x 32 pixels"),
    ],
)
def test_windows_that_do_not_fit_are_named(name, value, message):
    changed = config(**{f"inference.{name}": value})
    with pytest.raises(UserError, match=re.escape(f"config.inference.{name}={message}")):
        predict_logits(None, changed, {}, jnp.zeros((1, 32, 48, 3)), None)


@pytest.mark.parametrize("head", ["upernet", "semantic_fpn"])
def test_a_head_on_maps_refuses_a_plain_host(head):
    wrong = config(head=head)
    wrong.head_overrides = {}
    message = (
        f"config.head='{head}' is not valid: it reads the maps of a hierarchical backbone, and "
        "config.model='vit_ti' is plain; valid: mask_transformer, linear"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        check_task(make_task(wrong))


def test_a_head_on_maps_can_have_statistics_of_its_own_devices():
    one = config(model="swin_t", head="upernet")
    one.model_overrides = {}
    for batch_norm, local in (("global", False), ("local", True), (2, True)):
        one.head_overrides = {"batch_norm": batch_norm}
        task = make_task(one, K)
        assert task.make_model().local_statistics is local
        check_train_batch(task)
    one.head_overrides.batch_norm = 3
    with pytest.raises(UserError, match=r"head_overrides\.batch_norm=3 does not divide .* 8"):
        check_train_batch(make_task(one, K))


def test_the_auxiliary_head_shares_settings_of_the_head():
    one = config(model="swin_t", head="upernet")
    one.model_overrides = {}
    one.head_overrides = {"dropout": 0.2, "batch_norm": "local", "init_std": 0.3}
    model = make_task(one, K).make_model()
    for name, value in one.head_overrides.items():
        assert getattr(model.head, name) == getattr(model.auxiliary, name) == value


# ------------------------------------------------------------------------------------------------
# Loss and metrics
# ------------------------------------------------------------------------------------------------


def test_loss_of_pixels():
    """The mean over all pixels; ignored ones and their gradients are 0."""
    logits = RNG.normal(size=(2, 2, 2, K)).astype(np.float32)
    labels = np.array([[[0, IGNORED], [2, IGNORED]], [[1, 1], [IGNORED, 0]]], np.uint8)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    counted = np.argwhere(labels != IGNORED)
    expected = -sum(np.log(p[b, i, j, labels[b, i, j]]) for b, i, j in counted) / 8

    def loss(logits):
        return pixel_cross_entropy(logits, labels, lambda x: x)

    value, grad = jax.jit(jax.value_and_grad(loss))(jnp.asarray(logits))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert ((np.abs(grad) > 0) == (labels != IGNORED)[..., None]).all()


class Echo:
    """A model whose logits are its images."""

    def apply(self, variables, images, train):
        return images


class Unnormalised(Segmentation):
    """The task without normalisation of pixels."""

    def normalize(self, images):
        return images


def test_metrics_equal_those_counted_by_hand():
    """The batch has two images of different sizes, labels at twice the resolution, and filling."""
    images = RNG.normal(size=(3, 70, 32, K)).astype(np.float32)
    sizes = np.array([[70, 20], [33, 32], [70, 32]])
    labels = RNG.integers(0, K, (3, 140, 64)).astype(np.uint8)
    labels[RNG.random(labels.shape) < 0.2] = IGNORED
    batch = {
        "image_size": sizes, "label": labels, "label_size": 2 * sizes, "mask": np.array([1, 1, 0.0])
    }  # fmt: skip
    for i, (height, width) in enumerate(2 * sizes):
        labels[i, height:], labels[i, :, width:] = IGNORED, IGNORED
    changed = config(**{"inference.window": 32, "inference.stride": 32})
    task = Unnormalised(changed, make_task(changed, K).info)
    run = jax.jit(functools.partial(task.evaluate, Echo(), {}))
    meter = task.meter()
    meter.add(jax.device_get(run({"image": images, **batch})))
    found = meter.result()

    confusion, loss = np.zeros((K, K)), 0.0
    for image, label, (height, width) in zip(images[:2], labels[:2], sizes[:2], strict=True):
        logits = jax.image.resize(
            image[:height, :width], (2 * height, 2 * width, K), "bilinear", antialias=False
        )
        logits = np.asarray(logits, np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for y in range(2 * height):
            for x in range(2 * width):
                if label[y, x] != IGNORED:
                    confusion[label[y, x], np.argmax(logits[y, x])] += 1
                    loss -= log_p[y, x, label[y, x]]
    right = np.diag(confusion)
    union = confusion.sum(0) + confusion.sum(1) - right
    np.testing.assert_allclose(found["eval/miou"], np.mean(right / union), rtol=1e-6)
    np.testing.assert_allclose(found["eval/accuracy"], right.sum() / confusion.sum(), rtol=1e-6)
    np.testing.assert_allclose(
        found["eval/class_accuracy"], np.mean(right / confusion.sum(1)), rtol=1e-6
    )
    np.testing.assert_allclose(found["eval/loss"], loss / confusion.sum(), rtol=1e-5)


def test_classes_that_never_occur_do_not_count():
    confusion = np.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    meter = ConfusionMeter(3)
    for _ in range(2):
        meter.add(Outcome({"confusion": confusion, "loss": 8.0}))
    found = meter.result()
    assert found["eval/miou"] == pytest.approx((3 / 4 + 4 / 5) / 2)
    assert found["eval/loss"] == 1.0
    found = meter.per_class()
    np.testing.assert_allclose(found["iou"], [3 / 4, 4 / 5, np.nan])
    np.testing.assert_allclose(found["accuracy"], [3 / 4, 1, np.nan])
