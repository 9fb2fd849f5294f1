"""Mask R-CNN: proposals on a feature pyramid, and a box head and a mask head on their features."""

import flax.linen as nn
import jax

from tokenvit_jax.heads.detection import Targets
from tokenvit_jax.heads.roi_heads import BOX_SIZE, MASK_SIZE, BoxHead, MaskHead
from tokenvit_jax.heads.two_stage import Candidates, TwoStageHead, for_regions, of_class
from tokenvit_jax.ops.boxes import decode_boxes

DEVIATIONS = (0.1, 0.1, 0.2, 0.2)


class MaskRcnn(TwoStageHead):
    """Maps of strides 4 to 32 -> detections with masks. Attributes: `TwoStageHead`.

    References:
      He et al. 2017, "Mask R-CNN"; MMDetection Contributors, "MMDetection" (2018).
    """

    def setup(self):
        super().setup()
        self.box_head = BoxHead(
            self.num_classes, self.hidden, init_std=self.init_std, dtype=self.dtype
        )
        self.mask_head = MaskHead(
            self.num_classes, self.channels, self.num_mask_convs, dtype=self.dtype
        )

    def roi_losses(self, pyramid, proposals, targets: Targets, keys):
        rois = self.sample_rois(proposals, targets, keys)
        logits, deltas = self._boxes(pyramid, rois.boxes)
        classes, boxes = self.box_losses(logits, deltas, rois, targets, DEVIATIONS)

        def predict(boxes):
            return for_regions(self.mask_head, self.features(pyramid, boxes, MASK_SIZE))

        masks = self.mask_loss(predict, rois, targets, pyramid.canvas)
        return {"class": classes, "box": boxes, "mask": masks}

    def classify(self, pyramid, boxes, image_size):
        logits, deltas = self._boxes(pyramid, boxes)

        @jax.vmap
        def decode(boxes, deltas, image_size):
            return decode_boxes(boxes[:, None], deltas, DEVIATIONS, image_size)

        return Candidates(decode(boxes, deltas, image_size), nn.softmax(logits)[..., :-1])

    def mask_probabilities(self, pyramid, boxes, classes):
        logits = for_regions(self.mask_head, self.features(pyramid, boxes, MASK_SIZE))
        return nn.sigmoid(of_class(logits, classes))

    def _boxes(self, pyramid, boxes):
        """Returns the logits (B, n, K + 1) and deltas (B, n, K, 4) of regions (B, n, 4)."""
        return for_regions(self.box_head, self.features(pyramid, boxes, BOX_SIZE))
