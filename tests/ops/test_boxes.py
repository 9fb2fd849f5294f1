"""Box operators against the arrays of MMDetection, and against loops in float64."""

import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenvit_jax.ops.anchors import cell_anchors, grid_anchors, valid_anchors
from tokenvit_jax.ops.boxes import box_areas, box_iou, clip_boxes, decode_boxes, encode_boxes
from tokenvit_jax.ops.match_boxes import IGNORED, NEGATIVE, match_boxes, sample_matches
from tokenvit_jax.ops.nms import _in_blocks, nms
from tokenvit_jax.ops.select_detections import select_detections

GOLDEN = Path(__file__).parent / "golden"
DEVIATIONS = {
    "rpn": (1.0, 1.0, 1.0, 1.0), "box": (0.1, 0.1, 0.2, 0.2),
    "stage2": (0.05, 0.05, 0.1, 0.1), "stage3": (0.033, 0.033, 0.067, 0.067),
}  # fmt: skip


def load(name):
    return np.load(GOLDEN / f"{name}.npz")


def random_boxes(count, seed, side=100.0):
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, side, (count, 2))
    return np.concatenate([low, low + rng.uniform(2, side / 2, (count, 2))], 1).astype(np.float32)


# ------------------------------------------------------------------------------------------------
# Boxes
# ------------------------------------------------------------------------------------------------


def iou_of(a, b):
    """Returns the IoU of two boxes in float64."""
    a, b = np.float64(a), np.float64(b)
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union if union > 0 else 0.0


def test_iou_is_that_of_a_loop_and_of_the_reference():
    a, b = random_boxes(9, 0), random_boxes(7, 1)
    a[3], b[2] = b[0], [5, 5, 5, 5]
    a[4] = b[2]  # two empty boxes
    expected = [[iou_of(x, y) for y in b] for x in a]
    np.testing.assert_allclose(box_iou(a[:, None], b), expected, atol=1e-6)
    golden = load("assigner")
    found = box_iou(golden["in/gt"][:, None], golden["in/anchors"][::7])
    np.testing.assert_allclose(found, golden["iou"], atol=1e-6)


def test_areas_and_clipping():
    boxes = np.float32([[1, 2, 4, 8], [-3, 5, 30, 50]])
    np.testing.assert_array_equal(box_areas(boxes), [18, 33 * 45])
    clipped = clip_boxes(boxes, jnp.array([20, 10]))
    np.testing.assert_array_equal(clipped, [[1, 2, 4, 8], [0, 5, 10, 20]])


@pytest.mark.parametrize("name", DEVIATIONS)
def test_the_coder_is_that_of_the_reference(name):
    golden, deviations = load("box_coder"), DEVIATIONS[name]
    priors, size = golden["in/priors"], jnp.array([300, 420])
    found = encode_boxes(priors, golden["in/gt"], deviations)
    np.testing.assert_allclose(found, golden[f"{name}/encode"], rtol=1e-5, atol=5e-5)
    found = decode_boxes(priors, golden["in/deltas"], deviations)
    np.testing.assert_allclose(found, golden[f"{name}/decode"], rtol=5e-5, atol=5e-5)
    found = decode_boxes(priors, golden["in/deltas"], deviations, size)
    np.testing.assert_allclose(found, golden[f"{name}/decode_clipped_300x420"], atol=5e-5)
    deltas = golden["in/deltas_per_class"].reshape(len(priors), -1, 4)
    found = decode_boxes(priors[:, None], deltas, deviations, size).reshape(len(priors), -1)
    np.testing.assert_allclose(found, golden[f"{name}/decode_per_class_clipped"], atol=5e-5)


def test_coding_is_that_of_a_loop_and_is_undone():
    anchors, boxes = random_boxes(20, 2), random_boxes(20, 3)
    deviations = DEVIATIONS["box"]
    deltas = encode_boxes(anchors, boxes, deviations)
    for anchor, box, delta in zip(*map(np.float64, (anchors, boxes, deltas)), strict=True):
        for i in (0, 1):
            side, other = anchor[i + 2] - anchor[i], box[i + 2] - box[i]
            shift = (box[i] + box[i + 2] - anchor[i] - anchor[i + 2]) / 2 / side
            assert delta[i] == pytest.approx(shift / deviations[i], abs=1e-4)
            assert delta[i + 2] == pytest.approx(
                math.log(other / side) / deviations[i + 2], abs=1e-4
            )
    np.testing.assert_allclose(decode_boxes(anchors, deltas, deviations), boxes, atol=1e-3)
    gradient = jax.grad(lambda x: decode_boxes(anchors, x, deviations).sum())(deltas)
    assert np.isfinite(gradient).all() and (gradient != 0).any(1).all()


# ------------------------------------------------------------------------------------------------
# Anchors
# ------------------------------------------------------------------------------------------------

RATIOS = (0.5, 1.0, 2.0)
LEVELS = {
    "retina": ((8, 16, 32, 64, 128), [4 * 2 ** (i / 3) for i in range(3)]),
    "rpn": ((4, 8, 16, 32, 64), [8]),
}


@pytest.mark.parametrize("kind", LEVELS)
@pytest.mark.parametrize(("size", "padded"), [((100, 148), (70, 111)), ((128, 96), (98, 59))])
def test_anchors_are_those_of_the_reference(kind, size, padded):
    golden, (strides, sizes) = load("anchors"), LEVELS[kind]
    cells = [cell_anchors([stride * x for x in sizes], RATIOS) for stride in strides]
    for level, cell in enumerate(cells):
        np.testing.assert_allclose(cell, golden[f"{kind}/base{level}"], rtol=1e-6)
    maps = [tuple(-(-side // stride) for side in size) for stride in strides]
    place = "{}x{}".format(*size)

    def expected(name):
        return np.concatenate([golden[f"{place}/{kind}/{name}level{i}"] for i in range(5)])

    np.testing.assert_array_equal(grid_anchors(maps, strides, cells), expected(""))
    valid = valid_anchors(maps, strides, len(cells[0]), jnp.array(padded))
    np.testing.assert_array_equal(valid, expected("valid_of_pad_{}x{}/".format(*padded)))


@pytest.mark.parametrize(("kind", "count"), [("retina", 201_600), ("rpn", 268_569)])
def test_numbers_of_anchors_of_the_usual_canvas(kind, count):
    strides, sizes = LEVELS[kind]
    cells = [cell_anchors([stride * x for x in sizes], RATIOS) for stride in strides]
    maps = [tuple(-(-side // stride) for side in (800, 1344)) for stride in strides]
    assert len(grid_anchors(maps, strides, cells)) == count


# ------------------------------------------------------------------------------------------------
# Matching and sampling
# ------------------------------------------------------------------------------------------------

THRESHOLDS = {
    "retina": (0.5, 0.4, 0.0), "rpn": (0.7, 0.3, 0.3), "box": (0.5, 0.5, 0.5),
    "stage2": (0.6, 0.6, 0.6), "stage3": (0.7, 0.7, 0.7),
}  # fmt: skip


def match(anchors, valid, boxes, present, thresholds):
    positive, negative, least = thresholds
    return match_boxes(
        anchors, valid, boxes, present, positive=positive, negative=negative, least=least
    )


@pytest.mark.parametrize("name", THRESHOLDS)
def test_matches_are_those_of_the_reference(name):
    golden = load("assigner")
    anchors = golden["in/anchors" if name in ("retina", "rpn") else "in/proposals"]
    boxes = np.concatenate([golden["in/gt"], np.full((3, 4), 9, np.float32)])
    find = jax.jit(partial(match, thresholds=THRESHOLDS[name]))
    for count, wanted in ((6, "gt_index_plus_1"), (0, "no_gt")):
        found = find(anchors, np.ones(len(anchors), bool), boxes, np.arange(len(boxes)) < count)
        found = np.where(found >= 0, found + 1, np.where(found == NEGATIVE, 0, -1))
        np.testing.assert_array_equal(found, golden[f"{name}/ignore_-1/{wanted}"])


def matches_of_a_loop(anchors, valid, boxes, present, thresholds):
    positive, negative, least = thresholds
    iou = np.array([[box_iou(a, b) for b in boxes] for a in anchors])  # equal ties
    iou[~valid], iou[:, ~present] = -1, -1
    found = np.full(len(anchors), IGNORED)
    for i in np.flatnonzero(valid):
        best = max(iou[i].max(), 0)
        if best < negative:
            found[i] = NEGATIVE
        if best >= positive:
            found[i] = iou[i].argmax()
    for j in np.flatnonzero(present):
        for i in np.flatnonzero(valid):
            if iou[i, j] == iou[:, j].max() >= least:
                found[i] = j
    return found


@pytest.mark.parametrize("name", ["retina", "rpn", "box"])
def test_matches_are_those_of_a_loop(name):
    rng = np.random.default_rng(4)
    anchors, boxes = random_boxes(40, 5), random_boxes(6, 6)
    anchors[:3], boxes[4] = boxes[1], boxes[2]  # ties of anchors and of objects
    anchors[5] = boxes[2]
    valid, present = rng.random(40) < 0.8, np.array([True, True, True, False, True, True])
    args = anchors, valid, boxes, present
    found = jax.jit(partial(match, thresholds=THRESHOLDS[name]))(*args)
    np.testing.assert_array_equal(found, matches_of_a_loop(*args, THRESHOLDS[name]))
    both = jax.vmap(partial(match, thresholds=THRESHOLDS[name]))(*(np.stack([x, x]) for x in args))
    np.testing.assert_array_equal(both, np.stack([found, found]))


def test_matching_holds_no_matrix_of_anchors_and_objects():
    shapes = [(268_569, 4), (268_569,), (100, 4), (100,)]
    args = [
        jax.ShapeDtypeStruct(shape, bool if len(shape) == 1 else jnp.float32) for shape in shapes
    ]
    compiled = jax.jit(partial(match, thresholds=THRESHOLDS["rpn"])).lower(*args).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 20 * 2**20


@pytest.mark.parametrize(
    ("positives", "negatives", "taken"), [(50, 500, (8, 24)), (3, 500, (3, 29)), (50, 5, (8, 5))]
)
def test_samples_are_filled_up_with_negative_matches(positives, negatives, taken):
    matches = np.full(600, IGNORED)
    places = np.random.default_rng(7).permutation(600)
    matches[places[:positives]] = np.arange(positives) % 7
    matches[places[positives : positives + negatives]] = NEGATIVE
    draw = jax.jit(partial(sample_matches, num=32, max_positive=8))
    samples = [draw(jax.random.key(seed), jnp.asarray(matches)) for seed in range(40)]
    for indices, positive, valid in samples:
        assert (positive.sum(), (valid & ~positive).sum()) == taken
        assert (positive == (np.arange(32) < taken[0])).all()  # the positive ones first
        assert len(set(indices[valid].tolist())) == sum(taken)
        assert (matches[indices[positive]] >= 0).all()
        assert (matches[indices[valid & ~positive]] == NEGATIVE).all()
    drawn = np.concatenate([s.indices[s.positive] for s in samples])
    assert len(set(drawn.tolist())) == positives  # every positive match has its chance


def test_a_sample_may_be_larger_than_the_image_has_anchors():
    matches = jnp.array([0, NEGATIVE, IGNORED, 1])
    found = sample_matches(jax.random.key(0), matches, num=9, max_positive=6)
    assert found.valid.sum() == 3 and found.positive.sum() == 2
    assert sorted(found.indices[found.valid].tolist()) == [0, 1, 3]


# ------------------------------------------------------------------------------------------------
# Suppression
# ------------------------------------------------------------------------------------------------


def kept_in_order(boxes, scores, threshold, **kwargs):
    kept = np.asarray(jax.jit(partial(nms, threshold=threshold, **kwargs))(boxes, scores))
    order = np.argsort(-scores, kind="stable")
    return order[kept[order]].tolist()


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
def test_suppression_is_that_of_the_reference(threshold):
    golden = load("nms")
    for name in ("random", "ties"):
        boxes, scores = golden[f"{name}/in/boxes"], golden[f"{name}/in/scores"]
        assert (
            kept_in_order(boxes, scores, threshold) == golden[f"{name}/keep_{threshold}"].tolist()
        )
    boxes, scores, labels = (golden[f"random/in/{name}"] for name in ("boxes", "scores", "labels"))
    found = kept_in_order(boxes, scores, threshold, labels=labels)
    assert found == golden[f"random/keep_per_label_{threshold}"].tolist()


def test_suppression_is_that_of_a_loop_in_blocks_of_any_size():
    boxes, labels = random_boxes(70, 8, side=40.0), np.arange(70) % 3
    valid = np.random.default_rng(9).random(70) < 0.9
    kept = []
    for i in np.flatnonzero(valid):  # by falling score
        if all(labels[i] != labels[j] or iou_of(boxes[i], boxes[j]) <= 0.4 for j in kept):
            kept.append(i)
    expected = np.isin(np.arange(70), kept)
    for block in (8, 32, 70):
        found = jax.jit(partial(_in_blocks, threshold=0.4, block=block))(boxes, labels, valid)
        np.testing.assert_array_equal(found, expected)
    scores = np.linspace(1, 0, 70)
    shuffled = np.random.default_rng(10).permutation(70)
    args = [x[shuffled] for x in (boxes, scores)]
    found = nms(*args, 0.4, labels=labels[shuffled], valid=valid[shuffled])
    np.testing.assert_array_equal(found, expected[shuffled])


def test_soft_suppression_is_that_of_the_reference():
    golden = load("nms")
    boxes, scores = golden["random/in/boxes"], golden["random/in/scores"]
    for iou, least in ((0.5, 0.001), (0.3, 0.05)):
        name = f"random/soft_linear_{iou}_{least}"
        found = select_detections(
            boxes, scores[:, None], score_threshold=least, iou_threshold=iou, num=300, soft=True
        )
        index = golden[f"{name}/index"]
        assert found.rows[: len(index)].tolist() == index.tolist()
        assert (found.rows[len(index) :] == -1).all() and (found.scores[len(index) :] == 0).all()
        np.testing.assert_allclose(
            found.scores[: len(index)], golden[f"{name}/dets"][:, 4], atol=2e-5
        )


@pytest.mark.parametrize(("name", "soft"), [("out", False), ("soft", True)])
def test_detections_of_many_classes_are_those_of_the_reference(name, soft):
    golden = load("nms")
    boxes = golden["multiclass/in/boxes"].reshape(80, -1, 4)
    scores = golden["multiclass/in/probabilities_background_last"][:, :-1]
    found = select_detections(
        boxes, scores, score_threshold=0.05, iou_threshold=0.5, num=100, soft=soft
    )
    expected = golden[f"multiclass/{name}/boxes_scores"]
    count = len(expected)
    assert found.classes[:count].tolist() == golden[f"multiclass/{name}/labels"].tolist()
    np.testing.assert_allclose(found.scores[:count], expected[:, 4], atol=1e-5)
    np.testing.assert_array_equal(boxes[found.rows[:count], found.classes[:count]], expected[:, :4])


@pytest.mark.parametrize("soft", [False, True])
def test_detections_are_those_of_a_loop(soft):
    rng = np.random.default_rng(11)
    boxes, scores = random_boxes(30, 12, side=40.0), rng.random((30, 3)).astype(np.float32)
    scores[7], boxes[7] = scores[5], boxes[5]  # a tie: the lower row first
    left, expected = np.float64(scores), []
    left[left <= 0.2] = -1
    while len(expected) < 25 and left.max() > 0:
        row, label = np.unravel_index(left.argmax(), left.shape)
        expected.append((row, label, left[row, label]))
        for i in range(30):
            iou = iou_of(boxes[row], boxes[i])
            if soft and iou >= 0.4:
                decayed = left[i, label] * (1 - iou)
                left[i, label] = decayed if decayed > 0.2 else -1
            elif iou > 0.4:
                left[i, label] = -1
        left[row, label] = -1
    select = partial(select_detections, score_threshold=0.2, iou_threshold=0.4, num=25, soft=soft)
    found = jax.jit(select)(boxes, scores)
    rows, labels, values = (np.array(x) for x in zip(*expected, strict=True))
    np.testing.assert_array_equal(found.rows[: len(rows)], rows)
    np.testing.assert_array_equal(found.classes[: len(rows)], labels)
    np.testing.assert_allclose(found.scores[: len(rows)], values, atol=1e-5)
    both = jax.vmap(select)(np.stack([boxes, boxes]), np.stack([scores, scores]))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], b), both, found)
