"""Mask R-CNN: proposals on a feature pyramid, and a box head and a mask head on their features."""

from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.nn.initializers import normal, variance_scaling, xavier_uniform

from tokenvit_jax.heads.detection import COUNT, Detections, DetectorHead, Targets, l1_sums
from tokenvit_jax.heads.fpn import FeaturePyramid
from tokenvit_jax.heads.rpn import Proposals, Rpn, level_anchors, propose, rpn_losses
from tokenvit_jax.layers import Conv, PatchConvTranspose, dense
from tokenvit_jax.models.settings import CHANNELS, Rules
from tokenvit_jax.ops.boxes import clip_boxes, decode_boxes, encode_boxes
from tokenvit_jax.ops.instance_masks import mask_targets, unpack_masks
from tokenvit_jax.ops.match_boxes import IGNORED, match_boxes, sample_matches
from tokenvit_jax.ops.roi_align import roi_align
from tokenvit_jax.ops.select_detections import select_detections

DEVIATIONS = (0.1, 0.1, 0.2, 0.2)
BOX_SIZE, MASK_SIZE = 7, 14  # bins of the features of a region along an axis
ROI_LEVELS = 4  # levels that regions read; the fifth is for proposals only
IOU_OF_OBJECT = 0.5  # least IoU of a proposal with the object that it matches


class BoxHead(nn.Module):
    """Features of regions (n, 7, 7, C) -> logits (n, K + 1) and deltas (n, K, 4) in float32.

    The last logit is the background's.

    Attributes:
      num_classes: K.
      hidden: channels of both hidden layers.
      init_std: standard deviation of the initial weights of the logits; a tenth for the deltas.
      dtype: type of the computation.
    """

    num_classes: int
    hidden: int = 1024
    init_std: float = 0.01
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = x.reshape(x.shape[0], -1)
        for i in (1, 2):
            x = nn.relu(dense(self.hidden, self.dtype, f"fc{i}", xavier_uniform())(x))
        logits = dense(self.num_classes + 1, self.dtype, "logits", normal(self.init_std))(x)
        deltas = dense(4 * self.num_classes, self.dtype, "deltas", normal(self.init_std / 10))(x)
        deltas = deltas.reshape(x.shape[0], self.num_classes, 4)
        return logits.astype(jnp.float32), deltas.astype(jnp.float32)


class MaskHead(nn.Module):
    """Features of regions (n, 14, 14, C) -> logits of every class (n, 28, 28, K) in float32.

    Attributes:
      num_classes: K.
      channels: channels of the convolutions.
      num_convs: convolutions in front of the upsampling.
      dtype: type of the computation.
    """

    num_classes: int
    channels: int = 256
    num_convs: int = 4
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = variance_scaling(2.0, "fan_out", "normal")  # (rows, columns, in, out)
        for i in range(1, self.num_convs + 1):
            x = nn.relu(Conv(self.channels, 3, init=init, dtype=self.dtype, name=f"conv{i}")(x))
        x = nn.relu(PatchConvTranspose(self.channels, 2, self.dtype, init, name="upsample")(x))
        logits = Conv(self.num_classes, 1, init=init, dtype=self.dtype, name="logits")(x)
        return logits.astype(jnp.float32)


class Rois(NamedTuple):
    """Regions of a batch on which the heads are trained, the positive ones first.

    Attributes:
      boxes: (B, n, 4) [x1 y1 x2 y2, pixels].
      objects: number of the object that each matches (B, n); 0 for negative ones.
      positive: whether they match an object (B, n).
      valid: whether there is a region (B, n).
    """

    boxes: jax.Array
    objects: jax.Array
    positive: jax.Array
    valid: jax.Array


class MaskRcnn(DetectorHead):
    """Maps of strides 4 to 32 -> detections with masks. Further attributes: `DetectorHead`.

    Attributes:
      hidden: channels of the hidden layers of the box head.
      num_mask_convs: convolutions of the mask head.
      num_candidates: highest scores of a level that can become proposals; twice as many in
        training.
      num_proposals: proposals of an image.
      num_anchors: anchors of a training image that are sampled for the proposals' losses.
      num_rois: regions of a training image that are sampled for the heads; at most a quarter of
        them are positive.

    References:
      He et al. 2017, "Mask R-CNN"; MMDetection Contributors, "MMDetection" (2018).
    """

    has_masks = True
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
        self.box_head = BoxHead(self.num_classes, self.hidden, self.init_std, self.dtype)
        self.mask_head = MaskHead(self.num_classes, self.channels, self.num_mask_convs, self.dtype)

    def losses(self, maps, strides, targets: Targets, keys):
        levels = self.fpn(maps)
        strides = _level_strides(strides)
        rpn_keys, roi_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
        losses, proposals = self.rpn_losses(levels, strides, targets, rpn_keys)
        rois = self.sample_rois(proposals, targets, roi_keys)
        return losses | self.roi_losses(levels, strides, rois, targets)

    def rpn_losses(self, levels, strides, targets, keys):
        """Returns the losses of the proposals, and the proposals for the heads."""
        outputs, sizes = self.rpn(levels), [x.shape[1:3] for x in levels]
        anchors = level_anchors(sizes, strides)
        found = rpn_losses(
            outputs, anchors, sizes, strides, targets, keys,
            num=self.num_anchors, max_positive=max(self.num_anchors // 2, 1),
        )  # fmt: skip
        losses = {
            "rpn_object": self.per_group(found.object, found.count),
            "rpn_box": self.per_group(found.box, found.count),
        }
        proposals = propose(
            outputs, anchors, targets.image_size,
            per_level=2 * self.num_candidates, num=self.num_proposals,
        )  # fmt: skip
        return losses, proposals

    def sample_rois(self, proposals: Proposals, targets: Targets, keys: jax.Array) -> Rois:
        """Draws regions from the proposals and the objects themselves."""

        @jax.vmap
        def sample(key, proposed, scores, boxes, classes):
            present = classes >= 0
            # Padding comes last, so that it does not change what is drawn.
            candidates = jnp.concatenate([proposed, boxes])
            valid = jnp.concatenate([scores >= 0, present])
            least = {"positive": IOU_OF_OBJECT, "negative": IOU_OF_OBJECT, "least": IOU_OF_OBJECT}
            matches = match_boxes(candidates, valid, boxes, present, **least)
            # An object matches itself, and not an earlier one with the same box.
            own = jnp.where(present, jnp.arange(len(boxes), dtype=matches.dtype), IGNORED)
            matches = matches.at[len(proposed) :].set(own)
            found = sample_matches(key, matches, num=self.num_rois, max_positive=self._max_positive)
            objects = jnp.maximum(matches[found.indices], 0)
            return Rois(candidates[found.indices], objects, found.positive, found.valid)

        return sample(keys, *proposals, targets.boxes, targets.classes)

    def roi_losses(self, levels, strides, rois: Rois, targets: Targets):
        """Returns the losses of the box head and the mask head."""
        classes = jnp.take_along_axis(targets.classes, rois.objects, 1)
        classes = jnp.where(rois.positive, classes, self.num_classes)  # background
        logits, deltas = self._boxes(levels, strides, rois.boxes)
        cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels(logits, classes)
        cross_entropy = jnp.where(rois.valid, cross_entropy, 0.0).sum(1)
        own = jnp.minimum(classes, self.num_classes - 1)[..., None, None]
        deltas = jnp.take_along_axis(deltas, own, 2)[..., 0, :]
        objects = jnp.take_along_axis(targets.boxes, rois.objects[..., None], 1)
        box = l1_sums(deltas, encode_boxes(rois.boxes, objects, DEVIATIONS), rois.positive)
        count = rois.valid.sum(1)
        return {
            "class": self.per_group(cross_entropy, count),
            "box": self.per_group(box, count),
            "mask": self._mask_loss(levels, strides, rois, targets),
        }

    def _mask_loss(self, levels, strides, rois, targets):
        """Returns the mask loss; positive regions are the first ones of the sample."""
        rois = jax.tree.map(lambda x: x[:, : self._max_positive], rois)
        classes = jnp.take_along_axis(targets.classes, rois.objects, 1)
        canvas = jnp.array([side * strides[0] for side in levels[0].shape[1:3]])

        @jax.vmap
        def wanted(masks, boxes, rois, objects):
            clipped = clip_boxes(rois, canvas)
            masks = unpack_masks(masks)[objects].astype(jnp.float32)
            return mask_targets(masks, boxes[objects], clipped, size=2 * MASK_SIZE)

        found = wanted(targets.masks, targets.boxes, rois.boxes, rois.objects)
        logits = self._masks(levels, strides, rois.boxes, jnp.maximum(classes, 0))
        losses = optax.losses.sigmoid_binary_cross_entropy(logits, found.astype(jnp.float32))
        sums = jnp.where(rois.positive, losses.mean((2, 3)), 0.0).sum(1)
        return self.per_group(sums, rois.positive.sum(1))

    def __call__(self, maps, strides, image_size):
        return self.detect(self.fpn(maps), _level_strides(strides), image_size)

    def detect(self, levels, strides, image_size) -> Detections:
        """Returns the detections for the levels of the pyramid; see a call."""
        anchors = level_anchors([x.shape[1:3] for x in levels], strides)
        proposals = propose(
            self.rpn(levels), anchors, image_size,
            per_level=self.num_candidates, num=self.num_proposals,
        )  # fmt: skip
        logits, deltas = self._boxes(levels, strides, proposals.boxes)

        @jax.vmap
        def select(proposals, logits, deltas, image_size):
            scores = nn.softmax(logits)[:, :-1]
            scores = jnp.where(proposals.scores[:, None] >= 0, scores, -1.0)
            boxes = decode_boxes(proposals.boxes[:, None], deltas, DEVIATIONS, image_size)
            found = select_detections(
                boxes,
                scores,
                score_threshold=self.score_threshold,
                iou_threshold=self.iou_threshold,
                num=self.max_detections,
            )
            boxes = jnp.where(found.rows[:, None] >= 0, boxes[found.rows, found.classes], 0.0)
            return boxes, found.classes, found.scores

        boxes, classes, scores = select(proposals, logits, deltas, image_size)
        masks = self._masks(levels, strides, boxes, jnp.maximum(classes, 0))
        return Detections(boxes, classes, scores, nn.sigmoid(masks))

    def _boxes(self, levels, strides, boxes):
        """Returns the logits (B, n, K + 1) and deltas (B, n, K, 4) of regions (B, n, 4)."""
        batch, count = boxes.shape[:2]
        features = self._features(levels, strides, boxes, BOX_SIZE)
        found = self.box_head(features.reshape(batch * count, *features.shape[2:]))
        return jax.tree.map(lambda x: x.reshape(batch, count, *x.shape[1:]), found)

    def _masks(self, levels, strides, boxes, classes):
        """Returns the logits (B, n, 28, 28) of regions (B, n, 4) for their classes (B, n)."""
        batch, count = boxes.shape[:2]
        features = self._features(levels, strides, boxes, MASK_SIZE)
        logits = self.mask_head(features.reshape(batch * count, *features.shape[2:]))
        own = jnp.take_along_axis(logits, classes.reshape(-1, 1, 1, 1), 3)[..., 0]
        return own.reshape(batch, count, *own.shape[1:])

    def _features(self, levels, strides, boxes, size):
        levels, strides = levels[:ROI_LEVELS], strides[:ROI_LEVELS]
        return roi_align(levels, strides, lax.stop_gradient(boxes), size=size)

    @property
    def _max_positive(self):
        return max(self.num_rois // 4, 1)


def _level_strides(strides):
    """Returns the strides of the levels: those of the maps, and of the subsampled one."""
    return (*strides, 2 * strides[-1])
