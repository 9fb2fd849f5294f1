"""Matching of anchors with objects, and random samples of the matches."""

import contextlib
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenvit_jax import ops
from tokenvit_jax.kernels.platforms import default_forms
from tokenvit_jax.ops.match_boxes import IGNORED, NEGATIVE

GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "assigner.npz"))
# Least IoU of a match, IoU below which an anchor is negative, least IoU of the best anchor.
RULES = {
    "retina": (0.5, 0.4, 0.0),
    "rpn": (0.7, 0.3, 0.3),
    "box": (0.5, 0.5, 0.5),
    "box_no_low_quality": (0.5, 0.5, 2.0),
    "stage2": (0.6, 0.6, 0.6),
    "stage3": (0.7, 0.7, 0.7),
}


def matcher(name):
    positive, negative, least = RULES[name]
    return functools.partial(ops.match_boxes, positive=positive, negative=negative, least=least)


def all_ious(anchors, boxes):
    """Returns the IoU of every object with every anchor, in float64."""
    iou = np.zeros((len(boxes), len(anchors)))
    for i, j in np.ndindex(iou.shape):
        a, b = np.float64(anchors[j]), np.float64(boxes[i])
        shared = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0).prod()
        union = (a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - shared
        iou[i, j] = shared / union if shared else 0
    return iou


def naive(anchors, valid, boxes, present, rules):
    """Matches one anchor after another, with the matrix of all pairs."""
    positive, negative, least = rules
    iou, objects = all_ious(anchors, boxes), np.flatnonzero(present)
    matches = []
    for j in range(len(anchors)):
        best = max((iou[i, j] for i in objects), default=0)
        match = NEGATIVE if best < negative else IGNORED
        if best >= positive:
            match = next(i for i in objects if iou[i, j] == best)
        for i in objects:
            largest = iou[i, valid].max(initial=-1)
            if largest >= least and iou[i, j] == largest:
                match = i
        matches.append(match if valid[j] else IGNORED)
    return matches


@pytest.mark.parametrize("name", RULES)
def test_equals_mmdetection(name):
    anchors = GOLDEN["in/anchors" if name in ("retina", "rpn") else "in/proposals"]
    valid, match = np.ones(len(anchors), bool), jax.jit(matcher(name))
    for objects, kind in ((6, "gt_index_plus_1"), (0, "no_gt")):
        found = match(anchors, valid, GOLDEN["in/gt"], np.arange(6) < objects)
        expected = GOLDEN[f"{name}/ignore_-1/{kind}"]
        np.testing.assert_array_equal(np.where(found >= 0, found + 1, -1 - found), abs(expected))
        # Theirs: 0 for negative and -1 for ignored anchors; ours: -1 and -2.
        np.testing.assert_array_equal(found == IGNORED, expected == -1)
        np.testing.assert_array_equal(found == NEGATIVE, expected == 0)


@pytest.mark.parametrize("name", ["retina", "rpn", "box"])
def test_equals_loops(name):
    """Corners are small whole numbers: many IoUs are equal, and float32 finds them equal."""
    draw = np.random.default_rng(0)

    def boxes(*shape):
        low = draw.integers(0, 6, (*shape, 2))
        return np.concatenate([low, low + draw.integers(0, 5, (*shape, 2))], -1).astype(np.float32)

    cases = 40
    anchors, objects = boxes(cases, 25), boxes(cases, 5)  # some have no area
    valid, present = draw.random((cases, 25)) < 0.8, draw.random((cases, 5)) < 0.6
    present[0], valid[1] = False, False
    found = jax.jit(jax.vmap(matcher(name)))(anchors, valid, objects, present)
    expected = [
        naive(*case, RULES[name]) for case in zip(anchors, valid, objects, present, strict=True)
    ]
    np.testing.assert_array_equal(found, expected)
    assert {NEGATIVE, IGNORED, 0, 4} <= {*np.unique(found)}
    one = matcher(name)(anchors[2], valid[2], objects[2], present[2])
    np.testing.assert_array_equal(one, expected[2])


def test_padding_and_anchors_outside_do_not_matter():
    anchors, boxes = GOLDEN["in/anchors"], GOLDEN["in/gt"]
    valid = np.ones(len(anchors), bool)
    match = jax.jit(matcher("rpn"))
    expected = match(anchors, valid, boxes, np.ones(6, bool))
    padded = np.concatenate([boxes, anchors[:20]])
    found = match(anchors, valid, padded, np.arange(26) < 6)
    np.testing.assert_array_equal(found, expected)
    # An anchor that takes no part is not the best one of an object, even if it equals the object.
    found = match(
        np.concatenate([anchors, boxes]), np.arange(len(anchors) + 6) < len(anchors),
        boxes, np.ones(6, bool),
    )  # fmt: skip
    np.testing.assert_array_equal(found[: len(anchors)], expected)
    assert (found[len(anchors) :] == IGNORED).all()


def test_overlaps_are_equal_where_float32_has_them_equal():
    """Many anchors hold a whole object, or lie in it: rounding alone decides which are the best."""
    sizes, strides = ((25, 42), (13, 21)), (32, 64)
    cells = [ops.cell_anchors([8 * stride], (0.5, 1, 2)) for stride in strides]
    anchors = ops.grid_anchors(sizes, strides, cells)
    draw = np.random.default_rng(4)
    low = draw.uniform(0, 700, (101, 2))
    boxes = np.concatenate([low, low + draw.uniform(8, 400, (101, 2))], 1).astype(np.float32)
    valid, present = np.ones(len(anchors), bool), np.arange(101) != 4

    expected = np.full(len(anchors), NEGATIVE)
    for i in np.flatnonzero(present):
        shared = np.minimum(anchors[:, 2:], boxes[i, 2:]) - np.maximum(anchors[:, :2], boxes[i, :2])
        shared = np.maximum(shared, 0).prod(1)
        areas = [(x[..., 2:] - x[..., :2]).prod(-1) for x in (anchors, boxes[i])]
        iou = shared / (areas[0] + areas[1] - shared)
        expected[iou == iou.max()] = i
    assert iou.dtype == np.float32
    match = functools.partial(ops.match_boxes, positive=2.0, negative=1.0, least=0.0)
    for forms in (contextlib.nullcontext(), default_forms()):
        with forms:
            found = jax.jit(match)(anchors, valid, boxes, present)
        np.testing.assert_array_equal(found, expected)


def test_no_matrix_of_anchors_and_objects():
    """All anchors of an image of 800 x 1344, and 100 objects."""
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((268_569, 4), jnp.float32), ((268_569,), bool), ((100, 4), jnp.float32), ((100,), bool)
        )
    ]  # fmt: skip
    program = jax.jit(matcher("rpn")).lower(*shapes).compile()
    assert program.memory_analysis().temp_size_in_bytes < 20 * 2**20
    assert "268569,100" not in program.as_text() and "100,268569" not in program.as_text()


MATCHES = np.array([3, NEGATIVE, IGNORED, 0, NEGATIVE, 0, 1, NEGATIVE, IGNORED, 2, NEGATIVE], int)


def sampler(num, max_positive):
    return functools.partial(ops.sample_matches, num=num, max_positive=max_positive)


@pytest.mark.parametrize(
    ("matches", "num", "max_positive", "counts"),
    [
        (MATCHES, 6, 3, (3, 3)),
        (MATCHES, 8, 2, (2, 4)),  # too few negative ones
        (MATCHES, 6, 6, (5, 1)),  # all positive ones
        (MATCHES, 30, 20, (5, 4)),  # more than there are anchors
        (np.full(9, NEGATIVE), 4, 2, (0, 4)),  # no object
        (np.full(9, IGNORED), 4, 2, (0, 0)),
        (np.arange(9), 4, 2, (2, 0)),  # all positive
    ],
)
def test_counts_of_a_sample(matches, num, max_positive, counts):
    keys = jax.random.split(jax.random.key(1), 20)
    samples = jax.jit(jax.vmap(sampler(num, max_positive), (0, None)))(keys, matches)
    for indices, positive, valid in zip(*map(np.asarray, samples), strict=True):
        assert indices.shape == positive.shape == valid.shape == (num,)
        taken = matches[indices[valid]]
        assert ((positive & valid).sum(), (valid & ~positive).sum()) == counts
        assert (taken[positive[valid]] >= 0).all() and (taken[~positive[valid]] == NEGATIVE).all()
        assert len(np.unique(indices[valid])) == sum(counts)  # none twice
        assert not (positive & ~valid).any()
        np.testing.assert_array_equal(positive, np.arange(num) < counts[0])  # positive ones first
    one = sampler(num, max_positive)(keys[3], matches)
    jax.tree.map(np.testing.assert_array_equal, one, jax.tree.map(lambda x: x[3], samples))


def test_candidates_are_equally_likely():
    draws = 4000
    keys = jax.random.split(jax.random.key(2), draws)
    samples = jax.jit(jax.vmap(sampler(5, 2), (0, None)))(keys, MATCHES)
    count = np.bincount(np.asarray(samples.indices).ravel(), minlength=len(MATCHES))
    for kind, share in ((MATCHES >= 0, 2 / 5), (MATCHES == NEGATIVE, 3 / 4)):
        deviation = (share * (1 - share) / draws) ** 0.5
        np.testing.assert_allclose(count[kind] / draws, share, atol=4 * deviation)
    assert not count[MATCHES == IGNORED].any()
