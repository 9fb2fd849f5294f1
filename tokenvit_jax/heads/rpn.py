"""The region proposal network: boxes that may hold an object, from five levels of a pyramid."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.nn.initializers import normal

from tokenvit_jax.heads.detection import Targets, l1_sums, padded_sizes
from tokenvit_jax.layers import Conv
from tokenvit_jax.ops.anchors import cell_anchors, grid_anchors, inside_image, valid_anchors
from tokenvit_jax.ops.boxes import decode_boxes, encode_boxes
from tokenvit_jax.ops.match_boxes import match_boxes, sample_matches
from tokenvit_jax.ops.nms import nms

SIZE = 8  # of anchors, in strides of their level
RATIOS = (0.5, 1.0, 2.0)  # height over width
DEVIATIONS = (1.0, 1.0, 1.0, 1.0)
IOU_THRESHOLD = 0.7  # of suppression among the proposals of a level


class Proposals(NamedTuple):
    """Proposals of a batch, by falling score.

    Attributes:
      boxes: (B, n, 4) float32 [x1 y1 x2 y2, pixels].
      scores: (B, n) float32; -1: no proposal.
    """

    boxes: jax.Array
    scores: jax.Array


class RpnOutputs(NamedTuple):
    """Predictions for all anchors, level by level.

    Attributes:
      logits: (B, A) float32 each.
      deltas: (B, A, 4) float32 each.
    """

    logits: list[jax.Array]
    deltas: list[jax.Array]


class Rpn(nn.Module):
    """Levels (B, h, w, C) -> logits and deltas of the anchors of each level.

    Attributes:
      channels: channels of the convolution.
      init_std: standard deviation of the initial weights.
      dtype: type of the computation.

    References:
      Ren et al. 2015, "Faster R-CNN"; MMDetection Contributors, "MMDetection" (2018).
    """

    channels: int
    init_std: float = 0.01
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, levels: Sequence[jax.Array]) -> RpnOutputs:
        def conv(dim, kernel_size, name):
            return Conv(
                dim, kernel_size, init=normal(self.init_std), dtype=self.dtype, name=name
            )  # fmt: skip

        shared = conv(self.channels, 3, "shared")
        to_logits, to_deltas = conv(len(RATIOS), 1, "logits"), conv(4 * len(RATIOS), 1, "deltas")
        maps = [nn.relu(shared(x)) for x in levels]
        logits = [to_logits(x).reshape(x.shape[0], -1) for x in maps]
        deltas = [to_deltas(x).reshape(x.shape[0], -1, 4) for x in maps]
        return RpnOutputs(*jax.tree.map(lambda x: x.astype(jnp.float32), (logits, deltas)))


def level_anchors(sizes: Sequence[tuple[int, int]], strides: Sequence[int]) -> list[jax.Array]:
    """Returns the anchors (A, 4) of every level.

    Args:
      sizes: height and width of the levels.
      strides: strides of the levels [pixels].
    """
    return [
        jnp.asarray(grid_anchors([size], [stride], [cell_anchors([SIZE * stride], RATIOS)]))
        for size, stride in zip(sizes, strides, strict=True)
    ]


def propose(
    outputs: RpnOutputs,
    anchors: Sequence[jax.Array],
    image_size: jax.Array,
    *,
    per_level: int,
    num: int,
) -> Proposals:
    """Returns the ``num`` best boxes of every image, without gradient.

    Args:
      outputs: predictions for all anchors.
      anchors: result of :func:`level_anchors`.
      image_size: height and width of each image in its canvas (B, 2) [pixels].
      per_level: highest scores of a level that take part.
      num: number of proposals.
    """

    def best(logits, deltas, anchors, image_size):
        """Returns the boxes and scores (per_level,) of a level of an image."""
        kept = min(per_level, len(logits))
        scores, places = lax.top_k(nn.sigmoid(logits), kept)
        boxes = decode_boxes(anchors[places], deltas[places], DEVIATIONS, image_size)
        has_area = (boxes[:, 2:] > boxes[:, :2]).all(-1)
        scores = jnp.where(has_area, scores, -1.0)
        padding = per_level - kept
        return (
            jnp.pad(boxes, ((0, padding), (0, 0))),
            jnp.pad(scores, (0, padding), constant_values=-1.0),
        )

    @jax.vmap
    def select(logits, deltas, image_size):
        found = [best(*level, image_size) for level in zip(logits, deltas, anchors, strict=True)]
        boxes, scores = (jnp.stack(x) for x in zip(*found, strict=True))
        kept = jax.vmap(lambda b, s: nms(b, s, IOU_THRESHOLD, valid=s >= 0))(boxes, scores)
        scores = jnp.where(kept, scores, -1.0).ravel()
        scores, places = lax.top_k(scores, min(num, len(scores)))
        return Proposals(boxes.reshape(-1, 4)[places], scores)

    return jax.tree.map(lax.stop_gradient, select(outputs.logits, outputs.deltas, image_size))


class RpnLosses(NamedTuple):
    """Sums of the losses of every image (B,), and the count that divides them.

    Attributes:
      object: cross-entropy of the sampled anchors.
      box: L1, or smooth L1, losses of the deltas of the positive ones.
      count: sampled anchors, at least one positive and one negative.
    """

    object: jax.Array
    box: jax.Array
    count: jax.Array


def rpn_losses(
    outputs: RpnOutputs,
    anchors: Sequence[jax.Array],
    sizes: Sequence[tuple[int, int]],
    strides: Sequence[int],
    targets: Targets,
    keys: jax.Array,
    *,
    num: int,
    max_positive: int,
    beta: float = 0.0,
    inside_only: bool = False,
) -> RpnLosses:
    """Returns the losses of every image for a random sample of the anchors.

    Args:
      outputs: predictions for all anchors.
      anchors: result of :func:`level_anchors`.
      sizes: height and width of the levels.
      strides: strides of the levels [pixels].
      targets: the objects.
      keys: a random key for each image (B,).
      num: anchors of a sample.
      max_positive: largest number of positive ones among them.
      beta: of the smooth L1 loss of boxes; 0: L1.
      inside_only: whether anchors that cross the border of their image take no part.
    """
    every = jnp.concatenate(anchors)

    @jax.vmap
    def one(key, logits, deltas, image_size, boxes, classes):
        valid = valid_anchors(sizes, strides, len(RATIOS), padded_sizes(image_size))
        if inside_only:
            valid &= inside_image(every, image_size)
        matches = match_boxes(
            every, valid, boxes, classes >= 0, positive=0.7, negative=0.3, least=0.3
        )
        sample = sample_matches(key, matches, num=num, max_positive=max_positive)
        wanted = sample.positive.astype(jnp.float32)
        losses = optax.losses.sigmoid_binary_cross_entropy(logits[sample.indices], wanted)
        objects = boxes[jnp.maximum(matches[sample.indices], 0)]
        coded = encode_boxes(every[sample.indices], objects, DEVIATIONS)
        box = l1_sums(deltas[sample.indices][None], coded[None], sample.positive[None], beta)[0]
        positive = sample.positive.sum()
        negative = (sample.valid & ~sample.positive).sum()
        count = jnp.maximum(positive, 1) + jnp.maximum(negative, 1)
        return RpnLosses(jnp.where(sample.valid, losses, 0.0).sum(), box, count)

    logits, deltas = (jnp.concatenate(x, 1) for x in outputs)
    return one(keys, logits, deltas, targets.image_size, targets.boxes, targets.classes)
