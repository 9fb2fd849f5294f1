"""RetinaNet: one convolutional head on five levels of a feature pyramid."""

import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jax.nn.initializers import constant, normal

from tokenvit_jax.heads.detection import (
    COUNT,
    Detections,
    DetectorHead,
    Targets,
    focal_sums,
    l1_sums,
    padded_sizes,
)
from tokenvit_jax.heads.fpn import FeaturePyramid
from tokenvit_jax.layers import Conv
from tokenvit_jax.models.settings import Rules
from tokenvit_jax.ops.anchors import cell_anchors, grid_anchors, valid_anchors
from tokenvit_jax.ops.boxes import decode_boxes, encode_boxes
from tokenvit_jax.ops.match_boxes import IGNORED, match_boxes
from tokenvit_jax.ops.select_detections import select_detections

SIZES = tuple(4 * 2 ** (i / 3) for i in range(3))  # of anchors, in strides of their level
RATIOS = (0.5, 1.0, 2.0)  # height over width
PER_CELL = len(SIZES) * len(RATIOS)
NUM_COARSER = 2  # levels beyond the maps
DEVIATIONS = (1.0, 1.0, 1.0, 1.0)
# Initial biases of the logits: an anchor holds an object of a class with probability 0.01.
RARE = constant(-math.log(99))


class RetinaNet(DetectorHead):
    """Maps of strides 8 to 32 -> detections. Further attributes are those of `DetectorHead`.

    Attributes:
      num_convs: convolutions in front of the predictions of classes, and as many of boxes.
      num_candidates: highest scores of a level that can become detections.

    References:
      Lin et al. 2017, "Focal Loss for Dense Object Detection", in the form of MMDetection
      Contributors, "MMDetection" (2018): the sixth level is convolved from the last map, and
      there is no ReLU in front of the seventh.
    """

    first_map = 1
    valid: ClassVar[Rules] = {"num_convs": COUNT, "num_candidates": COUNT}

    num_convs: int = 4
    num_candidates: int = 1000

    def setup(self):
        conv = functools.partial(Conv, kernel_size=3, init=normal(self.init_std), dtype=self.dtype)
        self.fpn = FeaturePyramid(self.channels, num_convolved=NUM_COARSER, dtype=self.dtype)
        self.class_convs = [conv(self.channels) for _ in range(self.num_convs)]
        self.box_convs = [conv(self.channels) for _ in range(self.num_convs)]
        self.class_logits = conv(PER_CELL * self.num_classes, bias_init=RARE)
        self.box_deltas = conv(PER_CELL * 4)

    def predict(self, levels: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
        """Returns logits (B, A, K) and deltas (B, A, 4), float32, for the anchors of each level."""
        logits, deltas = [], []
        for x in levels:
            y = x
            for class_conv, box_conv in zip(self.class_convs, self.box_convs, strict=True):
                x, y = nn.relu(class_conv(x)), nn.relu(box_conv(y))
            logits.append(self.class_logits(x).reshape(x.shape[0], -1, self.num_classes))
            deltas.append(self.box_deltas(y).reshape(y.shape[0], -1, 4))
        return jax.tree.map(lambda x: x.astype(jnp.float32), (logits, deltas))

    def losses(self, maps, strides, targets: Targets, keys):
        del keys
        return self.level_losses(self.fpn(maps), strides, targets)

    def level_losses(self, levels, strides, targets):
        """Returns the losses for the levels of the pyramid; see :meth:`losses`."""
        logits, deltas = self.predict(levels)
        anchors, sizes, strides = _anchors(levels, strides)

        @jax.vmap
        def match(image_size, boxes, classes):
            valid = valid_anchors(sizes, strides, PER_CELL, padded_sizes(image_size))
            matches = match_boxes(
                anchors, valid, boxes, classes >= 0, positive=0.5, negative=0.4, least=0.0
            )
            positive, number = matches >= 0, jnp.maximum(matches, 0)
            wanted = encode_boxes(anchors, boxes[number], DEVIATIONS)
            return matches, jnp.where(positive, classes[number], -1), wanted

        matches, classes, wanted = match(targets.image_size, targets.boxes, targets.classes)
        positive = matches >= 0
        # Level by level: joined, the logits of all classes would be copied.
        ends = np.cumsum([x.shape[1] for x in logits])[:-1]
        parts = logits, jnp.split(classes, ends, 1), jnp.split(matches != IGNORED, ends, 1)
        class_sums = sum(focal_sums(*level) for level in zip(*parts, strict=True))
        box_sums = l1_sums(jnp.concatenate(deltas, 1), wanted, positive)
        counts = jnp.maximum(positive.sum(1), 1)
        return {
            "class": self.per_group(class_sums, counts),
            "box": self.per_group(box_sums, counts),
        }

    def __call__(self, maps, strides, image_size):
        return self.detect(self.fpn(maps), strides, image_size)

    def detect(self, levels, strides, image_size) -> Detections:
        """Returns the detections for the levels of the pyramid; see a call."""
        logits, deltas = self.predict(levels)
        anchors, sizes, _ = _anchors(levels, strides)
        counts = [height * width * PER_CELL for height, width in sizes]
        anchors = [anchors[sum(counts[:i]) :][:count] for i, count in enumerate(counts)]

        @jax.vmap
        def select(logits, deltas, image_size):
            found = [
                self._candidates(*level, image_size)
                for level in zip(logits, deltas, anchors, strict=True)
            ]
            boxes, scores, classes = (jnp.concatenate(x) for x in zip(*found, strict=True))
            by_class = jnp.where(
                classes[:, None] == jnp.arange(self.num_classes), scores[:, None], -1.0
            )
            found = select_detections(
                boxes,
                by_class,
                score_threshold=self.score_threshold,
                iou_threshold=self.iou_threshold,
                num=self.max_detections,
            )
            boxes = jnp.where(found.rows[:, None] >= 0, boxes[found.rows], 0.0)
            return Detections(boxes, found.classes, found.scores)

        return select(logits, deltas, image_size)

    def _candidates(self, logits, deltas, anchors, image_size):
        """Returns boxes, scores and classes of the highest scores of a level."""
        rows, classes, scores = best_pairs(logits, self.num_candidates)
        boxes = decode_boxes(jnp.asarray(anchors)[rows], deltas[rows], DEVIATIONS, image_size)
        has_area = (boxes[:, 2:] > boxes[:, :2]).all(-1)  # within the image
        return boxes, jnp.where(has_area, scores, -1.0), classes


def best_pairs(logits: jax.Array, num: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns rows, columns and probabilities (n,) of the highest logits, by falling probability.

    Equal ones are in the order of rows, then columns. The rows with the highest probabilities hold
    all of them, so that two small selections do in place of one among all pairs.

    Args:
      logits: logits of the anchors of a level for every class (A, K).
      num: number of pairs; n is smaller if there are fewer.
    """
    count, num_classes = logits.shape
    _, rows = lax.top_k(nn.sigmoid(logits).max(1), min(num, count))
    rows = jnp.sort(rows)
    scores = nn.sigmoid(logits[rows]).ravel()
    scores, places = lax.top_k(scores, min(num, len(scores)))
    return rows[places // num_classes], places % num_classes, scores


def _anchors(levels, strides):
    """Returns all anchors (A, 4), the sizes of the levels, and their strides."""
    strides = (*strides, *(strides[-1] * 2**i for i in range(1, NUM_COARSER + 1)))
    sizes = [x.shape[1:3] for x in levels]
    cells = [cell_anchors([size * stride for size in SIZES], RATIOS) for stride in strides]
    return grid_anchors(sizes, strides, cells), sizes, strides
