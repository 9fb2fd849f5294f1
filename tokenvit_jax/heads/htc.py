"""The hybrid task cascade: three stages of boxes and masks, and a semantic branch.

HTC++ has a transformer block on the coarsest map, and four convolutions in the box heads; its code
has not been published, and its parameters and costs were compared with those of Swin's paper.

References:
  Chen et al. 2019, "Hybrid Task Cascade for Instance Segmentation"; Liu et al. 2021, "Swin
  Transformer", which names HTC++; MMDetection Contributors, "MMDetection" (2018).
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.nn.initializers import truncated_normal

from tokenvit_jax.errors import UserError
from tokenvit_jax.heads.detection import Targets
from tokenvit_jax.heads.roi_heads import BOX_SIZE, MASK_SIZE, BoxHead, MaskHead
from tokenvit_jax.heads.rpn import Proposals
from tokenvit_jax.heads.semantic_branch import LEVEL, SemanticBranch, semantic_sums
from tokenvit_jax.heads.two_stage import (
    Candidates,
    Pyramid,
    Rois,
    TwoStageHead,
    for_regions,
    of_class,
)
from tokenvit_jax.layers import Attention, LayerNorm, Mlp
from tokenvit_jax.models.settings import CHANNELS, Rules
from tokenvit_jax.ops.boxes import decode_boxes
from tokenvit_jax.ops.roi_align import roi_align
from tokenvit_jax.valid import ZeroOr, whole

# Of the stages: deviations of the deltas, least IoU of a match, weight of the losses.
DEVIATIONS = (
    (0.1, 0.1, 0.2, 0.2),
    (0.05, 0.05, 0.1, 0.1),
    (0.033, 0.033, 0.067, 0.067),
)
LEAST_IOU = 0.5, 0.6, 0.7
WEIGHTS = 1.0, 0.5, 0.25
STAGES = range(3)
SEMANTIC_WEIGHT = 0.2
BETA = 1.0  # of the smooth L1 loss of boxes
EPSILON = 1e-5  # of LayerNorm


class GlobalBlock(nn.Module):
    """Transformer block with attention of all cells, and LayerNorm: (B, h, w, C) -> the same.

    Attributes:
      head_dim: channels of an attention head, a divisor of C.
      dtype: type of the computation.

    Raises:
      UserError: head_dim does not divide C.
    """

    head_dim: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape, channels = x.shape, x.shape[-1]
        if channels % self.head_dim:
            raise UserError(
                f"global_head_dim={self.head_dim} does not divide the {channels} channels of the "
                "last map; valid: a divisor, or 0"
            )

        def norm(name):
            return LayerNorm(EPSILON, self.dtype, name=name)

        x = x.reshape(shape[0], -1, channels)
        attention = Attention(
            channels // self.head_dim, "none", 0.02, self.dtype, name="attn"
        )  # fmt: skip
        x = x + attention(norm("norm1")(x)).y
        mlp = Mlp(4, self.dtype, truncated_normal(0.02), name="mlp")
        x = x + mlp(norm("norm2")(x))
        return norm("norm3")(x).reshape(shape)


class Htc(TwoStageHead):
    """Maps of strides 4 to 32 -> detections with masks. Further attributes: `TwoStageHead`.

    The defaults are those of HTC++.

    Attributes:
      num_box_convs: convolutions of a box head in front of one hidden layer; 0: there are two
        hidden layers instead, as in HTC.
      num_stuff: classes of the semantic branch.
      global_head_dim: channels of an attention head of the block on the coarsest map; 0: there is
        no block, as in HTC.
    """

    has_stuff = True
    soft = True
    rpn_beta = 1 / 9
    inside_only = True
    train_factor = 2
    valid: ClassVar[Rules] = {
        "num_box_convs": whole(0, 1000), "num_stuff": whole(1, 255),
        "global_head_dim": ZeroOr(CHANNELS),
    }  # fmt: skip

    score_threshold: float = 0.001
    num_box_convs: int = 4
    num_stuff: int = 183
    global_head_dim: int = 32

    def setup(self):
        super().setup()
        if self.global_head_dim:
            self.global_block = GlobalBlock(self.global_head_dim, self.dtype)
        self.semantic = SemanticBranch(self.num_stuff, self.channels, self.dtype)
        self.box_heads = [
            BoxHead(
                self.num_classes, self.hidden, self.num_box_convs, shared_deltas=True,
                init_std=self.init_std, dtype=self.dtype,
            )
            for _ in STAGES
        ]  # fmt: skip
        self.mask_heads = [
            MaskHead(
                self.num_classes, self.channels, self.num_mask_convs, has_flow=stage > 0,
                dtype=self.dtype,
            )
            for stage in STAGES
        ]  # fmt: skip

    def neck(self, maps):
        if self.global_head_dim:
            maps = [*maps[:-1], self.global_block(maps[-1])]
        return self.fpn(maps)

    def pyramid(self, levels, strides):
        return Pyramid(levels, strides, self.semantic(levels))

    def roi_losses(self, pyramid, proposals, targets: Targets, keys):
        keys = jax.vmap(lambda key: jax.random.split(key, 2 * len(STAGES)), out_axes=1)(keys)
        losses = {"semantic": self._semantic_loss(pyramid, targets)}
        for stage in STAGES:
            rois = self.sample_rois(proposals, targets, keys[2 * stage], LEAST_IOU[stage])
            logits, deltas = self._boxes(pyramid, rois.boxes, stage)
            classes, boxes = self.box_losses(logits, deltas, rois, targets, DEVIATIONS[stage], BETA)
            proposals = self._refined(rois, deltas, targets.image_size, stage)
            rois = self.sample_rois(proposals, targets, keys[2 * stage + 1], LEAST_IOU[stage])

            def predict(boxes, stage=stage):
                return self._masks(pyramid, boxes, stage)[-1]

            masks = self.mask_loss(predict, rois, targets, pyramid.canvas)
            own = {"class": classes, "box": boxes, "mask": masks}
            losses |= {f"{name}_{stage + 1}": WEIGHTS[stage] * loss for name, loss in own.items()}
        return losses

    def _semantic_loss(self, pyramid, targets):
        """Returns the semantic loss: a mean over all cells, also over those that do not count."""
        logits, _ = pyramid.semantic
        cells = logits.shape[1] * logits.shape[2]
        sums = semantic_sums(logits, targets.stuff_map)
        return SEMANTIC_WEIGHT * self.per_group(sums, jnp.full(len(sums), cells))

    def _refined(self, rois: Rois, deltas, image_size, stage):
        """Returns the proposals of the next sample: those of this one with their deltas."""
        boxes = _decode(rois.boxes, lax.stop_gradient(deltas), image_size, stage)
        return Proposals(boxes, jnp.where(rois.valid & rois.proposed, 1.0, -1.0))

    def classify(self, pyramid, boxes, image_size):
        every = []
        for stage in STAGES:
            logits, deltas = self._boxes(pyramid, boxes, stage)
            boxes = _decode(boxes, deltas, image_size, stage)
            every.append(logits)
        mean = sum(every) / len(STAGES)
        return Candidates(boxes[:, :, None], nn.softmax(mean)[..., :-1])

    def mask_probabilities(self, pyramid, boxes, classes):
        every = self._masks(pyramid, boxes, STAGES[-1], all_stages=True)
        return sum(nn.sigmoid(of_class(logits, classes)) for logits in every) / len(STAGES)

    def _boxes(self, pyramid, boxes, stage):
        """Returns the logits (B, n, K + 1) and deltas (B, n, 1, 4) of a stage."""
        return for_regions(self.box_heads[stage], self.features(pyramid, boxes, BOX_SIZE))

    def _masks(self, pyramid, boxes, stage, all_stages=False):
        """Returns the logits (B, n, 28, 28, K) of a stage, or of it and those before, as a list.

        The convolutions of a stage read what those of the stage before return.
        """
        x = self.features(pyramid, boxes, MASK_SIZE)

        def run(x):
            found, flow = [], None
            for i in range(stage + 1):
                flow = self.mask_heads[i].features(x, flow)
                if all_stages or i == stage:
                    found.append(self.mask_heads[i].predict(flow))
            return found

        return for_regions(run, x)

    def features(self, pyramid, boxes, size):
        """Returns the features of regions, with those of the semantic branch added."""
        x = super().features(pyramid, boxes, size)
        maps, strides = [pyramid.semantic[1]], [pyramid.strides[LEVEL]]
        added = roi_align(maps, strides, lax.stop_gradient(boxes), size=MASK_SIZE)
        if size != MASK_SIZE:
            factor = MASK_SIZE // size
            shape = *added.shape[:2], size, factor, size, factor, added.shape[-1]
            added = added.reshape(shape).mean((3, 5))
        return x + added


def _decode(boxes, deltas, image_size, stage):
    """Returns boxes (B, n, 4) moved by deltas (B, n, 1, 4) and clipped to the images."""

    @jax.vmap
    def decode(boxes, deltas, image_size):
        return decode_boxes(boxes, deltas[:, 0], DEVIATIONS[stage], image_size)

    return decode(boxes, deltas, image_size)
