"""Matching of queries with segments, and the losses of classes and masks."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from detectors import golden

from tokenvit_jax.heads import mask_losses
from tokenvit_jax.heads.mask_losses import Counts, Losses, MaskTargets, Points, Weights

near = np.testing.assert_allclose
LAYERS = range(3)
NUM_POINTS = 32
SIZE = (20, 28)


def targets_of(masks, classes, places):
    """Returns targets whose segments may overlap: a map for each.

    Args:
      masks: bool masks (m, H, W) of each image.
      classes: their classes (m,).
      places: M.
    """
    shape = len(masks), places
    targets = MaskTargets(
        np.zeros((*shape, *masks[0].shape[1:]), np.uint8),
        np.tile(np.arange(1, places + 1), (len(masks), 1)),
        np.full(shape, -1, np.int32),
    )
    for i, (own, labels) in enumerate(zip(masks, classes, strict=True)):
        targets.id_maps[i, : len(own)] = own * targets.ids[i, : len(own), None, None]
        targets.classes[i, : len(own)] = labels
    return targets


def counts_of(targets, num_queries):
    """Returns the counts of a whole batch."""
    counts = mask_losses.count_segments(targets.classes, num_queries)
    return Counts(counts.classes.sum(), jnp.maximum(counts.segments.sum(), 1))


def draw_batch(counts, *, num_predictions=2, num_queries=9, num_classes=4, places=6):
    """Returns predictions, targets without overlaps, and keys of images with some segments each."""
    draw = np.random.default_rng(0)
    shape = num_predictions, len(counts), num_queries
    logits = draw.normal(size=(*shape, num_classes + 1)).astype(np.float32)
    masks = (3 * draw.normal(size=(*shape, 5, 7))).astype(np.float32)
    classes = draw.integers(num_classes, size=(len(counts), places))
    classes = np.where(np.arange(places) < np.array(counts)[:, None], classes, -1)
    id_maps = draw.integers(places + 3, size=(len(counts), 1, *SIZE), dtype=np.uint8)
    ids = np.tile(np.arange(places), (len(counts), 1))
    targets = MaskTargets(id_maps, ids, classes.astype(np.int32))
    return logits, masks, targets, jax.random.split(jax.random.key(3), len(counts))


compute = jax.jit(functools.partial(mask_losses.mask_losses, num_points=NUM_POINTS))


@jax.jit
def total(logits, masks, targets, keys, counts):
    """Returns the sum of all losses, and its gradients."""

    def run(logits, masks):
        losses = mask_losses.mask_losses(
            logits, masks, targets, keys, counts, num_points=NUM_POINTS
        )
        return sum(x.sum() for x in losses)

    return jax.value_and_grad(run, (0, 1))(logits, masks)


# ------------------------------------------------------------------------------------------------
# The released code
# ------------------------------------------------------------------------------------------------


def test_costs_and_matching_equal_the_released_code():
    arrays = golden("m2f_matcher")
    targets = targets_of([arrays["target_masks"]], [arrays["target_labels"]], 4)
    costs = functools.partial(
        mask_losses.matching_costs,
        *(arrays[name][None] for name in ("logits", "masks")),
        targets,
        arrays["points_xy"][None],
    )
    single = Weights(1.0, 0.0, 0.0), Weights(0.0, 1.0, 0.0), Weights(0.0, 0.0, 1.0)
    for weights, name in zip(single, ("class", "mask", "dice"), strict=True):
        near(costs(weights=weights)[0], arrays[f"cost_{name}"], atol=5e-6)
    near(costs()[0], arrays["cost"], atol=1e-5)
    queries = mask_losses.match_queries(costs()[None], targets)[0, 0]
    np.testing.assert_array_equal(
        np.asarray(queries)[arrays["target_index"]], arrays["query_index"]
    )


@functools.cache
def released():
    """Returns predictions, targets, and points of each layer of the released code."""
    arrays = golden("m2f_losses")
    counts = arrays["counts"]
    images, places = range(len(counts)), max(counts)
    targets = targets_of(
        [arrays[f"target_masks_{i}"] for i in images],
        [arrays[f"target_labels_{i}"] for i in images],
        places,
    )
    points = []
    for layer in LAYERS:
        matching = np.stack([arrays[f"layer{layer}_match_points_xy_{i}"] for i in images])
        rows = [arrays[f"layer{layer}_{name}_points_xy"] for name in ("candidate", "random")]
        own = [np.full((len(counts), places, *x.shape[1:]), 0.5, np.float32) for x in rows]
        number = itertools.count()  # pairs are listed image by image
        for i in images:
            for place in arrays[f"layer{layer}_target_index_{i}"]:
                row = next(number)
                own[0][i, place], own[1][i, place] = rows[0][row], rows[1][row]
        points.append(Points(*map(jnp.asarray, (matching, *own))))
    predictions = [[arrays[f"{name}{layer}"] for layer in LAYERS] for name in ("logits", "masks")]
    return arrays, predictions, targets, points


def losses_at(logits, masks, targets, points):
    """Returns the losses of every layer at given points, and the queries."""
    costs = [
        mask_losses.matching_costs(*layer, targets, own.matching)
        for *layer, own in zip(logits, masks, points, strict=True)
    ]
    queries = mask_losses.match_queries(jnp.stack(costs), targets)
    counts = counts_of(targets, logits[0].shape[1])
    losses = []
    for *layer, own, found in zip(logits, masks, points, queries, strict=True):
        classes = mask_losses.class_losses(
            layer[0], targets.classes, found, no_object_weight=mask_losses.NO_OBJECT_WEIGHT
        ).sum()
        chosen = mask_losses.choose_points(layer[1], found, own)
        others = mask_losses.point_losses(layer[1], targets, found, chosen)
        losses.append(
            Losses(classes / counts.classes, *(x.sum() / counts.segments for x in others))
        )
    return losses, queries


def test_losses_and_gradients_equal_the_released_code():
    arrays, predictions, targets, points = released()

    def run(logits, masks):
        losses, queries = losses_at(logits, masks, targets, points)
        weighted = [w * x for own in losses for w, x in zip(Weights(), own, strict=True)]
        return sum(weighted), (losses, queries)

    found, gradients = jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))(*predictions)
    result, (losses, queries) = found
    for layer in LAYERS:
        for i, count in enumerate(arrays["counts"]):
            expected = np.full(queries.shape[2], -1)
            own = [arrays[f"layer{layer}_{name}_index_{i}"] for name in ("target", "query")]
            expected[own[0]] = own[1]
            np.testing.assert_array_equal(queries[layer, i], expected)
            assert (expected >= 0).sum() == count
        for name, loss in zip(("ce", "mask", "dice"), losses[layer], strict=True):
            assert loss == pytest.approx(arrays[f"layer{layer}_loss_{name}"], abs=2e-6)
        for name, found in zip(("logits", "masks"), gradients, strict=True):
            near(found[layer], arrays[f"grad_{name}{layer}"], atol=2e-7, rtol=0)
    assert result == pytest.approx(arrays["total"], abs=1e-5)


# ------------------------------------------------------------------------------------------------
# All predictions of a batch
# ------------------------------------------------------------------------------------------------


def test_losses_are_those_of_single_images():
    """Draws, matches and adds up one image of one prediction after another."""
    logits, masks, targets, keys = draw_batch((2, 0, 6))
    counts = counts_of(targets, 9)
    divisors = np.array([counts.classes, 8, 8])
    found = compute(logits, masks, targets, keys, counts)
    _, gradients = total(logits, masks, targets, keys, counts)

    def run(pair, *args):
        losses = losses_of_image(*pair, *args) / divisors
        return losses.sum(), losses

    single = jax.jit(jax.grad(run, has_aux=True))
    for layer in range(2):
        expected = np.zeros(3)
        for i, key in enumerate(keys):
            own = MaskTargets(*(x[i : i + 1] for x in targets))
            pair = logits[layer, i : i + 1], masks[layer, i : i + 1]
            grads, losses = single(pair, own, jax.random.fold_in(key, layer))
            expected += np.asarray(losses)
            for whole, part in zip(gradients, grads, strict=True):
                near(whole[layer, i], part[0], atol=1e-7)
        near([x[layer] for x in found], expected, rtol=1e-5)


def losses_of_image(logits, masks, targets, key):
    """Returns the sums of the losses of a batch of one image (3,)."""
    points = mask_losses.draw_points(key, targets.classes.shape[1], NUM_POINTS)
    points = jax.tree.map(lambda x: x[None], points)
    costs = mask_losses.matching_costs(logits, masks, targets, points.matching)
    queries = mask_losses.match_queries(costs[None], targets)[0]
    classes = mask_losses.class_losses(
        logits, targets.classes, queries, no_object_weight=mask_losses.NO_OBJECT_WEIGHT
    )
    chosen = mask_losses.choose_points(masks, queries, points)
    others = mask_losses.point_losses(masks, targets, queries, chosen)
    return jnp.concatenate([classes, *others])


def test_order_of_images_does_not_matter():
    logits, masks, targets, keys = draw_batch((2, 0, 6))
    counts, order = counts_of(targets, 9), np.array([2, 0, 1])
    found = compute(logits, masks, targets, keys, counts)
    moved = MaskTargets(*(x[order] for x in targets))
    moved = compute(logits[:, order], masks[:, order], moved, keys[order], counts)
    for pair in zip(found, moved, strict=True):
        near(*pair, rtol=1e-5)


def test_padding_does_not_matter():
    """Neither do the numbers and identifiers of places without a segment."""
    logits, masks, targets, keys = draw_batch((2, 0, 3))
    points = jax.vmap(lambda key: mask_losses.draw_points(key, 9, NUM_POINTS))(keys)
    run = jax.jit(lambda *args: losses_at(*args)[0])
    ids = np.where(targets.classes < 0, 1, targets.ids)  # that of another segment
    results = []
    for places in (3, 6):
        own = MaskTargets(targets.id_maps, ids[:, :places], targets.classes[:, :places])
        used = points._replace(
            candidates=points.candidates[:, :places], fresh=points.fresh[:, :places]
        )
        results.append(run(list(logits), list(masks), own, [used] * 2))
    for pair in zip(*map(np.array, results), strict=True):
        near(*pair, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("counts", [(1, 4, 3, 2), (0, 0, 6, 1)])
def test_two_devices_equal_one(counts):
    """With different numbers of segments on the devices, and with none on the first one."""
    logits, masks, targets, keys = draw_batch(counts)
    expected, gradients = total(logits, masks, targets, keys, counts_of(targets, 9))

    def step(logits, masks, targets, keys):
        counts = mask_losses.count_segments(targets.classes, 9)
        counts = Counts(*(jax.lax.psum(x.sum(), "batch") for x in counts))
        loss, gradients = total(logits, masks, targets, keys, counts)
        return jax.lax.psum(loss, "batch"), gradients

    by_device = [x.reshape(2, 2, 2, *x.shape[2:]).swapaxes(0, 1) for x in (logits, masks)]
    own = [x.reshape(2, 2, *x.shape[1:]) for x in targets]
    devices = jax.devices()[:2]
    found, parts = jax.pmap(step, "batch", devices=devices)(
        *by_device, MaskTargets(*own), keys.reshape(2, 2)
    )
    near(found, [expected] * 2, rtol=1e-6)
    for part, gradient in zip(parts, gradients, strict=True):
        near(part.swapaxes(0, 1).reshape(gradient.shape), gradient, atol=1e-7)


@pytest.mark.slow
def test_micro_batches_equal_the_batch():
    logits, masks, targets, keys = draw_batch((1, 4, 0, 2))
    counts = counts_of(targets, 9)
    expected, gradients = total(logits, masks, targets, keys, counts)
    loss = 0
    for part in (slice(0, 2), slice(2, 4)):
        own = MaskTargets(*(x[part] for x in targets))
        found, parts = total(logits[:, part], masks[:, part], own, keys[part], counts)
        loss += found
        for one, gradient in zip(parts, gradients, strict=True):
            near(one, gradient[:, part], atol=1e-7)
    assert loss == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("case", ["no segment", "without pixels", "every query", "far logits"])
def test_losses_and_gradients_are_finite(case):
    places = 9 if case == "every query" else 6
    counts = {"no segment": (0, 0), "every query": (9, 9)}.get(case, (3, 6))
    logits, masks, targets, keys = draw_batch(counts, places=places)
    if case == "without pixels":
        targets = targets._replace(id_maps=np.full_like(targets.id_maps, 99))
    if case == "far logits":
        logits, masks = 1e4 * logits, 1e4 * masks
    losses = compute(logits, masks, targets, keys, counts_of(targets, 9))
    assert np.isfinite(losses).all() and (losses.classes > 0).all()
    if case == "no segment":
        assert not np.any(losses.masks) and not np.any(losses.dice)
    _, gradients = total(logits, masks, targets, keys, counts_of(targets, 9))
    assert all(np.isfinite(x).all() for x in gradients)
    assert np.any(gradients[0]) and np.any(gradients[1]) == (case != "no segment")


def test_matching_of_broken_predictions_ends():
    logits, masks, targets, keys = draw_batch((3, 6))
    masks[:, 0] = np.nan
    points = mask_losses.draw_points(keys[0], 6, NUM_POINTS).matching
    run = jax.jit(lambda *pair: mask_losses.matching_costs(*pair, targets, jnp.stack([points] * 2)))
    costs = jnp.stack([run(*pair) for pair in zip(logits, masks, strict=True)])
    assert np.isnan(costs[:, 0]).all() and np.isfinite(costs[:, 1, :, :6]).all()
    queries = np.asarray(mask_losses.match_queries(costs, targets))
    np.testing.assert_array_equal(queries >= 0, np.stack([targets.classes >= 0] * 2))
    for found, count in zip(queries.reshape(4, 6), (3, 6, 3, 6), strict=True):
        assert len(set(found[found >= 0].tolist())) == count


def test_more_segments_than_queries():
    batch = draw_batch((3, 6))
    with pytest.raises(ValueError, match=r"6 places for targets .* only 5 queries"):
        compute(*(x[:, :, :5] for x in batch[:2]), *batch[2:], Counts(1.0, 1.0))


def test_counts():
    classes = np.array([[0, 3, -1, -1], [-1, -1, -1, -1]])
    counts = mask_losses.count_segments(classes, 10)
    near(counts.classes, [2 + 0.8, 1.0], rtol=1e-6)
    near(counts.segments, [2, 0])


def test_points_are_uniform_and_differ():
    points = mask_losses.draw_points(jax.random.key(0), 4, 1000)
    assert [x.shape for x in points] == [(1000, 2), (4, 3000, 2), (4, 250, 2)]
    for x in points:
        values = np.asarray(x).reshape(-1, 2)
        assert values.min() >= 0 and values.max() < 1
        near(values.mean(0), 0.5, atol=0.05)
        near(values.var(0), 1 / 12, atol=0.01)
        assert len(np.unique(values, axis=0)) == len(values)
