"""The pose model: a hierarchical backbone and a head that predicts heat maps."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from tokenvit_jax.heads import DeconvHead, MtaHead, PoseHead
from tokenvit_jax.models.backbone import BackboneModel
from tokenvit_jax.tasks.map_norms import normed_maps
from tokenvit_jax.tasks.overrides import check_hierarchical, choose_head, make_backbone, make_head

HEADS: dict[str, type[PoseHead]] = {"mta": MtaHead, "deconvolution": DeconvHead}


class PoseModel(BackboneModel):
    """Predicts a heat map for every keypoint of the person in an image.

    Attributes:
      backbone: the backbone.
      head: the head.
    """

    head: PoseHead

    @property
    def local_statistics(self) -> bool:
        return super().local_statistics or getattr(self.head, "batch_norm", "global") != "global"

    @property
    def multiple(self) -> int:
        return self.backbone.strides[-1]

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Returns heat maps (B, H / 4, W / 4, K) in float32.

        Args:
          images: (B, H, W, C), normalised.
          train: whether backbone and head behave as in training.
        """
        maps = normed_maps(self.backbone, images, train, self.head.first_map)
        return self.head(maps, train)


def head_class(name: str) -> type[PoseHead]:
    """Returns the class of a head.

    Raises:
      UserError: there is no such head.
    """
    return choose_head(name, HEADS)


def make_pose_model(
    config: ConfigDict, num_keypoints: int, axis_name: str | tuple[str, ...] | None
) -> PoseModel:
    """Returns the model of a configuration.

    Args:
      config: provides `model`, `model_overrides`, `head`, `head_overrides` and `dtype`.
      num_keypoints: K.
      axis_name: mapped axis that the batch is split over; None under `jax.jit`.

    Raises:
      UserError: the model, the head or an override is unknown, or the model is plain.
    """
    check_hierarchical(config, "heads for poses read")
    common = {"dtype": jnp.dtype(config.dtype), "axis_name": axis_name}
    head = make_head(head_class(config.head), config, num_keypoints=num_keypoints, **common)
    return PoseModel(make_backbone(config, **common), head)
