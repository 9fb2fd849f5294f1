"""Segmentation by masks: losses, evaluation and pictures of given predictions."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_task import make_task, open_dataset
from ml_collections import ConfigDict
from PIL import Image

from tokenvit_jax.heads import MaskPredictions
from tokenvit_jax.heads.mask_losses import WEIGHTS, Counts, MaskTargets, mask_losses
from tokenvit_jax.output import figure_bytes
from tokenvit_jax.tasks import default_config
from tokenvit_jax.tasks.masks import pictures

BATCH, QUERIES, SEGMENTS, CLASSES = 4, 6, 5, 6
SIDE = 128  # of the scenes
LAYERS = 2  # predictions of a decoder
NO_OBJECT_WEIGHT = 0.1  # Mask2Former
RNGS = dict.fromkeys(("dropout", "routing", "sample"), jax.random.key(1))


def make_config(kind="panoptic", **entries) -> ConfigDict:
    config = default_config("masks")
    config.dataset, config.image_size, config.inference.kind = "scene_segments", SIDE, kind
    config.data.max_segments, config.masks.num_points = SEGMENTS, 16
    config.head_overrides = {"num_queries": QUERIES, "channels": 32}
    config.update_from_flattened_dict(entries)
    return config


class Stub:
    """A model whose predictions are its parameters."""

    def apply(self, variables, images, train, **kwargs):
        if not train:
            return variables
        assert kwargs["mutable"] == ["losses"]
        return variables["params"], {}


# ------------------------------------------------------------------------------------------------
# Losses
# ------------------------------------------------------------------------------------------------


def random_predictions():
    rng = np.random.default_rng(0)
    shapes = (QUERIES, CLASSES + 1), (QUERIES, 8, 8)
    return MaskPredictions(
        *(rng.normal(size=(LAYERS, BATCH, *x)).astype(np.float32) for x in shapes)
    )


def training_batch(empty=()):
    """Returns a batch of scenes; some images have no segments."""
    examples, source = make_task(make_config()).examples(train=True), open_dataset(
        "scene_segments", "train"
    )  # fmt: skip
    rows = []
    for i in range(BATCH):
        row = examples(source.read(i), np.random.default_rng(i)) | {"index": np.int32(i)}
        if i in empty:
            row |= {name: examples.empty()[name] for name in ("segments", "classes")}
        rows.append(row)
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return batch | {"segments_left_out": np.array([0, 0, 3, 4], np.int32)}


@functools.cache
def losses_fn(axis_name=None):
    """Returns a function from predictions and a batch to the loss and the metrics.

    With an axis, its arguments and results are those of several devices.
    """
    task = make_task(make_config(), axis_name=axis_name)

    def run(predictions, batch):
        inputs = task.prepare(batch, jax.random.key(0))
        loss, aux = task.loss(Stub(), predictions, {}, inputs, RNGS)
        return aux.metrics | {"loss": loss}

    return jax.jit(run if axis_name is None else jax.vmap(run, axis_name=axis_name))


@functools.cache
def micro_batches_fn():
    """Returns a function from the predictions of parts of a batch, and the batch, to the losses."""
    task = make_task(make_config())

    def run(predictions, batch):
        parts = halves(task.prepare(batch, jax.random.key(0)))
        return jax.lax.map(
            lambda x: task.loss(Stub(), x[0], {}, x[1], RNGS)[0], (predictions, parts)
        )

    return jax.jit(run)


def halves(arrays):
    """Returns arrays (B, ...) as those of two halves (2, B / 2, ...)."""
    return jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), arrays)


@pytest.mark.parametrize("empty", [(), (1,), (0, 1)])
def test_the_loss_is_the_weighted_sum_over_predictions(empty):
    predictions, batch = random_predictions(), training_batch(empty)
    found = losses_fn()(predictions, batch)
    keys = jnp.stack([jax.random.fold_in(jax.random.key(0), i) for i in range(BATCH)])
    count = (batch["classes"] >= 0).sum()
    assert count == sum((batch["classes"][i] >= 0).sum() for i in range(BATCH) if i not in empty)
    counts = Counts(count + NO_OBJECT_WEIGHT * (BATCH * QUERIES - count), count)
    ids = np.tile(np.arange(1, SEGMENTS + 1), (BATCH, 1))
    targets = MaskTargets(batch["segments"], ids, batch["classes"])
    losses = jax.jit(functools.partial(mask_losses, num_points=16))(
        *predictions, targets, keys, counts
    )
    weights = {"classes": 2.0, "masks": 5.0, "dice": 5.0}
    assert WEIGHTS._asdict() == weights
    expected = {name: weights[name] * x for name, x in losses._asdict().items()}
    assert float(found["loss"]) == pytest.approx(sum(float(x.sum()) for x in expected.values()))
    assert found.keys() == {
        "loss", "loss/classes", "loss/masks", "loss/dice", "data/segments_left_out"
    }  # fmt: skip
    for name, values in expected.items():
        np.testing.assert_allclose(found[f"loss/{name}"], values[-1], rtol=1e-6)
        assert abs(values[0] / values[-1] - 1) > 1e-3
    assert float(found["data/segments_left_out"]) == 1.75


@pytest.mark.parametrize("empty", [(), (1,), (0, 1)])
def test_the_losses_of_halves_average_to_the_loss_of_the_batch(empty):
    """Halves are micro-batches, or lie on two devices; one of them may have no segment."""
    predictions, batch = random_predictions(), training_batch(empty)
    expected = losses_fn()(predictions, batch)
    parts = jax.tree.map(lambda x: np.stack(np.split(x, 2, axis=1)), predictions)
    found = micro_batches_fn()(parts, batch)
    assert float(found.mean()) == pytest.approx(float(expected["loss"]), rel=1e-5)
    found = losses_fn("devices")(parts, halves(batch))
    for name, value in expected.items():
        assert float(found[name].mean()) == pytest.approx(float(value), rel=1e-5), name
    if len(empty) == 2:
        assert float(found["loss/masks"][0]) == 0 < float(found["loss/masks"][1])


def test_a_batch_without_segments_trains_classes_alone():
    batch = training_batch(range(BATCH))
    found = losses_fn()(random_predictions(), batch)
    assert float(found["loss/masks"]) == float(found["loss/dice"]) == 0
    assert float(found["loss"]) > 0
    gradient = jax.jit(jax.grad(lambda x: losses_fn()(x, batch)["loss"]))(random_predictions())
    assert np.isfinite(gradient.logits).all() and np.any(gradient.logits)
    assert not np.any(gradient.masks)


def test_draws_depend_on_the_image_and_the_step_and_not_on_the_place():
    task, batch = make_task(make_config()), training_batch()
    prepare = jax.jit(task.prepare)

    def keys(index, seed):
        rows = batch | {"index": np.array(index, np.int32)}
        return jax.random.key_data(prepare(rows, jax.random.key(seed))["keys"])

    found, moved, later = keys([7, 3, 9, 4], 0), keys([4, 9, 7, 3], 0), keys([7, 3, 9, 4], 1)
    np.testing.assert_array_equal(found, moved[jnp.array([2, 3, 1, 0])])
    assert len(np.unique(np.concatenate([found, later]), axis=0)) == 8


# ------------------------------------------------------------------------------------------------
# Evaluation
# ------------------------------------------------------------------------------------------------

PERFECT = {
    "semantic": ("eval/miou", "eval/accuracy"),
    "instance": ("eval/mask_ap", "eval/box_ap"),
    "panoptic": ("eval/pq", "eval/sq", "eval/rq"),
}


def certain_predictions(records, side):
    """Returns predictions of the segments of records on a square canvas, certain of all pixels.

    Queries without a segment have masks of everything.
    """
    logits = np.zeros((1, len(records), QUERIES, CLASSES + 1), np.float32)
    logits[..., -1] = 30
    masks = np.full((1, len(records), QUERIES, side, side), 30, np.float32)
    for i, record in enumerate(records):
        segments = record["segments"]
        for query, (number, label) in enumerate(
            zip(segments.numbers, segments.classes, strict=True), 1
        ):
            logits[0, i, query, -1], logits[0, i, query, label] = 0, 30
            masks[0, i, query, :SIDE, :SIDE] = np.where(segments.ids == number, 30, -30)
    return MaskPredictions(logits, masks)


@pytest.mark.parametrize("kind", PERFECT)
def test_certain_and_right_predictions_are_perfect(kind):
    """Canvas and buffers are larger than the images, which lie at the upper left."""
    side = 160
    sizes = {"data.eval_size": (SIDE, side), "data.result_size": (SIDE + 3, SIDE + 9)}
    task = make_task(make_config(kind, **sizes))
    examples, source = task.examples(train=False), open_dataset("scene_segments", "test")
    records = [source.read(i) for i in range(4)]
    assert max(len(record["segments"].numbers) for record in records) < QUERIES
    rows = [
        examples(x, None) | {"index": np.int32(i), "mask": np.float32(i < 3)}
        for i, x in enumerate(records)
    ]
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    assert batch["image_size"].tolist() == [[SIDE, SIDE]] * 4
    outcome = jax.jit(functools.partial(task.evaluate, Stub()))(
        certain_predictions(records, side), batch
    )
    assert not outcome.sums
    meter = task.meter()
    meter.add(jax.device_get(outcome))
    metrics = meter.result()
    for name in PERFECT[kind]:
        assert metrics[name] == pytest.approx(1, abs=1e-9), name
    assert task.score(metrics) == metrics[PERFECT[kind][0]]
    images = {entry["image_id"] for entry in meter.results()}
    assert len(images) == 3  # the last record filled the batch
    if kind == "instance":
        assert all(entry["category_id"] <= 4 for entry in meter.results())  # no photographs


def test_evaluation_batches_hold_one_orientation():
    task = make_task(make_config(**{"data.eval_size": (64, 96)}))
    examples = task.examples(train=False)
    sizes = [(40, 80), (80, 40)]
    rows = [examples({"image": Image.new("RGB", size)}, None) for size in sizes]
    rows = [row | {"mask": np.float32(1), "index": np.int32(i)} for i, row in enumerate(rows)]
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    shapes = {
        x["image"].shape[1:3]: x["index"][x["mask"] > 0].tolist() for x in task.grouped([batch])
    }
    assert shapes == {(96, 64): [0], (64, 96): [1]}


def test_features_see_the_whole_image_on_the_canvas():
    task = make_task(make_config(**{"data.eval_size": (64, 96)}))
    assert task.view_size == (64, 96)
    image = Image.fromarray(
        np.random.default_rng(0).integers(256, size=(80, 40, 3), dtype=np.uint8)
    )
    view = task.view(image)
    assert view.shape == (64, 96, 3)
    expected = image.resize((32, 64), Image.Resampling.BILINEAR)
    assert abs(view[:, :32].astype(int) - np.asarray(expected)).max() <= 1
    assert (view[:, 32:] == [124, 116, 104]).all()


# ------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------

IMAGE = np.full((40, 60, 1), 200, np.uint8)
NAMES = ["cat", "$dog", "sky"]


def squares():
    """Returns identifiers: 1 and 2 are squares, 3 has no pixels, 0 is the rest."""
    ids = np.zeros((40, 60), np.int16)
    ids[5:25, 10:30], ids[5:25, 35:55] = 1, 2
    return ids


def test_segments_are_filled_outlined_and_named():
    ids = squares()
    drawn = pictures.pictures_of_segments(IMAGE, ids, np.array([1, 1, 0]), NAMES, "a $caption")
    assert drawn.keys() == {"segments", "ids"}
    (axis,) = drawn["segments"].axes
    shown = np.asarray(axis.get_images()[0].get_array()).astype(int)
    assert (shown[ids == 0] == 200).all() and (shown[ids > 0] != 200).any(-1).all()
    for left in (10, 35):  # the border is darker or more colourful than the inside
        inside, border = shown[6:24, left + 1 : left + 19], shown[5, left : left + 20]
        assert len(np.unique(inside.reshape(-1, 3), axis=0)) == 1
        assert (border == border[0]).all() and (border[0] != inside[0, 0]).any()
        np.testing.assert_allclose(inside[0, 0], (200 + border[0]) / 2, atol=1)
    assert (shown[10, 20] != shown[10, 45]).any()  # of one class
    texts = {text.get_text(): text.get_position() for text in axis.texts}
    assert len(axis.texts) == 2 and texts.keys() == {"$dog"}
    pixels = np.asarray(drawn["ids"]).astype(int)
    np.testing.assert_array_equal(pixels @ [1, 256, 65536], ids)
    assert figure_bytes(drawn["segments"], "png").startswith(b"\x89PNG")
    assert axis.get_title() == "a $caption"


def test_a_picture_has_the_objects_that_are_likely():
    ids = squares()
    found = {
        "masks": np.stack([ids == 1, ids == 2, ids >= 0]),
        "classes": np.array([0, 1, 2]),
        "scores": np.array([0.8, 0.3, 0.29], np.float32),
    }
    (axis,) = pictures.pictures_of_objects(IMAGE, found, NAMES, "")["objects"].axes
    assert [text.get_text() for text in axis.texts] == ["$dog 0.30", "cat 0.80"]
    assert (np.asarray(axis.get_images()[0].get_array())[ids == 0] == 200).all()


def test_a_line_counts_segments():
    assert pictures.describe(NAMES, np.array([1, 0, 1])) == "2 x $dog, 1 x cat"
    assert pictures.describe(NAMES, np.array([], int)) == "no segment"
    names = [*"abcdefghijkl"]
    assert re.search(r"1 x a, .*, \d+ more classes$", pictures.describe(names, np.arange(12)))
