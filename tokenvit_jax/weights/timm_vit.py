"""timm's layouts of ViT and DeiT, `VisionTransformer` and `VisionTransformerDistilled`."""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from tokenvit_jax.weights.rules import KERNEL, WITHOUT_BATCH, Layout, Rule, linear, norm


def block_rules(path: str) -> list[Rule]:
    """Returns the rules of one block of timm's transformers.

    Args:
      path: path of a submodule of the block, with PART in place of "norm1", "attention" etc.
    """
    norm1, attention, norm2, mlp = (
        path.replace("PART", part) for part in ("norm1", "attention", "norm2", "mlp")
    )
    return [
        *norm(norm1, "blocks.{}.norm1"),
        *linear(f"{attention}/qkv", "blocks.{}.attn.qkv"),
        *linear(f"{attention}/proj", "blocks.{}.attn.proj"),
        *norm(norm2, "blocks.{}.norm2"),
        *linear(f"{mlp}/fc1", "blocks.{}.mlp.fc1"),
        *linear(f"{mlp}/fc2", "blocks.{}.mlp.fc2"),
    ]


def rules(model: nn.Module) -> list[Rule]:
    """Returns the rules of a plain vision transformer."""
    return [
        Rule("class_token", "cls_token", WITHOUT_BATCH),
        Rule("distillation_token", "dist_token", WITHOUT_BATCH),
        Rule("position", "pos_embed", WITHOUT_BATCH),
        *linear("patches", "patch_embed.proj", KERNEL),
        *block_rules("blocks_{}/PART"),
        *norm("norm", "fc_norm" if model.settings.pool == "mean" else "norm"),
        *linear("classifier", "head"),
        *linear("distillation_classifier", "head_dist"),
    ]


def model_overrides(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the settings that the arrays determine; assumes square maps of positions."""
    overrides = {"distilled": "dist_token" in arrays}
    overrides["pool"] = "mean" if "fc_norm.weight" in arrays else "token"
    patches, position = arrays.get("patch_embed.proj.weight"), arrays.get("pos_embed")
    if patches is not None and patches.ndim == 4:
        overrides["patch_size"] = patches.shape[-1]
        if position is not None and position.ndim == 3:
            num_patches = position.shape[1] - 1 - overrides["distilled"]
            side = overrides["patch_size"] * math.isqrt(num_patches)
            overrides["position_size"] = (side, side)
    return overrides


def image_size(model: nn.Module) -> int:
    """Returns the image size that the position embeddings were trained for [pixels]."""
    return model.settings.position_size[0]


LAYOUT = Layout(
    task="classification",
    normalization="imagenet",
    rules=rules,
    model_overrides=model_overrides,
    image_size=image_size,
)
