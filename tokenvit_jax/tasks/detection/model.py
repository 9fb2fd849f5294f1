"""The detector: a hierarchical backbone and a head on its maps."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from tokenvit_jax.heads import Detections, DetectorHead, Htc, MaskRcnn, RetinaNet, Targets
from tokenvit_jax.heads.two_stage import Candidates, level_strides
from tokenvit_jax.models.backbone import BackboneModel
from tokenvit_jax.tasks.detection import views
from tokenvit_jax.tasks.map_norms import normed_maps
from tokenvit_jax.tasks.overrides import check_hierarchical, choose_head, make_backbone, make_head

HEADS: dict[str, type[DetectorHead]] = {
    "mask_rcnn": MaskRcnn, "retinanet": RetinaNet, "htc": Htc
}  # fmt: skip


class Detector(BackboneModel):
    """Applies the head of a detector to the maps of a hierarchical backbone.

    Attributes:
      backbone: the backbone.
      head: the head.
    """

    head: DetectorHead

    def __call__(
        self, images: jax.Array, train: bool = False, image_size: jax.Array | None = None
    ) -> Detections:
        """Returns the detections for images.

        Args:
          images: (B, H, W, C), normalised, each at the top left of its canvas.
          train: whether the backbone behaves as in training.
          image_size: height and width of each image (B, 2) [pixels]; None: of the canvas.
        """
        if image_size is None:
            whole = jnp.array(images.shape[1:3], jnp.int32)
            image_size = jnp.broadcast_to(whole, (images.shape[0], 2))  # also of a symbolic batch
        return self.head(*self.head_inputs(images, train), image_size)

    def detect_views(
        self,
        images: Sequence[jax.Array],
        sizes: Sequence[jax.Array],
        original_size: jax.Array,
        limits: Sequence[tuple[float, float]],
        flip: bool,
    ) -> Detections:
        """Returns the detections of several views together, in pixels of the original images.

        Args:
          images: of every view (B, H, W, C), normalised, each at the top left of its canvas.
          sizes: of every view, heights and widths of the images (B, 2) [pixels].
          original_size: heights and widths of the original images (B, 2) [pixels].
          limits: of every view, as in :func:`~tokenvit_jax.tasks.detection.views.limited`.
          flip: whether every view is also mirrored.
        """
        seen, found = [], []
        for pixels, size, limit in zip(images, sizes, limits, strict=True):
            for mirrored in (False, True) if flip else (False,):
                x = views.mirror(pixels, size) if mirrored else pixels
                maps, strides = self.head_inputs(x, False)
                pyramid = self.head.pyramid(self.head.neck(maps), level_strides(strides))
                boxes, scores = self.head.candidates(pyramid, size)
                boxes = views.to_original(boxes, size, original_size, mirrored)
                found.append(views.limited(Candidates(boxes, scores), limit))
                seen.append((pyramid, size, mirrored))
        detections, masks = self.head.select(views.joined(found)), 0.0
        classes = jnp.maximum(detections.classes, 0)
        for pyramid, size, mirrored in seen:
            boxes = views.to_view(detections.boxes, size, original_size, mirrored)
            own = self.head.mask_probabilities(pyramid, boxes, classes)
            masks += own[..., ::-1] if mirrored else own
        return detections._replace(masks=masks / len(seen))

    def losses(
        self, images: jax.Array, train: bool, targets: Targets, keys: jax.Array
    ) -> dict[str, jax.Array]:
        """Returns the losses of every group of images by name, (B / loss_group,) each.

        Args:
          images: as in a call.
          train: whether the backbone behaves as in training.
          targets: the objects.
          keys: a random key for each image (B,).
        """
        return self.head.losses(*self.head_inputs(images, train), targets, keys)

    @nn.compact
    def head_inputs(self, images, train):
        """Returns the maps that the head reads, and their strides."""
        first = self.head.first_map
        maps = normed_maps(self.backbone, images, train, first)
        return maps, self.backbone.strides[first:]


def head_class(name: str) -> type[DetectorHead]:
    """Returns the class of a head.

    Raises:
      UserError: there is no such head.
    """
    return choose_head(name, HEADS)


def make_detector(
    config: ConfigDict, num_classes: int, axis_name: str | tuple[str, ...] | None
) -> Detector:
    """Returns the detector of a configuration.

    Args:
      config: provides `model`, `model_overrides`, `head`, `head_overrides` and `dtype`.
      num_classes: number of classes.
      axis_name: mapped axis that the batch is split over; None under `jax.jit`.

    Raises:
      UserError: the model, the head or an override is unknown, or the model is plain.
    """
    check_hierarchical(config, "detectors read")
    common = {"dtype": jnp.dtype(config.dtype), "axis_name": axis_name}
    head = make_head(head_class(config.head), config, num_classes=num_classes, **common)
    return Detector(make_backbone(config, **common), head)
