"""The base of detectors in two stages: proposals on a feature pyramid, and heads on their features.

References:
  He et al. 2017, "Mask R-CNN"; MMDetection Contributors, "MMDetection" (2018).
"""

import abc
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from tokenvit_jax.heads.detection import COUNT, Detections, DetectorHead, Targets, l1_sums
from tokenvit_jax.heads.fpn import FeaturePyramid
from tokenvit_jax.heads.roi_heads import MASK_SIZE
from tokenvit_jax.heads.rpn import Proposals, Rpn, level_anchors, propose, rpn_losses
from tokenvit_jax.models.settings import CHANNELS, Rules
from tokenvit_jax.ops.boxes import clip_boxes, encode_boxes
from tokenvit_jax.ops.instance_masks import mask_targets, unpack_masks
from tokenvit_jax.ops.match_boxes import IGNORED, match_boxes, sample_matches
from tokenvit_jax.ops.roi_align import roi_align
from tokenvit_jax.ops.select_detections import select_detections

ROI_LEVELS = 4  # levels that regions read; the fifth is for proposals only


class Pyramid(NamedTuple):
    """What heads read from a batch.

    Attributes:
      levels: (B, h, w, C) each, the finest first.
      strides: their strides [pixels].
      semantic: logits of classes of stuff (B, h, w, S) and features (B, h, w, C) of all cells of
        the second level; None: a detector without semantic branch.
    """

    levels: list[jax.Array]
    strides: tuple[int, ...]
    semantic: tuple[jax.Array, jax.Array] | None = None

    @property
    def canvas(self) -> tuple[int, int]:
        """Height and width of the images [pixels]."""
        height, width = self.levels[0].shape[1:3]
        return height * self.strides[0], width * self.strides[0]


class Rois(NamedTuple):
    """Regions of a batch on which the heads are trained, the positive ones first.

    Attributes:
      boxes: (B, n, 4) [x1 y1 x2 y2, pixels].
      objects: number of the object that each matches (B, n); 0 for negative ones.
      positive: whether they match an object (B, n).
      valid: whether there is a region (B, n).
      proposed: whether they are proposals (B, n), and not boxes of the objects themselves.
    """

    boxes: jax.Array
    objects: jax.Array
    positive: jax.Array
    valid: jax.Array
    proposed: jax.Array


class Candidates(NamedTuple):
    """Boxes of a batch with a score for every class, before suppression.

    Attributes:
      boxes: (B, n, K, 4), or (B, n, 1, 4) for all classes [x1 y1 x2 y2, pixels].
      scores: (B, n, K); -1: no box.
    """

    boxes: jax.Array
    scores: jax.Array


class TwoStageHead(DetectorHead):
    """Base of detectors with proposals. Further attributes: `DetectorHead`.

    Attributes:
      hidden: channels of the hidden layers of the box head.
      num_mask_convs: convolutions of the mask head.
      num_candidates: highest scores of a level that can become proposals; twice as many in
        training.
      num_proposals: proposals of an image.
      num_anchors: anchors of a training image that are sampled for the proposals' losses.
      num_rois: regions of a training image that are sampled for the heads; at most a quarter of
        them are positive.
    """

    has_masks = True
    soft: ClassVar[bool] = False  # whether suppression lowers scores, as in `select_detections`
    rpn_beta: ClassVar[float] = 0.0  # of the smooth L1 loss of proposals; 0: L1
    inside_only: ClassVar[bool] = False  # whether anchors that cross the border are ignored
    train_factor: ClassVar[int] = 1  # proposals of a training image, in `num_proposals`
    valid: ClassVar[Rules] = {
        "hidden": CHANNELS, "num_mask_convs": COUNT, "num_candidates": COUNT,
        "num_proposals": COUNT, "num_anchors": COUNT, "num_rois": COUNT,
    }  # fmt: skip

    hidden: int = 1024
    num_mask_convs: int = 4
    num_candidates: int = 1000
    num_proposals: int = 1000
    num_anchors: int = 256
    num_rois: int = 512

    def setup(self):
        self.fpn = FeaturePyramid(self.channels, num_subsampled=1, dtype=self.dtype)
        self.rpn = Rpn(self.channels, self.init_std, self.dtype)

    # --------------------------------------------------------------------------------------------
    # What a detector adds
    # --------------------------------------------------------------------------------------------

    def neck(self, maps: list[jax.Array]) -> list[jax.Array]:
        """Returns the levels for the maps of a backbone."""
        return self.fpn(maps)

    def pyramid(self, levels: list[jax.Array], strides: tuple[int, ...]) -> Pyramid:
        """Returns what the heads read, for the levels and their strides."""
        return Pyramid(levels, strides)

    @abc.abstractmethod
    def roi_losses(
        self, pyramid: Pyramid, proposals: Proposals, targets: Targets, keys: jax.Array
    ) -> dict[str, jax.Array]:
        """Returns the losses of the heads by name, of every group of images.

        Args:
          pyramid: the pyramid.
          proposals: the proposals.
          targets: the objects.
          keys: a random key for each image (B,).
        """

    @abc.abstractmethod
    def classify(self, pyramid: Pyramid, boxes: jax.Array, image_size: jax.Array) -> Candidates:
        """Returns boxes and probabilities of the classes for proposals (B, n, 4)."""

    @abc.abstractmethod
    def mask_probabilities(
        self, pyramid: Pyramid, boxes: jax.Array, classes: jax.Array
    ) -> jax.Array:
        """Returns masks (B, n, 28, 28) in boxes (B, n, 4), of objects of the classes (B, n)."""

    # --------------------------------------------------------------------------------------------
    # Training
    # --------------------------------------------------------------------------------------------

    def losses(self, maps, strides, targets: Targets, keys):
        pyramid = self.pyramid(self.neck(maps), level_strides(strides))
        rpn_keys, roi_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
        losses, proposals = self.rpn_losses(pyramid, targets, rpn_keys)
        return losses | self.roi_losses(pyramid, proposals, targets, roi_keys)

    def rpn_losses(self, pyramid: Pyramid, targets: Targets, keys: jax.Array):
        """Returns the losses of the proposals, and the proposals for the heads."""
        outputs, sizes = self.rpn(pyramid.levels), [x.shape[1:3] for x in pyramid.levels]
        anchors = level_anchors(sizes, pyramid.strides)
        found = rpn_losses(
            outputs, anchors, sizes, pyramid.strides, targets, keys,
            num=self.num_anchors, max_positive=max(self.num_anchors // 2, 1),
            beta=self.rpn_beta, inside_only=self.inside_only,
        )  # fmt: skip
        losses = {
            "rpn_object": self.per_group(found.object, found.count),
            "rpn_box": self.per_group(found.box, found.count),
        }
        proposals = propose(
            outputs, anchors, targets.image_size,
            per_level=2 * self.num_candidates, num=self.train_factor * self.num_proposals,
        )  # fmt: skip
        return losses, proposals

    def sample_rois(
        self, proposals: Proposals, targets: Targets, keys: jax.Array, least: float = 0.5
    ) -> Rois:
        """Draws regions from the proposals and the objects themselves.

        Args:
          proposals: the proposals.
          targets: the objects.
          keys: a random key for each image (B,).
          least: least IoU of a proposal with the object that it matches.
        """

        @jax.vmap
        def sample(key, proposed, scores, boxes, classes):
            present = classes >= 0
            # Padding comes last, so that it does not change what is drawn.
            candidates = jnp.concatenate([proposed, boxes])
            valid = jnp.concatenate([scores >= 0, present])
            limits = {"positive": least, "negative": least, "least": least}
            matches = match_boxes(candidates, valid, boxes, present, **limits)
            # An object matches itself, and not an earlier one with the same box.
            own = jnp.where(present, jnp.arange(len(boxes), dtype=matches.dtype), IGNORED)
            matches = matches.at[len(proposed) :].set(own)
            found = sample_matches(key, matches, num=self.num_rois, max_positive=self.max_positive)
            objects = jnp.maximum(matches[found.indices], 0)
            is_proposal = found.indices < len(proposed)
            return Rois(
                candidates[found.indices], objects, found.positive, found.valid, is_proposal
            )

        return sample(keys, *proposals, targets.boxes, targets.classes)

    def box_losses(
        self,
        logits: jax.Array,
        deltas: jax.Array,
        rois: Rois,
        targets: Targets,
        deviations: tuple[float, ...],
        beta: float = 0.0,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the losses of classes and of boxes of every group.

        Args:
          logits: (B, n, K + 1).
          deltas: (B, n, K, 4), or (B, n, 1, 4) for all classes.
          rois: the regions.
          targets: the objects.
          deviations: as in `encode_boxes`.
          beta: of the smooth L1 loss; 0: L1.
        """
        classes = jnp.take_along_axis(targets.classes, rois.objects, 1)
        classes = jnp.where(rois.positive, classes, self.num_classes)  # background
        cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels(logits, classes)
        cross_entropy = jnp.where(rois.valid, cross_entropy, 0.0).sum(1)
        own = jnp.minimum(classes, deltas.shape[2] - 1)[..., None, None]
        deltas = jnp.take_along_axis(deltas, own, 2)[..., 0, :]
        objects = jnp.take_along_axis(targets.boxes, rois.objects[..., None], 1)
        coded = encode_boxes(rois.boxes, objects, deviations)
        box = l1_sums(deltas, coded, rois.positive, beta)
        count = rois.valid.sum(1)
        return self.per_group(cross_entropy, count), self.per_group(box, count)

    def mask_loss(
        self,
        predict: Callable[[jax.Array], jax.Array],
        rois: Rois,
        targets: Targets,
        canvas: tuple[int, int],
    ) -> jax.Array:
        """Returns the loss of masks of every group.

        Args:
          predict: maps regions (B, n, 4) to logits (B, n, 28, 28, K).
          rois: the regions, of which the first ones are positive.
          targets: the objects.
          canvas: height and width of the images [pixels].
        """
        rois = jax.tree.map(lambda x: x[:, : self.max_positive], rois)
        classes = jnp.take_along_axis(targets.classes, rois.objects, 1)

        @jax.vmap
        def wanted(masks, boxes, rois, objects):
            clipped = clip_boxes(rois, jnp.array(canvas))
            masks = unpack_masks(masks)[objects].astype(jnp.float32)
            return mask_targets(masks, boxes[objects], clipped, size=2 * MASK_SIZE)

        found = wanted(targets.masks, targets.boxes, rois.boxes, rois.objects)
        logits = of_class(predict(rois.boxes), classes)
        losses = optax.losses.sigmoid_binary_cross_entropy(logits, found.astype(jnp.float32))
        sums = jnp.where(rois.positive, losses.mean((2, 3)), 0.0).sum(1)
        return self.per_group(sums, rois.positive.sum(1))

    @property
    def max_positive(self) -> int:
        """Largest number of positive regions of a training image."""
        return max(self.num_rois // 4, 1)

    # --------------------------------------------------------------------------------------------
    # Inference
    # --------------------------------------------------------------------------------------------

    def __call__(self, maps, strides, image_size):
        return self.detect(self.neck(maps), level_strides(strides), image_size)

    def detect(
        self, levels: list[jax.Array], strides: tuple[int, ...], image_size: jax.Array
    ) -> Detections:
        """Returns the detections for the levels of the pyramid; see a call."""
        pyramid = self.pyramid(levels, strides)
        found = self.select(self.candidates(pyramid, image_size))
        masks = self.mask_probabilities(pyramid, found.boxes, jnp.maximum(found.classes, 0))
        return found._replace(masks=masks)

    def candidates(self, pyramid: Pyramid, image_size: jax.Array) -> Candidates:
        """Returns boxes with scores before suppression."""
        anchors = level_anchors([x.shape[1:3] for x in pyramid.levels], pyramid.strides)
        proposals = propose(
            self.rpn(pyramid.levels), anchors, image_size,
            per_level=self.num_candidates, num=self.num_proposals,
        )  # fmt: skip
        found = self.classify(pyramid, proposals.boxes, image_size)
        scores = jnp.where(proposals.scores[..., None] >= 0, found.scores, -1.0)
        return found._replace(scores=scores)

    def select(self, candidates: Candidates) -> Detections:
        """Returns the detections that suppression keeps, without masks."""

        @jax.vmap
        def select(boxes, scores):
            found = select_detections(
                boxes,
                scores,
                score_threshold=self.score_threshold,
                iou_threshold=self.iou_threshold,
                num=self.max_detections,
                soft=self.soft,
            )
            own = boxes[found.rows, jnp.minimum(found.classes, boxes.shape[1] - 1)]
            boxes = jnp.where(found.rows[:, None] >= 0, own, 0.0)
            return Detections(boxes, found.classes, found.scores)

        return select(*candidates)

    def features(self, pyramid: Pyramid, boxes: jax.Array, size: int) -> jax.Array:
        """Returns the features of regions (B, n, 4): (B, n, size, size, C)."""
        levels, strides = pyramid.levels[:ROI_LEVELS], pyramid.strides[:ROI_LEVELS]
        return roi_align(levels, strides, lax.stop_gradient(boxes), size=size)


def level_strides(strides: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the strides of the levels: those of the maps, and of the subsampled one."""
    return (*strides, 2 * strides[-1])


def of_class(logits: jax.Array, classes: jax.Array) -> jax.Array:
    """Returns the masks (B, n, m, m) of one class each.

    Args:
      logits: (B, n, m, m, K).
      classes: (B, n); -1 means any.
    """
    classes = jnp.maximum(classes, 0)[..., None, None, None]
    return jnp.take_along_axis(logits, classes, -1)[..., 0]


def for_regions(head: Callable, x: jax.Array):
    """Applies a head to features of regions (B, n, ...), which it takes as (B n, ...)."""
    batch, count = x.shape[:2]
    found = head(x.reshape(batch * count, *x.shape[2:]))
    return jax.tree.map(lambda y: y.reshape(batch, count, *y.shape[1:]), found)
