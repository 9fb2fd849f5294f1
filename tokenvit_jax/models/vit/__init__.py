"""Vision transformers with one map of tokens: ViT (Dosovitskiy et al. 2021), DeiT (Touvron 2021).

Parameters and the order of operations match timm's models of the same names. Settings add what
DINOv2 (Oquab et al. 2023; registers: Darcet et al. 2024) and the image towers of CLIP (Radford et
al. 2021) have in addition. In a hybrid, the patches come from a ResNet.
"""

from tokenvit_jax.models.vit.block import Block, Origin
from tokenvit_jax.models.vit.settings import QK_NORMS, SIZES, ViTSettings
from tokenvit_jax.models.vit.transformer import VisionTransformer, resize_positions

__all__ = [
    "QK_NORMS", "SIZES", "Block", "Origin", "ViTSettings", "VisionTransformer", "resize_positions"
]  # fmt: skip
