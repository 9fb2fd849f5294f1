"""Non-maximum suppression and the selection of detections with ties, against loops."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenvit_jax import ops

MODULE = importlib.import_module("tokenvit_jax.ops.nms")  # `ops` has an equal name
BLOCKS = (7, 1000)  # boxes that are visited together; all: the form of accelerators


def naive_iou(a, b):
    a, b = np.float64(a), np.float64(b)
    shared = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0).prod()
    union = (a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - shared
    return shared / union if shared else 0.0


def naive_nms(boxes, scores, threshold, labels, valid):
    """Returns the kept boxes, by falling score."""
    kept = []
    for i in np.argsort(-scores, kind="stable"):
        rivals = [j for j in kept if labels[j] == labels[i]]
        if valid[i] and not any(naive_iou(boxes[j], boxes[i]) > threshold for j in rivals):
            kept.append(i)
    return kept


def naive_selection(boxes, scores, score_threshold, iou_threshold, num, soft):
    """Suppresses class by class, and sorts what is left by score, row and class."""
    found = []
    for label in range(scores.shape[1]):
        left = {
            i: float(score) for i, score in enumerate(scores[:, label]) if score > score_threshold
        }
        while left:
            row = max(left, key=lambda i: (left[i], -i))
            found.append((-left.pop(row), row, label))
            for i in [*left]:
                iou = naive_iou(boxes[row, label], boxes[i, label])
                if soft and iou >= iou_threshold:
                    left[i] *= 1 - iou
                if left[i] <= score_threshold or (not soft and iou > iou_threshold):
                    del left[i]
    found = sorted(found)[:num]
    found += [(0, -1, -1)] * (num - len(found))
    score, rows, classes = map(np.array, zip(*found, strict=True))
    return rows, classes, -score


def small_boxes(draw, *shape):
    """Returns boxes with small whole corners, whose IoUs are often equal; some have no area."""
    low = draw.integers(0, 5, (*shape, 2))
    return np.concatenate([low, low + draw.integers(0, 6, (*shape, 2))], -1).astype(np.float32)


def in_order(keep, scores):
    order = np.argsort(-scores, kind="stable")
    return order[np.asarray(keep)[order]]


@pytest.mark.parametrize("block", BLOCKS)
def test_nms_equals_loops(monkeypatch, block):
    monkeypatch.setattr(MODULE, "CPU_BLOCK", block)
    draw, cases, count = np.random.default_rng(0), 30, 24
    boxes = small_boxes(draw, cases, count)
    scores = draw.integers(0, 8, (cases, count)).astype(np.float32) / 8  # equal ones, too
    labels = draw.integers(0, 2, (cases, count), np.int32)
    valid = draw.random((cases, count)) < 0.8
    valid[0] = False
    for threshold in (0.0, 0.5):
        run = jax.vmap(lambda b, s, n, v, t=threshold: ops.nms(b, s, t, labels=n, valid=v))
        found = jax.jit(run)(boxes, scores, labels, valid)
        for i in range(cases):
            args = boxes[i], scores[i], threshold, labels[i], valid[i]
            expected = naive_nms(*args)
            np.testing.assert_array_equal(in_order(found[i], scores[i]), expected)
        assert not found[0].any() and 0 < found.mean() < valid.mean()


def test_a_chain_is_kept_in_turns():
    """Each box suppresses the next one: every second one is kept, the most turns of a block."""
    left = np.arange(300.0) * 3
    boxes = np.stack([left, 0 * left, left + 10, 0 * left + 10], 1).astype(np.float32)
    keep = jax.jit(ops.nms)(boxes, -left.astype(np.float32), 0.5)
    np.testing.assert_array_equal(keep, np.arange(300) % 2 == 0)


def test_threshold_itself_is_not_above_it():
    boxes = np.array([[0, 0, 4, 4], [0, 0, 4, 2]], np.float32)  # IoU 1 / 2
    scores = np.array([0.5, 0.6], np.float32)
    run = jax.jit(ops.nms)
    np.testing.assert_array_equal(run(boxes, scores, 0.5), [True, True])
    np.testing.assert_array_equal(run(boxes, scores, 0.499), [False, True])


def select(boxes, scores, score_threshold, iou_threshold, num, soft):
    run = functools.partial(
        ops.select_detections,
        score_threshold=score_threshold,
        iou_threshold=iou_threshold,
        num=num,
        soft=soft,
    )
    return jax.jit(run)(boxes, scores)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("per_class", [False, True])
def test_selection_equals_loops(soft, per_class):
    draw, cases, count, num_classes, num = np.random.default_rng(1), 20, 16, 3, 12
    boxes = small_boxes(draw, cases, count, *[num_classes] * per_class)
    # Products of halves and quarters are exact, so that loops in float64 find the same ties.
    scores = draw.integers(0, 8, (cases, count, num_classes)).astype(np.float32) / 8
    scores[0] = 0.01
    run = functools.partial(
        ops.select_detections, score_threshold=0.2, iou_threshold=0.4, num=num, soft=soft
    )
    found = jax.jit(jax.vmap(run))(boxes, scores)
    for i in range(cases):
        every = np.broadcast_to(boxes[i].reshape(count, -1, 4), (count, num_classes, 4))
        rows, classes, scored = naive_selection(every, scores[i], 0.2, 0.4, num, soft)
        np.testing.assert_allclose(found.scores[i], scored, atol=1e-6)
        if not soft:  # rounding of 1 - IoU decides which of two almost equal scores is first
            np.testing.assert_array_equal(found.rows[i], rows)
            np.testing.assert_array_equal(found.classes[i], classes)
    assert (found.rows[0] == -1).all() and (found.rows[1:] >= 0).mean() > 0.5
    one = run(boxes[1], scores[1])
    jax.tree.map(np.testing.assert_array_equal, one, jax.tree.map(lambda x: x[1], found))


def test_scores_that_are_not_numbers_are_no_detections():
    boxes = jnp.array([[0.0, 0, 4, 4], [9, 9, 12, 12]])
    found = select(boxes, jnp.array([[jnp.nan], [0.5]]), 0.05, 0.5, 2, False)
    np.testing.assert_array_equal(found.rows, [1, -1])
