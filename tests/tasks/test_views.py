"""Segmentation at test time: several scales, mirrored images, whole images."""

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

from tokenvit_jax.data import IGNORED
from tokenvit_jax.errors import UserError
from tokenvit_jax.tasks import Outcome, Segmentation, default_config
from tokenvit_jax.tasks.segmentation.examples import ImageViews
from tokenvit_jax.tasks.segmentation.inference import (
    compare_with_labels,
    predict_logits,
    predict_views,
    resized_logits,
)
from tokenvit_jax.tasks.segmentation.sliding_window import sliding_logits
from tokenvit_jax.training.evaluation import evaluate_batches

K = 3
GOLDEN = Path(__file__).parent / "golden"
SWIN_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


def config(**inference):
    config = default_config("segmentation")
    config.dataset, config.image_size = "scenes", 32
    config.inference.update(inference)
    return config


def resize(x, height, width):
    shape = (*x.shape[:-3], height, width, x.shape[-1])
    return jax.image.resize(x, shape, "bilinear", antialias=False)


# ------------------------------------------------------------------------------------------------
# mmsegmentation
# ------------------------------------------------------------------------------------------------


class Convolutions:
    """The network of mmsegmentation's arrays, with logits for every pixel."""

    def apply(self, weights, images, train):
        def conv(x, name, stride):
            kernel = weights[f"w/{name}.weight"].transpose(2, 3, 1, 0)
            padding = [(side // 2, side // 2) for side in kernel.shape[:2]]
            layout = ("NHWC", "HWIO", "NHWC")
            x = jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, padding, None, None, layout)
            return x + weights[f"w/{name}.bias"]

        x = conv(jax.nn.relu(conv(images, "c1", 4)), "c2", 1)
        return resize(x, *images.shape[1:3])


def test_scales_flips_and_windows_equal_mmsegmentation():
    golden = dict(np.load(GOLDEN / "inference_37x61.npz"))
    image, size = golden.pop("image"), golden.pop("ori_shape").tolist()
    settings = config(window="whole", flip=True, scales=SWIN_SCALES)

    @jax.jit
    def run(weights, image):
        model, slide = Convolutions(), {}
        for name, window, stride in (("32_21", (32, 32), (21, 21)), ("64x48", (37, 48), (37, 32))):
            apply = functools.partial(model.apply, weights, train=False)
            sizes = jnp.array([image.shape[:2]])
            slide[name] = sliding_logits(apply, image[None], sizes, window, stride)[0]
        images = [
            resize(image, *(int(side * scale + 0.5) for side in image.shape[:2]))
            for scale in SWIN_SCALES
        ]
        sizes = [jnp.array(x.shape[:2]) for x in images]
        views = predict_views(model, settings, weights, images, sizes)
        pixels = jnp.array(size), jnp.arange(size[0]), size[1]
        both = resized_logits(views[4:6], *pixels)  # scale 1
        return slide, [resized_logits(views, *pixels), both, sum(
            resize(view.logits, *size) for view in views
        )]  # fmt: skip

    slide, (logits, both, wrong) = run(golden, image)
    for name, found in slide.items():
        np.testing.assert_allclose(found[::2, ::2], golden[f"slide_{name}"], atol=1e-5)
    for found, name in ((logits, "tta"), (both, "flip_only")):
        found = np.exp(found)[::3, ::3]
        np.testing.assert_allclose(found, golden[f"{name}_mean_probability"], atol=1e-6)
    np.testing.assert_array_equal(logits.argmax(-1), golden["tta_labels"])
    # The mean of the logits gives other labels.
    np.testing.assert_array_equal(wrong.argmax(-1), golden["label_mean_of_logits"])
    assert (wrong.argmax(-1) != logits.argmax(-1)).mean() > 0.005


# ------------------------------------------------------------------------------------------------
# Evaluation and prediction
# ------------------------------------------------------------------------------------------------


def mean_logits(images, xp):
    """Returns logits that depend on every pixel, also of padding, and on left and right."""
    columns = xp.linspace(0, 1, images.shape[2])[:, None]
    mean = images.mean((1, 2), keepdims=True)
    return (images[..., :K] * (1 + columns) + mean * columns) / 60


class Mean:
    """A model that sees every pixel everywhere."""

    def apply(self, variables, images, train):
        return mean_logits(images, jnp)


class Unnormalised(Segmentation):
    """The task without normalisation of pixels."""

    def normalize(self, images):
        return images.astype(jnp.float32)


def scenes():
    """Returns images of three sizes, the last of which is wide, and label maps."""
    rng = np.random.default_rng(0)
    for height, width in ((40, 50), (64, 40), (50, 40), (80, 100), (40, 95)):
        smooth = rng.integers(256, size=(4, 5, 3), dtype=np.uint8)
        image = Image.fromarray(smooth).resize((width, height), Image.Resampling.BILINEAR)
        label = rng.integers(K, size=(height, width)).astype(np.uint8)
        label[rng.random(label.shape) < 0.1] = IGNORED
        yield {"image": image, "label_map": label}


def naive_resize(x, height, width):
    """Resizes x (h, w, C) by two matrices."""
    for axis, new in enumerate((height, width)):
        old = x.shape[axis]
        place = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        weights = np.maximum(0, 1 - np.abs(place[:, None] - np.arange(old)))
        x = np.moveaxis(np.tensordot(weights, x, (1, axis)), 0, axis)
    return x


def naive_softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def naive_probabilities(image, sides_of, scales, flips):
    """Returns the mean probabilities (h, w, K) of a PIL image by the spec's order of steps."""
    total = []
    for scale in scales:
        height, width = sides_of(scale)
        x = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), np.float64)
        for flip in flips:
            logits = mean_logits((x[:, ::-1] if flip else x)[None], np)[0]
            p = naive_softmax(naive_resize(logits, image.height, image.width))
            total.append(p[:, ::-1] if flip else p)
    return np.mean(total, 0)


def sides_when_whole(image, short, scale):
    up = lambda side: -(-int(side + 0.5) // 32) * 32  # noqa: E731
    return tuple(
        up(up(side * short / min(image.size)) * scale) for side in (image.height, image.width)
    )


def test_whole_images_are_seen_without_padding_in_any_grouping():
    scales = (0.5, 1.5)
    settings = config(window="whole", scales=scales, flip=True)
    settings.data.update(eval_short_side=40, eval_size=(96, 96), label_size=(80, 100))
    task = Unnormalised(settings, make_task(settings, K).info)
    records = list(scenes())
    expected = np.zeros((K, K))
    for record in records:
        image, label = record["image"], record["label_map"]
        sides_of = functools.partial(sides_when_whole, image, 40)
        p = naive_probabilities(image, sides_of, scales, (False, True))
        np.add.at(expected, (label[label != IGNORED], p.argmax(-1)[label != IGNORED]), 1)
    run = jax.jit(functools.partial(task.evaluate, Mean(), {}))
    examples, losses = task.examples(train=False), []
    for order in (1, -1):
        made = [dict(examples(record, None), mask=np.float32(1)) for record in records[::order]]
        made.append(dict(examples.empty(), mask=np.float32(0)))
        batches = (
            {name: np.stack([x[name] for x in made[i : i + 2]]) for name in made[0]}
            for i in range(0, len(made), 2)
        )
        meter, shapes = task.meter(), []
        for batch in task.grouped(batches):
            shapes.append(batch["image_1.5"].shape)
            meter.add(jax.device_get(run(batch)))
        # 40 x 50 and 80 x 100 are resized to 64 x 64, and so are those that are higher.
        assert sorted(set(shapes)) == [(2, 96, 96, 3), (2, 96, 160, 3)]
        assert np.abs(meter._confusion - expected).sum() <= 4  # near ties may fall the other way
        losses.append(meter.result()["eval/loss"])
    np.testing.assert_allclose(*losses, rtol=1e-5)
    # Prediction sees the same images.
    image = records[4]["image"]
    labels = task.predictor(Mean(), {})(image).arrays["labels"]
    p = naive_probabilities(
        image, functools.partial(sides_when_whole, image, 40), scales, (False, True)
    )
    assert np.mean(labels == p.argmax(-1)) > 0.999


def test_the_evaluation_of_a_run_groups_whole_images():
    settings = config(window="whole")
    settings.data.update(eval_short_side=40, eval_size=(96, 96), label_size=(80, 100))
    task, shapes = make_task(settings, K), []
    examples = task.examples(train=False)
    made = [dict(examples(record, None), mask=np.float32(1)) for record in scenes()]
    batches = ({name: np.stack([x[name] for x in made]) for name in made[0]} for _ in range(1))
    parallel = SimpleNamespace(put_batch=lambda x: x, fetch=lambda x: x)

    def step(variables, batch):
        shapes.append(batch["image"].shape[1:3])
        for size in batch["image_size"]:
            assert tuple(size) == shapes[-1]
        return Outcome({"confusion": np.eye(K) * batch["mask"].sum(), "loss": 0.0})

    metrics = evaluate_batches(task, step, {}, batches, parallel)
    assert sorted(shapes) == [(64, 64), (64, 96)] and metrics["eval/miou"] == 1


def test_views_in_buffers_are_mirrored_within_the_image():
    """Images of a batch have different sizes; windows are as large as the smallest image."""
    settings = config(flip=True, scales=(1.0, 1.5))
    settings.data.eval_short_side, settings.data.eval_size = 32, (40, 56)
    task = Unnormalised(settings, make_task(settings, K).info)
    views_of = ImageViews(settings)
    assert views_of.shapes == {1.0: (40, 56, 3), 1.5: (60, 84, 3)}

    class Echo:
        def apply(self, variables, images, train):
            return images / 60

    predict = task.predictor(Echo(), {})
    for record in list(scenes())[:2]:
        image = record["image"]
        views = views_of(image)
        assert views[1.5].shape[:2] == tuple(int(1.5 * x + 0.5) for x in views[1.0].shape[:2])
        # A model without positions gives for the mirrored image what it gives for the image.
        p = sum(
            naive_softmax(naive_resize(x / 60, image.height, image.width)) for x in views.values()
        )
        assert np.mean(predict(image).arrays["labels"] == p.argmax(-1)) > 0.999


def test_one_view_is_evaluated_as_ever():
    """The program of the defaults has no trace of views."""
    settings = config()
    settings.data.eval_size = (48, 64)
    task = Unnormalised(settings, make_task(settings, K).info)
    batch = {
        name: np.zeros((2, *spec.shape), spec.dtype)
        for name, spec in task.examples(train=False).specs.items()
    }
    assert list(batch) == ["image", "image_size", "label", "label_size"]
    batch["mask"] = np.ones(2, np.float32)

    def direct(batch):
        images = batch["image"].astype(jnp.float32)
        logits = predict_logits(Mean(), settings, {}, images, batch["image_size"])
        labels = jnp.where(batch["mask"][:, None, None] > 0, batch["label"], IGNORED)
        return compare_with_labels(logits, batch["image_size"], labels, batch["label_size"])

    def program():  # a new function: those that were traced are not traced again
        return str(jax.make_jaxpr(lambda batch: task.evaluate(Mean(), {}, batch).sums)(batch))

    assert program() == str(jax.make_jaxpr(direct)(batch))
    settings.inference.flip = True
    assert program() != str(jax.make_jaxpr(direct)(batch))
    batches = [batch]
    assert task.grouped(batches) is batches


# ------------------------------------------------------------------------------------------------
# Mistakes
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"scales": (0.5, 1.0)},
            "(0.5, 1.0) is not valid: at 0.5, images with a shorter side of 48 in a buffer of "
            "64 x 64 are smaller than windows of 32 x 32 pixels; valid: from 0.667, or "
            "config.inference.window=whole",
        ),
        ({"scales": (0.7, 1.0), "window": (32, 56)}, "smaller than windows of 32 x 56 pixels; va"),
        ({"scales": (0.0, 1.0)}, "valid: one or more values, each: numbers from 0.1 to 10"),
        ({"scales": (-1.0,)}, "valid: one or more values, each: numbers from 0.1 to 10"),
        ({"scales": ()}, "valid: one or more values, each: numbers from 0.1 to 10"),
    ],
)
def test_scales_that_do_not_fit_are_named(changes, message):
    settings = config(**changes)
    settings.data.eval_short_side, settings.data.eval_size = 48, (64, 64)
    with pytest.raises(UserError, match=f"^config.inference.scales=.*{re.escape(message)}") as e:
        check_config(settings)
    assert "\n" not in str(e.value)
    settings.inference.update({"window": "whole", "scales": (0.5, 0.7, 1.75)})
    check_config(settings)


def test_scales_are_checked_without_training_too():
    settings = config(scales=(0.5,))
    task = make_task(settings)
    for use in (functools.partial(task.examples, train=False), lambda: task.predictor(None, {})):
        with pytest.raises(UserError, match=r"valid: from 1, or config.inference.window=whole"):
            use()
    task.examples(train=True)


def test_several_processes_need_windows(monkeypatch):
    task = make_task(config(window="whole"))
    task.check_devices(8)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match=r"window=whole is not valid for training in 2 processes"):
        task.check_devices(8)
    make_task(config()).check_devices(8)


def test_unknown_text_is_no_window():
    with pytest.raises(UserError, match=r"window='hole' is not valid; valid: .*; or whole"):
        check_config(config(window="hole"))
