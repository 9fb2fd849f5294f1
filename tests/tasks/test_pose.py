"""Pose estimation: targets and loss, mirrored images, places in images, and perfect heat maps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_task import make_task, open_dataset
from PIL import Image
from random_variables import random_variables

from experiments.pose.perfect import FixedHeatmaps, perfect
from tokenvit_jax.data.datasets import figures
from tokenvit_jax.data.person_crops import mirror, partners_of
from tokenvit_jax.data.record import Person, Skeleton
from tokenvit_jax.data.whole_body import PARTS, WHOLE_BODY
from tokenvit_jax.errors import UserError
from tokenvit_jax.heads import DeconvHead, MtaHead
from tokenvit_jax.tasks import Outcome, default_config
from tokenvit_jax.tasks.pose.inference import flip_tested, keypoints_in_images

SIZE = (64, 32)
SWIN = {
    "dims": (4, 4, 8, 8), "num_heads": (1, 1, 1, 1), "depths": (0, 0, 1, 0), "mlp_ratio": 1,
    "window_size": 2,
}  # fmt: skip
BODY_POINTS = 133


def config_of(**entries):
    config = default_config("pose")
    config.model, config.model_overrides = "swin_t", SWIN
    config.head_overrides = {"channels": 4, "num_heads": 2, "mlp_ratio": 1, "init_std": 0.1}
    config.dataset, config.image_size = "figures", SIZE
    config.update_from_flattened_dict(entries)
    return config


@functools.cache
def source(split):
    return open_dataset("figures", split)


def batch_of(task, indices, train=True):
    examples = task.examples(train=train)
    split = "train" if train else "test"
    found = [
        examples(source(split).read(i), np.random.default_rng(i) if train else None)
        for i in indices
    ]
    return {name: np.stack([example[name] for example in found]) for name in found[0]}


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------


def loss_of(task, heatmaps, batch):
    inputs = task.prepare(batch, jax.random.key(0))
    rngs = {name: jax.random.key(0) for name in ("dropout", "routing", "sample")}
    return float(task.loss(FixedHeatmaps(heatmaps), {}, {}, inputs, rngs)[0])


@pytest.mark.parametrize("unbiased", [False, True])
def test_loss_equals_loops(unbiased):
    """The mean over images, keypoints and pixels of weight times squared error."""
    task = make_task(config_of(**{
        "pose.sigma": 1.0, "pose.unbiased": unbiased, "pose.part_weights": (1, 2, 3, 0, 0.5),
    }))  # fmt: skip
    batch = batch_of(task, range(3))
    batch["keypoints"][0, 5, 2] = 0.3  # counts like any label
    batch["keypoints"][1, 7, 2] = 0
    heatmaps = np.random.default_rng(0).random((3, 16, 8, 133)).astype(np.float32)
    factors = {"body": 1, "foot": 2, "face": 3, "left_hand": 0, "right_hand": 0.5}
    total, counted = 0.0, 0
    step = (np.array([31, 63]) / [7, 15]) if unbiased else np.array([4, 4])
    for image in range(3):
        for part, points in PARTS.items():
            for number in points:
                x, y, seen = batch["keypoints"][image, number].astype(np.float64)
                centre = np.array([x, y]) / step
                centre = centre if unbiased else np.trunc(centre + 0.5)
                near = all(-4 <= c < n + 3 for c, n in zip(centre, (8, 16), strict=True))
                if not (seen > 0 and near):
                    continue
                rows, columns = np.mgrid[:16, :8]
                dx, dy = columns - centre[0], rows - centre[1]
                target = np.exp(-(dx**2 + dy**2) / 2)
                if not unbiased:
                    target[(abs(dx) > 3) | (abs(dy) > 3)] = 0
                error = heatmaps[image, ..., number] - target
                total += factors[part] * (error**2).mean()
                counted += 1
    assert loss_of(task, heatmaps, batch) == pytest.approx(total / (3 * 133), rel=1e-4)
    assert 150 < counted < 399


def test_unlabelled_and_weightless_points_have_no_gradient():
    task = make_task(config_of(**{"pose.part_weights": (1, 1, 0, 1, 1)}))
    batch = batch_of(task, range(2))
    batch["keypoints"][..., 2] = np.arange(133) % 2
    heatmaps = jnp.ones((2, 16, 8, 133))

    def loss(heatmaps):
        inputs = task.prepare(batch, jax.random.key(0))
        rngs = {name: jax.random.key(0) for name in ("dropout", "routing", "sample")}
        return task.loss(FixedHeatmaps(heatmaps), {}, {}, inputs, rngs)[0]

    moved = np.asarray(jax.jit(jax.grad(loss))(heatmaps)).any((0, 1, 2))
    assert not moved[::2].any() and not moved[list(PARTS["face"])].any() and moved[1:23:2].all()


@pytest.mark.parametrize("head", ["mta", "deconvolution"])
def test_heads_by_name(head):
    overrides = {} if head == "mta" else {"num_layers": 3}
    config = config_of(head=head)
    config.head_overrides = {"channels": 4, **overrides}
    model = make_task(config).make_model()
    assert isinstance(model.head, MtaHead if head == "mta" else DeconvHead)
    images = jax.ShapeDtypeStruct((2, *SIZE, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), images)
    shape = jax.eval_shape(lambda v, x: model.apply(v, x), variables, images)
    assert shape.shape == (2, 16, 8, 133)
    norms = [name for name in variables["params"] if name.startswith("map_norm")]
    assert norms == [f"map_norm_{i}" for i in ((1, 2, 3, 4) if head == "mta" else (4,))]


def test_augmentation_is_drawn_and_mirrors_pairs():
    """A flip alone: the crop of evaluation, mirrored, in about half of the examples."""
    task = make_task(config_of(**{"augment.flip": 0.5}))
    record, examples, flipped = source("train").read(3), task.examples(train=True), []
    plain = make_task(config_of()).examples(train=True)(record, np.random.default_rng(0))
    for seed in range(12):
        found = examples(record, np.random.default_rng(seed))
        same = np.array_equal(found["image"], plain["image"])
        flipped.append(not same)
        expected = (
            plain if same else dict(zip(
                ("image", "keypoints"), mirror(plain["image"], plain["keypoints"], WHOLE_BODY),
                strict=True,
            ))
        )  # fmt: skip
        np.testing.assert_array_equal(found["image"], expected["image"])
        np.testing.assert_allclose(found["keypoints"], expected["keypoints"], atol=1e-4)
    assert 2 < sum(flipped) < 10
    moving = {"augment.shift": 0.16, "augment.scale": 0.5, "augment.rotation": 40.0}
    examples = make_task(config_of(**moving)).examples(train=True)
    moved = [examples(record, np.random.default_rng(seed))["keypoints"] for seed in range(4)]
    assert all(np.abs(x[:, :2] - plain["keypoints"][:, :2]).max() > 1 for x in moved)


def test_another_skeleton():
    """A dataset of one's own may have other keypoints, with parts of its own."""
    skeleton = Skeleton(
        ("nose", "left_eye", "right_eye"), ((1, 2),), (0.1,) * 3, ((0, 1), (0, 2)), (0, 1, 2),
        {"nose": range(1), "eyes": range(1, 3)},
    )  # fmt: skip
    task = make_task(config_of(**{"pose.part_weights": (2, 1)}))
    task = dataclasses.replace(task, info=dataclasses.replace(task.info, skeleton=skeleton))
    task.check()
    record = source("train").read(0)
    person = record["person"]._replace(keypoints=record["person"].keypoints[:3])
    example = task.examples(train=True)({**record, "person": person}, np.random.default_rng(0))
    assert example["keypoints"].shape == (3, 3)
    batch = {name: x[None] for name, x in example.items()}
    assert loss_of(task, jnp.zeros((1, 16, 8, 3)), batch) > 0
    model = task.make_model()
    variables = random_variables(model, jax.ShapeDtypeStruct((1, *SIZE, 3), jnp.float32))
    found = task.predictor(model, variables)(record["image"])
    assert found.arrays["keypoints"].shape == (1, 3, 3)
    assert len(found.row["persons"][0]["keypoints"]) == 9
    assert "foot_kpts" not in found.row["persons"][0] and found.draw("")["skeletons"]


def test_a_box_without_area_is_refused():
    task = make_task(config_of())
    record = source("train").read(0)
    person = Person(np.array([4, 4, 4, 9], np.float32), record["person"].keypoints)
    for train in (True, False):
        with pytest.raises(UserError, match="has no area; valid: x1 < x2 and y1 < y2"):
            task.examples(train=train)({**record, "person": person}, np.random.default_rng(0))


# ------------------------------------------------------------------------------------------------
# Evaluation
# ------------------------------------------------------------------------------------------------


@functools.cache
def trained(**entries):
    """Returns a task, its model and random variables."""
    task = make_task(config_of(**entries))
    model = task.make_model()
    images = jax.ShapeDtypeStruct((1, *SIZE, 3), jnp.float32)
    return task, model, random_variables(model, images)


def test_partners():
    partners = partners_of(WHOLE_BODY)
    np.testing.assert_array_equal(partners[partners], np.arange(133))
    assert partners[0] == 0 and partners[5] == 6 and partners[91] == 112


def test_heat_maps_of_a_mirrored_image_are_mirrored():
    """With the pairs exchanged, if the mean is without a shift."""
    task, model, variables = trained(**{"pose.unbiased": True})
    images = np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3)).astype(np.uint8)
    run = jax.jit(lambda images: task.heatmaps(model, variables, images))
    found, mirrored = run(images), run(images[:, :, ::-1])
    expected = np.asarray(found)[:, :, ::-1][..., partners_of(WHOLE_BODY)]
    scale = np.abs(expected).max()
    np.testing.assert_allclose(mirrored, expected, atol=1e-5 * scale)
    plain = jax.jit(lambda x: model.apply(variables, task.normalize(x), train=False))(images)
    assert np.abs(found - plain).max() > 1e-3 * scale


def test_the_mean_is_shifted_unless_cells_lie_on_unit_steps():
    task, model, variables = trained()
    images = np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3)).astype(np.uint8)

    def apply(images):
        return model.apply(variables, task.normalize(images), train=False)

    @jax.jit
    def run(images):
        return task.heatmaps(model, variables, images), *(
            flip_tested(apply, images, WHOLE_BODY, shift=shift) for shift in (True, False)
        )

    found, shifted, unshifted = run(images)
    np.testing.assert_allclose(found, shifted, atol=1e-5)
    assert np.abs(shifted - unshifted).max() > 1e-3


def test_places_in_the_image():
    heatmaps = np.zeros((1, 16, 8, 2), np.float32)
    heatmaps[0, 7, 3, 0], heatmaps[0, 15, 0, 1] = 0.9, 0.4
    to_image = np.array([[[2.0, 0.5, 10.0], [-0.5, 2.0, 20.0]]], np.float32)
    for unbiased, step in ((False, (4, 4)), (True, (31 / 7, 63 / 15))):
        found = keypoints_in_images(
            heatmaps, to_image, SIZE, refinement="quarter", unbiased=unbiased
        )
        for number, (x, y, score) in enumerate([(3, 7, 0.9), (0, 15, 0.4)]):
            place = to_image[0, :, :2] @ (np.array([x, y]) * step) + to_image[0, :, 2]
            np.testing.assert_allclose(found[0, number], [*place, score], rtol=1e-5)


@pytest.mark.slow
def test_perfect_heat_maps():
    """Bodies are found; a quarter of a pixel limits face and hands, which DARK with UDP finds."""
    quarter, dark = (
        perfect(config_of(**{
            "image_size": (256, 192), "pose.unbiased": unbiased, "inference.refinement": refinement
        }))
        for unbiased, refinement in ((False, "quarter"), (True, "dark"))
    )  # fmt: skip
    assert quarter["eval/body_ap"] > 0.99 and quarter["eval/foot_ap"] > 0.99
    for part in ("face", "hand"):
        assert quarter[f"eval/{part}_ap"] < dark[f"eval/{part}_ap"]
    assert all(dark[f"eval/{part}_ap"] > 0.99 for part in ("body", "foot", "face", "hand"))
    assert dark["eval/ap"] > 0.99


def test_records_of_the_split_are_scored():
    """The meter reads the figures' own annotations: the true points have an AP of 1."""
    meter = make_task(config_of()).meter()
    persons = [source("test").read(i)["person"] for i in range(len(source("test")))]
    keypoints = np.stack([person.keypoints for person in persons])
    keypoints[..., 2] = 1
    count = len(persons)
    meter.add(Outcome((), {
        "keypoints": keypoints, "score": np.ones(count), "area": np.full(count, 100.0),
        "index": np.arange(count), "mask": np.ones(count),
    }))  # fmt: skip
    metrics = meter.result()
    assert metrics["eval/ap"] == pytest.approx(1)
    assert make_task(config_of()).score(metrics) == metrics["eval/ap"]
    (entry, *_), fields = meter.results(), ("foot_kpts", "face_kpts", "lefthand_kpts")
    assert len(entry["keypoints"]) == 51 and [len(entry[f]) for f in fields] == [18, 204, 63]


# ------------------------------------------------------------------------------------------------
# Predictions
# ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def predictor():
    task, model, variables = trained()
    return task.predictor(model, variables)


def test_prediction_of_the_whole_image(predictor):
    image = source("test").read(0)["image"]
    found = predictor(image)
    assert found.arrays["keypoints"].shape == (1, 133, 3)
    np.testing.assert_array_equal(found.arrays["boxes"], [[0, 0, figures.SIDE, figures.SIDE]])
    assert found.text.startswith("1 person with score ")
    (person,) = found.row["persons"]
    assert person["category_id"] == 1 and person["bbox"] == [0, 0, figures.SIDE, figures.SIDE]
    points = np.reshape(person["keypoints"], (17, 3))
    np.testing.assert_allclose(points, found.arrays["keypoints"][0, :17], atol=1e-3)


def test_predictions_in_boxes_do_not_depend_on_the_others(predictor):
    """More boxes than are predicted at a time; a box that is given twice is one person."""
    image = source("test").read(1)["image"]
    draw = np.random.default_rng(0)
    low = draw.uniform(0, 60, (11, 2))
    boxes = np.column_stack([low, low + draw.uniform(40, 150, (11, 2)), draw.uniform(0.5, 1, 11)])
    together = predictor(image, np.concatenate([boxes, boxes[:1]]))
    scores = together.arrays["scores"]
    assert (np.diff(scores) <= 0).all() and 1 < len(scores) <= 11
    for i in range(len(scores)):
        (place,) = np.flatnonzero(np.abs(boxes[:, :4] - together.arrays["boxes"][i]).max(1) < 1e-3)
        alone = predictor(image, boxes[place : place + 1])
        np.testing.assert_allclose(
            alone.arrays["keypoints"][0], together.arrays["keypoints"][i], atol=1e-2
        )
        np.testing.assert_allclose(alone.arrays["scores"][0], scores[i], rtol=1e-4)


def test_no_box(predictor):
    image = Image.new("RGB", (50, 40))
    found = predictor(image, np.zeros((0, 5)))
    assert found.text == "no person" and found.row == {"persons": []}
    assert found.arrays["keypoints"].shape == (0, 133, 3)
