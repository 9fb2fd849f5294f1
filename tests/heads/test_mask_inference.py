"""Label maps, panoptic maps and instances from the predictions of queries."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from detectors import golden

from tokenvit_jax.heads import mask_inference
from tokenvit_jax.ops.resize import resize_bilinear

near = np.testing.assert_allclose
PADDING = (5, 11)  # rows and columns of a buffer behind the image


@functools.cache
def released():
    """Returns arrays of the released code, and masks in a buffer larger than the image."""
    arrays = golden("m2f_inference")
    size = arrays["original_size"]
    buffer = tuple(map(int, size + PADDING))
    masks = resize(arrays["masks"], arrays, buffer)
    # Behind the image, all masks are there.
    inside = np.pad(np.ones(size, bool), [(0, padding) for padding in PADDING])
    return arrays, jnp.where(inside, masks, 40.0)


def resize(masks, arrays, buffer):
    canvas = tuple(map(int, arrays["padded_size"]))
    run = jax.jit(mask_inference.resize_masks, static_argnums=(1, 4))
    return run(masks, canvas, arrays["image_size"], arrays["original_size"], buffer)


def cut(x):
    """Cuts the image out of a buffer (..., H, W)."""
    return np.asarray(x)[..., : -PADDING[0], : -PADDING[1]]


def is_thing(arrays):
    return np.isin(np.arange(arrays["num_classes"]), arrays["things"])


def test_resizing_is_that_of_three_steps():
    arrays, _ = released()
    size, new_size = (tuple(map(int, arrays[f"{name}_size"])) for name in ("image", "original"))
    canvas = tuple(map(int, arrays["padded_size"]))
    x = resize_bilinear(arrays["masks"].transpose(1, 2, 0)[None], canvas)
    expected = resize_bilinear(x[:, : size[0], : size[1]], new_size)[0].transpose(2, 0, 1)
    found = resize(arrays["masks"], arrays, tuple(np.add(new_size, PADDING)))
    near(cut(found), expected, atol=2e-5)  # of 15


def test_semantic_scores_equal_the_released_code():
    arrays, masks = released()
    # On the canvas, and then resized.
    canvas = tuple(map(int, arrays["padded_size"]))
    size, new_size = arrays["image_size"], tuple(map(int, arrays["original_size"]))
    padded = resize_bilinear(arrays["masks"].transpose(1, 2, 0)[None], canvas)[0]
    scores = jax.jit(mask_inference.semantic_scores)(arrays["logits"], padded.transpose(2, 0, 1))
    scores = resize_bilinear(scores[None, : size[0], : size[1]], new_size)[0]
    near(scores.transpose(2, 0, 1), arrays["semantic_scores_resized_after"], atol=2e-6)
    np.testing.assert_array_equal(scores.argmax(-1), arrays["semantic_label_resized_after"])
    # Masks resized first.
    scores = jax.jit(mask_inference.semantic_scores)(arrays["logits"], masks)
    labels = cut(scores.argmax(-1))
    np.testing.assert_array_equal(labels, arrays["semantic_label_resized_before"])
    assert (labels != arrays["semantic_label_resized_after"]).any()


def test_panoptic_map_equals_the_released_code():
    arrays, masks = released()
    found = jax.jit(mask_inference.panoptic_map)(
        arrays["logits"], masks, arrays["original_size"], is_thing(arrays)
    )
    np.testing.assert_array_equal(cut(found.id_map), arrays["panoptic"])
    starts = np.flatnonzero(found.ids)
    np.testing.assert_array_equal(found.ids[starts], arrays["panoptic_ids"])
    np.testing.assert_array_equal(found.classes[starts], arrays["panoptic_classes"])
    outside = np.array(found.id_map)
    outside[: -PADDING[0], : -PADDING[1]] = 0
    assert not outside.any()


def naive_panoptic(logits, masks, thing):
    """Visits one query after another, and returns the map and (id, class) of segments."""
    masks = 1 / (1 + np.exp(-np.float64(masks)))
    probabilities = np.exp(np.float64(logits))
    probabilities /= probabilities.sum(1, keepdims=True)
    kept = [
        q for q, p in enumerate(probabilities) if p.argmax() < logits.shape[1] - 1 and p.max() > 0.8
    ]
    id_map, segments, stuff = np.zeros(masks.shape[1:], int), [], {}
    if not kept:
        return id_map, segments
    winner = np.argmax([probabilities[q].max() * masks[q] for q in kept], 0)
    for place, q in enumerate(kept):
        label, won, own = probabilities[q].argmax(), winner == place, masks[q] >= 0.5
        if not (won & own).any() or won.sum() / own.sum() < 0.8:
            continue
        if thing[label] or label not in stuff:
            segments.append((len(segments) + 1, label))
            stuff[label] = len(segments)
        id_map[won & own] = len(segments) if thing[label] else stuff[label]
    return id_map, segments


@pytest.mark.parametrize("seed", range(8))
def test_panoptic_map_equals_loops(seed):
    """Discs of random classes; in the last case, no query is certain."""
    draw = np.random.default_rng(seed)
    thing = np.array([True, False, False])
    logits = draw.normal(size=(12, 4)) + 6 * np.eye(4)[draw.integers(4, size=12)]
    centres, radii = draw.uniform(0, 20, (12, 2, 1, 1)), draw.uniform(1, 5, (12, 1, 1))
    masks = radii - np.hypot(*(np.mgrid[:20, :17][:, None] - centres.swapaxes(0, 1)))
    logits, masks = logits.astype(np.float32), masks.astype(np.float32)
    if seed == 7:
        logits *= 0
    found = jax.jit(mask_inference.panoptic_map)(logits, masks, np.array(masks.shape[1:]), thing)
    id_map, segments = naive_panoptic(logits, masks, thing)
    np.testing.assert_array_equal(found.id_map, id_map)
    starts = np.flatnonzero(found.ids)
    pairs = zip(found.ids[starts].tolist(), found.classes[starts].tolist(), strict=True)
    assert list(pairs) == segments
    assert bool(segments) == (seed != 7)


def test_thresholds():
    """One query wins .75 of its pixels from another one, whose class has a probability of .9."""
    logits = np.log([[0.95, 0.05], [0.9, 0.1]]).astype(np.float32)
    masks = np.array([[[5, -5, -5, -5]], [[2, 2, 2, 2]]], np.float32)
    run = functools.partial(mask_inference.panoptic_map, logits, masks, np.array([1, 4]), [True])
    np.testing.assert_array_equal(run().id_map, [[1, 0, 0, 0]])
    np.testing.assert_array_equal(run(overlap_threshold=0.75).id_map, [[1, 2, 2, 2]])
    np.testing.assert_array_equal(run(object_threshold=0.92).id_map, [[1, 0, 0, 0]])
    np.testing.assert_array_equal(run(object_threshold=0.96).id_map, [[0, 0, 0, 0]])


def test_instances_equal_the_released_code():
    arrays, masks = released()
    run = functools.partial(
        mask_inference.find_instances,
        arrays["logits"],
        masks,
        arrays["original_size"],
        num=int(arrays["top_k"]),
    )
    found = jax.jit(run)()
    np.testing.assert_array_equal(found.classes, arrays["instance_classes"])
    near(found.scores, arrays["instance_scores"], atol=1e-6)
    np.testing.assert_array_equal(cut(found.masks), arrays["instance_masks"])
    assert np.sum(found.masks) == arrays["instance_masks"].sum()

    things = jax.jit(lambda: run(is_thing=is_thing(arrays)))()
    count = len(arrays["thing_instance_classes"])
    np.testing.assert_array_equal(things.classes[:count], arrays["thing_instance_classes"])
    near(things.scores[:count], arrays["thing_instance_scores"], atol=1e-6)
    assert (things.classes[count:] == -1).all() and not np.any(things.scores[count:])
    assert np.sum(things.masks[count:]) == 0
    own = np.isin(arrays["instance_classes"], arrays["things"])
    np.testing.assert_array_equal(cut(things.masks[:count]), arrays["instance_masks"][own])


def test_empty_masks_are_instances_with_a_score_of_zero():
    logits = np.zeros((2, 3), np.float32)
    masks = np.full((2, 4, 4), -1, np.float32)
    found = mask_inference.find_instances(
        logits, masks, np.array([4, 4]), num=4, is_thing=np.array([False, True])
    )
    assert found.classes.tolist() == [1, 1, -1, -1] and not np.any(found.scores)


def test_more_instances_than_pairs():
    with pytest.raises(ValueError, match="num=7 is not valid; valid: 1 to 6"):
        mask_inference.find_instances(
            np.zeros((2, 4), np.float32), np.zeros((2, 4, 4), np.float32), np.array([4, 4]), num=7
        )


def test_images_of_a_batch():
    """Images of different sizes, mapped, equal single ones."""
    arrays, masks = released()
    sizes = np.stack([arrays["original_size"], arrays["original_size"] - 7])
    logits = np.stack([arrays["logits"], arrays["logits"][::-1]])
    batch = jnp.stack([masks, masks[::-1]])

    def run(logits, masks, size):
        panoptic = mask_inference.panoptic_map(logits, masks, size, is_thing(arrays))
        return panoptic, mask_inference.find_instances(logits, masks, size, num=10)

    found = jax.jit(jax.vmap(run))(logits, batch, sizes)
    for i in range(2):
        expected = jax.jit(run)(logits[i], batch[i], sizes[i])
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            near(one[i], other, atol=1e-6)
