"""What the heads of detectors share: targets, detections, and losses of groups of images."""

import abc
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tokenvit_jax.heads.head import LOGITS, Head
from tokenvit_jax.models.settings import CHANNELS, Rules
from tokenvit_jax.valid import Number, whole

PADDING = 32  # images are padded to multiples of it, the largest stride of a backbone [pixels]
COUNT = whole(1, 2**20)


class Targets(NamedTuple):
    """The objects of a batch of images, padded to M.

    Attributes:
      image_size: height and width of the image in its canvas (B, 2) int32 [pixels].
      boxes: (B, M, 4) float32 [x1 y1 x2 y2, pixels].
      classes: (B, M) int32; -1: no object.
      masks: (B, M, h, w / 8) uint8, masks in the frame of their box, rows packed by
        `numpy.packbits`; None: detectors without masks.
      stuff_map: class of every eighth pixel along both axes (B, H / 8, W / 8) int32; -1: the pixel
        does not count; None: detectors without semantic branch.
    """

    image_size: jax.Array
    boxes: jax.Array
    classes: jax.Array
    masks: jax.Array | None = None
    stuff_map: jax.Array | None = None


class Detections(NamedTuple):
    """Detections of a batch of images, by falling score.

    Attributes:
      boxes: (B, D, 4) float32 [x1 y1 x2 y2, pixels].
      classes: (B, D) int32; -1: no detection.
      scores: (B, D) float32.
      masks: (B, D, 28, 28) float32, probabilities in the frame of the box; None: no masks.
    """

    boxes: jax.Array
    classes: jax.Array
    scores: jax.Array
    masks: jax.Array | None = None


class DetectorHead(Head, abc.ABC):
    """Base of the heads of detectors.

    A loss is a sum over the images of a group, divided by a count of the group, so that the mean
    over groups does not depend on devices and micro-batches.

    Attributes:
      num_classes: K.
      channels: channels of the feature pyramid and of convolutions on it.
      loss_group: consecutive images whose losses are divided by a common count; published runs have
        two images on a device.
      score_threshold: only scores above it are detections.
      iou_threshold: IoU of two detections of a class above which the lower one is dropped.
      max_detections: detections D of an image.
      init_std: standard deviation of the initial weights of the convolutions that predict: 0.01 in
        published detectors.
      dtype: type of the computation; parameters, boxes, scores and losses are float32.
      axis_name: mapped axis that the batch is split over; None under jit. Nothing depends on it.
    """

    reads = "maps"
    first_map = 0  # number of the finest map that the head reads
    has_masks = False
    has_stuff = False  # whether training reads the classes of all pixels
    valid: ClassVar[Rules] = LOGITS | {
        "channels": CHANNELS,
        "loss_group": COUNT,
        "score_threshold": Number(0, 1),
        "iou_threshold": Number(0, 1),
        "max_detections": COUNT,
        "init_std": Number(1e-8, 10),
    }

    num_classes: int
    channels: int = 256
    loss_group: int = 2
    score_threshold: float = 0.05
    iou_threshold: float = 0.5
    max_detections: int = 100
    init_std: float = 0.01
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @abc.abstractmethod
    def __call__(
        self, maps: list[jax.Array], strides: tuple[int, ...], image_size: jax.Array
    ) -> Detections:
        """Returns the detections of a batch.

        Args:
          maps: the backbone's maps from `first_map` on, (B, h, w, C) each.
          strides: strides of the maps [pixels].
          image_size: height and width of each image in its canvas (B, 2) [pixels].
        """

    @abc.abstractmethod
    def losses(
        self, maps: list[jax.Array], strides: tuple[int, ...], targets: Targets, keys: jax.Array
    ) -> dict[str, jax.Array]:
        """Returns the losses of every group of images by name, (B / loss_group,) each.

        Args:
          maps: as in a call.
          strides: as in a call.
          targets: the objects.
          keys: a random key for each image (B,).
        """

    def per_group(self, sums: jax.Array, counts: jax.Array) -> jax.Array:
        """Returns the sums of groups over the counts of groups, from values of images (B,)."""
        shape = -1, self.loss_group
        return sums.reshape(shape).sum(1) / jnp.maximum(counts.reshape(shape).sum(1), 1)


def padded_sizes(image_size: jax.Array) -> jax.Array:
    """Returns the sizes of images that are padded alone, (..., 2) [pixels]: multiples of 32.

    Anchors beyond them take no part in training.
    """
    return -(-image_size // PADDING) * PADDING


def focal_sums(logits: jax.Array, classes: jax.Array, counted: jax.Array) -> jax.Array:
    """Returns the sum of the focal loss over the anchors of every image, (B,).

    Args:
      logits: (B, A, K).
      classes: class of every anchor (B, A); -1: background.
      counted: anchors that count (B, A).

    References:
      Lin et al. 2017, "Focal Loss for Dense Object Detection", Eq. 5, alpha 0.25, gamma 2.
    """
    wanted = (classes[..., None] == jnp.arange(logits.shape[-1])).astype(jnp.float32)
    losses = optax.losses.sigmoid_focal_loss(logits, wanted, alpha=0.25, gamma=2.0)
    return jnp.where(counted[..., None], losses, 0.0).sum((1, 2))


def l1_sums(
    found: jax.Array, wanted: jax.Array, counted: jax.Array, beta: float = 0.0
) -> jax.Array:
    """Returns the sum of the L1 loss, or the smooth L1 loss, of every image, (B,).

    Args:
      found: (B, n, 4).
      wanted: (B, n, 4).
      counted: rows that count (B, n); the others may hold any numbers.
      beta: difference below which the loss is quadratic; 0: none.

    References:
      Girshick 2015, "Fast R-CNN", Eq. 3, where beta is 1.
    """
    # Rows that do not count are replaced first: their gradients might not be finite.
    distance = abs(jnp.where(counted[..., None], found - wanted, 0.0))
    if beta:
        distance = jnp.where(distance < beta, distance**2 / (2 * beta), distance - beta / 2)
    return distance.sum((1, 2))
