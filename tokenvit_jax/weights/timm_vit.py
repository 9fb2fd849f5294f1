"""timm's layouts of ViT and DeiT, `VisionTransformer` and `VisionTransformerDistilled`.

timm builds DINOv2 and CLIP from `VisionTransformer`, too.
"""

import math
from typing import Any

import flax.linen as nn
import numpy as np

from tokenvit_jax.errors import UserError
from tokenvit_jax.weights.rules import (
    KERNEL,
    SAME,
    WITHOUT_BATCH,
    Arrays,
    Layout,
    Rule,
    linear,
    norm,
    rows_of,
    size_of,
)

# Value of the setting `layer_scale` of imported models; their factors come from the file.
LAYER_SCALE = 1e-5


def block_rules(path: str) -> list[Rule]:
    """Returns the rules of one block of timm's transformers.

    Args:
      path: path of a submodule of the block, with PART in place of "norm1", "attention" etc.
    """
    norm1, attention, scale1, norm2, mlp, scale2 = (
        path.replace("PART", part)
        for part in ("norm1", "attention", "scale1", "norm2", "mlp", "scale2")
    )
    return [
        *norm(norm1, "blocks.{}.norm1"),
        *linear(f"{attention}/qkv", "blocks.{}.attn.qkv"),
        *linear(f"{attention}/proj", "blocks.{}.attn.proj"),
        Rule(scale1, "blocks.{}.ls1.gamma", SAME),
        *norm(norm2, "blocks.{}.norm2"),
        *linear(f"{mlp}/fc1", "blocks.{}.mlp.fc1"),
        *linear(f"{mlp}/fc2", "blocks.{}.mlp.fc2"),
        Rule(scale2, "blocks.{}.ls2.gamma", SAME),
    ]


def rules(model: nn.Module) -> list[Rule]:
    """Returns the rules of a plain vision transformer."""
    return [
        Rule("class_token", "cls_token", WITHOUT_BATCH),
        Rule("distillation_token", "dist_token", WITHOUT_BATCH),
        Rule("register_token", "reg_token", WITHOUT_BATCH),
        Rule("position", "pos_embed", WITHOUT_BATCH),
        *linear("patches", "patch_embed.proj", KERNEL),
        *norm("pre_norm", "norm_pre"),
        *block_rules("blocks_{}/PART"),
        *norm("norm", "fc_norm" if model.settings.pool == "mean" else "norm"),
        *linear("classifier", "head"),
        *linear("distillation_classifier", "head_dist"),
    ]


def model_overrides(arrays: Arrays) -> dict[str, Any]:
    """Returns the settings that the arrays determine; assumes square maps of positions.

    Raises:
      UserError: the model gates its MLP (SwiGLU).
    """
    if gate := next((name for name in arrays if ".mlp.w12." in name), None):
        raise UserError(f"{gate}: models with a gated MLP (SwiGLU) are not supported")
    overrides = {"distilled": "dist_token" in arrays}
    overrides["pool"] = "mean" if "fc_norm.weight" in arrays else "token"
    front = 1 + overrides["distilled"]
    if "reg_token" in arrays:
        # timm gives positions to the class token only in models without registers.
        overrides |= {"num_registers": size_of(arrays, "reg_token", 1), "front_position": False}
        front = 0
    if "norm_pre.weight" in arrays:
        overrides |= {"pre_norm": True, "norm_epsilon": 1e-5}
    if "blocks.0.ls1.gamma" in arrays:
        overrides["layer_scale"] = LAYER_SCALE
    patches, position = arrays.get("patch_embed.proj.weight"), arrays.get("pos_embed")
    if patches is not None and "patch_embed.proj.bias" not in arrays:
        overrides["patch_bias"] = False
    return overrides | patch_overrides(patches, position, front)


def patch_overrides(
    patches: np.ndarray | None, position: np.ndarray | None, front: int
) -> dict[str, Any]:
    """Returns the sides of a patch and of the trained image, as far as arrays determine them.

    Args:
      patches: kernel of the patch embedding (C, 3, side, side).
      position: position embeddings (1, T, C) with a square map of patches.
      front: number of position embeddings before the patches'.
    """
    if patches is None or patches.ndim != 4:
        return {}
    overrides = {"patch_size": patches.shape[-1]}
    if position is not None and position.ndim == 3 and position.shape[1] > front:
        side = overrides["patch_size"] * math.isqrt(position.shape[1] - front)
        overrides["position_size"] = (side, side)
    return overrides


def image_size(model: nn.Module, arrays: Arrays) -> int:
    """Returns the image size that the position embeddings were trained for [pixels]."""
    del arrays
    return model.settings.position_size[0]


def config_entries(arrays: Arrays) -> dict[str, Any]:
    """Returns the normalisation of CLIP and DINOv2, which differs from the other ViTs'."""
    if "norm_pre.weight" in arrays:
        return {"data": {"normalization": "clip"}}
    if "blocks.0.ls1.gamma" in arrays:
        return {"data": {"normalization": "imagenet"}}
    return {}


def assumed(arrays: Arrays) -> tuple[str, ...]:
    """Returns the settings that the arrays do not determine: CLIP has one of two activations."""
    return ("activation",) if "norm_pre.weight" in arrays else ()


LAYOUT_DEIT = Layout(
    task="classification",
    marks=(r"patch_embed\.proj\.weight", r"blocks\.0\.attn\.qkv\.weight", r"pos_embed"),
    normalization="imagenet",
    rules=rules,
    num_classes=rows_of("head.weight"),
    model_overrides=model_overrides,
    image_size=image_size,
    config_entries=config_entries,
    assumed=assumed,
)
LAYOUT_VIT = LAYOUT_DEIT._replace(normalization="inception")
