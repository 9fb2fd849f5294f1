"""Small models of every kind that can be expedited."""

import jax

from tokenvit_jax.heads import MaskTransformer
from tokenvit_jax.models.swin import Swin, SwinSettings, SwinV2, SwinV2Settings
from tokenvit_jax.models.vit import VisionTransformer, ViTSettings
from tokenvit_jax.tasks.segmentation.model import Segmenter

SETTINGS = {"dim": 16, "depth": 3, "num_heads": 2, "patch_size": 4, "position_size": (32, 32)}
VIT = VisionTransformer(ViTSettings(num_classes=10, **SETTINGS, init_std=0.3))
SWIN = {"num_classes": 5, "dims": (8, 12), "num_heads": (2, 3), "depths": (1, 3)}
MODELS = {
    "vit": VIT,
    "segmenter": Segmenter(VIT, MaskTransformer(num_classes=5, depth=1, head_dim=8)),
    "swin": Swin(SwinSettings(**SWIN, window_size=3)),
    "swinv2": SwinV2(SwinV2Settings(**SWIN, window_size=3, pretrained_window_sizes=(3, 3))),
}


def images_of(size):
    """Returns the shape of one image of (height, width) pixels."""
    return jax.ShapeDtypeStruct((1, *size, 3), jax.numpy.float32)
