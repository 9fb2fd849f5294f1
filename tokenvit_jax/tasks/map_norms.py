"""The norms between the maps of a backbone and the head of a detector."""

import jax

from tokenvit_jax.layers import LayerNorm
from tokenvit_jax.models.backbone import Backbone

MAP_NORM_EPSILON = 1e-5  # of Swin's published detectors, for all backbones


def normed_maps(
    backbone: Backbone, images: jax.Array, train: bool, first: int = 0
) -> list[jax.Array]:
    """Returns the maps of a backbone, each after a LayerNorm unless they end in one.

    The norms belong to the module whose method calls this function, `nn.compact`.

    Args:
      backbone: the backbone.
      images: (B, H, W, C), normalised.
      train: whether the backbone behaves as in training.
      first: number of the first map.
    """
    maps = backbone.features(images, train)[first:]
    if backbone.has_normed_maps:
        return maps
    return [
        LayerNorm(MAP_NORM_EPSILON, x.dtype, name=f"map_norm_{i}")(x)
        for i, x in enumerate(maps, first + 1)
    ]
