"""Metrics, losses and sizes of depth against the arrays of published code.

The arrays come from the evaluation code of BTS, with and without KITTI's crop, and from PyTorch's
transcriptions of SILog and of the loss of MiDaS; maps have unknown pixels.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_task import open_dataset
from ml_collections import ConfigDict
from PIL import Image

from tokenvit_jax.errors import UserError
from tokenvit_jax.metrics.depth import CROPS, METRICS, DepthMeter, comparable, depth_metrics
from tokenvit_jax.ops.resize import resize_bicubic
from tokenvit_jax.output import figure_bytes
from tokenvit_jax.tasks import Outcome, create_task, default_config
from tokenvit_jax.tasks.depth import losses, pictures
from tokenvit_jax.tasks.depth.examples import DepthExamples
from tokenvit_jax.tasks.depth.inference import aligned, fitted_size, place

GOLDEN = Path(__file__).parent / "golden"
NAMES = {"rms": "rmse", "log_rms": "rmse_log", "d1": "delta1", "d2": "delta2", "d3": "delta3"}
KITTI = (1e-3, 80.0)
ROOM = (1e-3, 10.0)


def arrays(name):
    with np.load(GOLDEN / f"{name}.npz") as found:
        return dict(found)


# ------------------------------------------------------------------------------------------------
# Metrics
# ------------------------------------------------------------------------------------------------


def metrics_of(prediction, truth, limits):
    compute = jax.jit(depth_metrics, static_argnames="limits")
    found, pixels = compute(prediction, truth, limits=limits)
    assert set(found) == set(METRICS) and (pixels > 0).all()
    return {name: np.asarray(values) for name, values in found.items()}


def assert_metrics(found, names, expected):
    for name, values in zip(names, expected, strict=True):
        key = NAMES.get(str(name), str(name))
        np.testing.assert_allclose(found[key], values, rtol=1e-5, err_msg=key)


@pytest.mark.parametrize("crop", ["garg", "eigen"])
def test_metrics_of_a_prediction_for_the_frame_of_kitti(crop):
    golden = arrays("depth_metrics_kitti_370x1224")
    truth = golden["gt_png"].astype(np.float32) / 256
    frame = (4, 18, 1220, 370)
    prediction = np.zeros_like(truth)
    prediction[18:, 4:1220] = golden["pred_png"] / 256
    kept = comparable(truth, KITTI, [CROPS[crop](*truth.shape), frame])
    found = metrics_of(prediction[None], kept[None], KITTI)
    expected = golden[f"metrics_{crop}"]
    assert_metrics(found, golden["names"], expected[:, None])


def test_metrics_are_means_over_images_not_over_pixels():
    golden = arrays("depth_metrics_nyu_480x640")
    truth = golden["gt_png"].astype(np.float32) / 1000
    kept = np.stack([comparable(t, ROOM, [CROPS["eigen_nyu"](480, 640)]) for t in truth])
    found = metrics_of(golden["pred_png"] / np.float32(1000), kept, ROOM)
    assert_metrics(found, golden["names"], golden["metrics_eigen_per_image"].T)
    means = {name: values.mean() for name, values in found.items()}
    assert_metrics(means, golden["names"], golden["metrics_eigen"])
    over_pixels = dict(zip(golden["names"], golden["NOT_metrics_over_all_pixels"], strict=True))
    assert abs(means["rmse"] / over_pixels["rmse"] - 1) > 5e-4


def test_predictions_of_zero_and_infinity():
    golden = arrays("depth_metrics")
    cases = [
        case for case in json.loads(bytes(golden["meta"]))["cases"] if case["name"] != "kitti_garg"
    ]
    assert len(cases) == 3
    for case in cases:
        crop = "eigen_nyu" if case["name"] == "nyu_eigen" else case["crop"]
        limits = case["min_depth"], case["max_depth"]
        for image in range(case["images"]):
            key = f"{case['name']}/{image}"
            truth = golden[f"{key}/gt"].astype(np.float32) / case["divisor"]
            prediction = golden[f"{key}/prediction"].astype(np.float32)
            kept = comparable(truth, limits, [CROPS[crop](*truth.shape)])
            found = metrics_of(prediction[None], kept[None], limits)
            names = ["silog", "log10", "abs_rel", "sq_rel", "rms", "log_rms", "d1", "d2", "d3"]
            expected = [golden[f"{case['name']}/{name}"][image, None] for name in names]
            assert_metrics(found, names, expected)
        assert not np.isfinite(golden[f"{case['name']}/0/prediction"]).all()


def test_images_without_a_known_pixel_are_left_out_and_counted():
    meter = DepthMeter()
    with pytest.raises(UserError, match="nothing was evaluated: no image of the split"):
        meter.result()
    sums = dict.fromkeys(METRICS, 1.0) | {"images": 2, "images_left_out": 1}
    meter.add(Outcome(sums))
    meter.add(Outcome(sums | {"abs_rel": 2.0, "images_left_out": 2}))
    result = meter.result()
    assert result["eval/abs_rel"] == 0.75 and result["eval/rmse"] == 0.5
    assert result["eval/images_left_out"] == 3 and meter.per_class() == {}
    metrics, pixels = depth_metrics(jnp.ones((1, 3, 4)), jnp.zeros((1, 3, 4)), ROOM)
    assert pixels.tolist() == [0] and all(float(x[0]) == 0 for x in metrics.values())


def test_limits_are_excluded_and_boxes_intersect():
    truth = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 0.0]], np.float32)
    kept = comparable(truth, (1.0, 5.0), [(0, 0, 3, 2)])
    np.testing.assert_array_equal(kept, [[0, 2, 3], [4, 0, 0]])
    kept = comparable(truth, (0.5, 9.0), [(1, 0, 3, 2), (0, 1, 3, 2)])
    np.testing.assert_array_equal(kept, [[0, 0, 0], [0, 5, 0]])


# ------------------------------------------------------------------------------------------------
# Losses
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("focus", [0.85, 0.5])
def test_silog_and_its_gradient(focus):
    golden = arrays("depth_losses_19x45")
    truth = jnp.asarray(golden["target"])

    def loss(prediction):
        values = losses.silog(prediction, truth, focus)
        return values.mean(), values

    gradient, values = jax.jit(jax.grad(loss, has_aux=True))(jnp.asarray(golden["prediction"]))
    np.testing.assert_allclose(values, golden[f"silog_{focus}"], rtol=1e-5)
    expected = golden[f"silog_{focus}_gradient"]
    np.testing.assert_allclose(gradient, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kind", ["image", "batch"])
def test_scale_and_shift_invariant_loss_and_its_gradient(kind):
    golden = arrays("depth_losses_21x38")  # its last image has no known pixel
    truth = jnp.where(golden["mask"], golden["disparity_target"], 0.0)
    prediction = jnp.asarray(golden["disparity_pred"])
    pixels = losses.count_pixels(truth)
    assert pixels[2].tolist() == [0] * 5
    for name, found in zip(("scale", "shift"), losses.align(prediction, truth), strict=True):
        np.testing.assert_allclose(found, golden[f"ssi/{name}"], atol=1e-6)
    if kind == "batch":
        pixels = jnp.broadcast_to(pixels.mean(0), pixels.shape)

    @jax.jit
    def loss(prediction):
        return losses.scale_and_shift_invariant(prediction, truth, pixels).mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(prediction)
    np.testing.assert_allclose(value, golden[f"ssi_{kind}"], rtol=1e-5)
    expected = golden[f"ssi_{kind}/grad"]
    np.testing.assert_allclose(gradient, expected, atol=1e-5 * np.abs(expected).max())
    # Scale and shift of the prediction do not matter.
    np.testing.assert_allclose(loss(3 * prediction + 2), value, rtol=1e-4)


def test_pixels_are_counted_over_all_devices():
    config = default_config("depth")
    config.dataset, config.depth.loss, config.image_size = "depth_scenes", "ssi", 64
    depth = np.random.default_rng(0).uniform(-2, 4, (16, 8, 8)).astype(np.float32)
    batch = {"image": np.zeros((16, 8, 8, 3), np.uint8), "depth": depth.clip(0)}
    key = jax.random.key(0)
    expected = create_task(config).prepare(batch, key)["pixels"]
    assert len(np.unique(np.asarray(expected), axis=0)) == 1
    split = jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), batch)
    prepare = jax.pmap(create_task(config, "data").prepare, "data", in_axes=(0, None))
    found = prepare(split, key)["pixels"]
    np.testing.assert_allclose(found.reshape(16, 5), expected, rtol=1e-6)
    np.testing.assert_allclose(expected[0, 0], (depth > 0).sum() / 16)


def test_gradients_are_finite_where_losses_are_not_smooth():
    truth = jnp.array([[[2.0, 0.0], [3.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]]])
    for prediction in (jnp.where(truth > 0, truth, 1.0), jnp.ones_like(truth)):
        pixels = losses.count_pixels(truth)
        for loss in (
            lambda x: losses.silog(x, truth).sum(),
            lambda x, pixels=pixels: losses.scale_and_shift_invariant(x, truth, pixels).sum(),
        ):
            assert np.isfinite(jax.jit(jax.grad(loss))(prediction)).all()
    perfect = losses.silog(jnp.where(truth > 0, truth, 1.0), truth)
    np.testing.assert_allclose(perfect, [1e-6, 0], atol=1e-9)


# ------------------------------------------------------------------------------------------------
# Sizes
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "wanted", "expected"),
    [
        ((480, 640), (480, 640), (480, 640)),
        ((352, 1216), (352, 1216), (352, 1216)),
        ((375, 1242), (352, 1216), (352, 1216)),  # 1216 / 1242 is nearer to 1 than 352 / 375
        ((600, 800), (384, 384), (384, 512)),  # 384 / 600 is nearer to 1 than 384 / 800
        ((50, 70), (384, 384), (288, 384)),
        ((3, 3), (384, 384), (384, 384)),
    ],
)
def test_sizes_that_the_model_sees(size, wanted, expected):
    assert fitted_size(size, wanted, 32) == expected


@pytest.mark.parametrize("size", [(1, 30_000), (30_000, 1), (1, 1), (20_000, 20_000), (40, 9_000)])
def test_no_image_takes_all_memory(size):
    height, width = fitted_size(size, (384, 384), 32)
    assert min(height, width) >= 32 and height % 32 == width % 32 == 0
    assert height * width <= 5 * 384 * 384


@pytest.mark.parametrize("frame", [(0, 0, 9, 7), (3, 2, 12, 9), (1, 4, 6, 17), (5, 5, 6, 6)])
def test_predictions_are_placed_like_a_resized_map(frame):
    depth = jnp.asarray(np.random.default_rng(0).normal(size=(7, 9)), jnp.float32)
    left, top, right, bottom = frame
    found = np.array(jax.jit(place, static_argnames="shape")(depth, jnp.array(frame), (18, 15)))
    expected = resize_bicubic(depth[..., None], (bottom - top, right - left))[..., 0]
    np.testing.assert_allclose(found[top:bottom, left:right], expected, atol=2e-5)
    found[top:bottom, left:right] = 0
    assert not found.any()


def test_alignment_undoes_scale_and_shift_of_the_inverse_depth():
    truth = np.random.default_rng(0).uniform(1, 9, (2, 6, 5)).astype(np.float32)
    known = np.where(np.arange(5) % 3 == 0, 0, truth)
    found = aligned(jnp.asarray(1 / (0.2 / truth + 0.3)), jnp.asarray(known), ROOM)
    np.testing.assert_allclose(found, truth, rtol=1e-4)


# ------------------------------------------------------------------------------------------------
# Examples
# ------------------------------------------------------------------------------------------------


def config_of(**changes) -> ConfigDict:
    config = default_config("depth")
    config.dataset, config.image_size = "depth_scenes", 64
    config.update_from_flattened_dict({key.replace("__", "."): x for key, x in changes.items()})
    return config


KITTI_FRAME = {"data__frame": "kitti", "data__depth_size": (128, 128)}


@pytest.fixture(scope="module")
def record():
    return open_dataset("depth_scenes", "test").read(3)


def test_a_training_crop_and_its_depth_stay_together():
    depth = np.arange(128 * 128, dtype=np.float32).reshape(128, 128) + 1
    levels = (depth % 251).astype(np.uint8)
    picture = Image.fromarray(np.stack([levels] * 3, -1))
    examples = DepthExamples(config_of(augment__flip=0.5), train=True)
    flips = set()
    for seed in range(6):
        found = examples({"image": picture, "depth": depth}, np.random.default_rng(seed))
        np.testing.assert_array_equal(found["image"][..., 0], found["depth"] % 251)
        flips.add(bool(found["depth"][0, 0] > found["depth"][0, 1]))
    assert flips == {True, False}


def test_evaluation_examples_hold_only_what_is_compared(record):
    config = config_of(data__depth_size=(130, 140), depth__limits=(3.0, 12.0))
    found = DepthExamples(config, train=False)(record, None)
    depth = record["depth"]
    expected = np.zeros((130, 140), np.float32)
    expected[:128, :128] = np.where((depth > 3) & (depth < 12), depth, 0)
    np.testing.assert_array_equal(found["depth"], expected)
    assert found["frame"].tolist() == [0, 0, 128, 128] and found["image"].shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("changes", "train", "message"),
    [
        (
            {"data__frame": "kitti", "data__depth_size": (128, 128)},
            False,
            "image of 128 x 128 pixels is too small for the frame",
        ),
        ({"augment__frame": "nyu"}, True, "too small for the frame 'nyu'; valid: whole"),
        ({}, False, r"depth map of 128 x 128 pixels does not fit into 64 x 64; valid: config.data"),
    ],
)
def test_records_that_do_not_fit(record, changes, train, message):
    examples = DepthExamples(config_of(**changes), train=train)
    with pytest.raises(UserError, match=message):
        examples(record, np.random.default_rng(0) if train else None)
    with pytest.raises(UserError, match=r"depth map has 128 x 127 pixels, its image 128 x 128"):
        examples({**record, "depth": record["depth"][1:]}, np.random.default_rng(0))


# ------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------


def test_pictures_have_a_scale_and_the_error_where_the_truth_is_known(record):
    image, truth = np.asarray(record["image"]), record["depth"].copy()
    truth[:40] = 0
    figure = pictures.plot_depth(image, 1.1 * record["depth"], "scene", truth)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[:4] == ["scene", "prediction", "truth", "error, mean 10.0 %"]
    assert [axis.get_ylabel() for axis in figure.axes[4:]] == [
        "depth [m]", "|prediction - truth| / truth [%]"
    ]  # fmt: skip
    prediction, known = (axis.images[0] for axis in figure.axes[1:3])
    assert prediction.get_clim() == known.get_clim()  # one scale for both
    assert known.get_array().mask[:40].all() and not known.get_array().mask[40:].any()
    for unknown in (None, np.zeros_like(truth)):
        figure = pictures.plot_depth(image, record["depth"], "scene", unknown)
        assert [axis.get_title() for axis in figure.axes] == ["scene", "prediction", ""]


@pytest.mark.parametrize("shape", [(1, 1), (2, 300), (300, 2)])
def test_pictures_of_any_shape(shape):
    figure = pictures.plot_depth(np.zeros((*shape, 3), np.uint8), np.full(shape, 2.0), "a")
    assert len(figure_bytes(figure, "png")) > 100


def test_a_dataset_without_depth_is_refused():
    config = default_config("depth")
    config.dataset = "scenes"
    for other in ("folder", "tfds:a"):
        config.dataset = other
        with pytest.raises(UserError, match=r"has nothing for config.task='depth'; valid for this"):
            create_task(config)
    config.dataset = "scenes"
    with pytest.raises(UserError) as error:
        create_task(config)
    assert str(error.value).endswith(
        "has no depth, which config.task='depth' reads; valid: depth_scenes, kitti_depth, "
        "motorcycle, nyu_depth_v2"
    )
