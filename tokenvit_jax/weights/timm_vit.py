"""timm's layouts of ViT and DeiT, `VisionTransformer` and `VisionTransformerDistilled`.

timm builds DINOv2, CLIP and hybrids with a ResNet from `VisionTransformer`, too.
"""

import math
import re
from collections import Counter
from typing import Any

import flax.linen as nn
import numpy as np

from tokenvit_jax.errors import UserError
from tokenvit_jax.models.resnet_stem import ResNetStem
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


def stem_rules() -> list[Rule]:
    """Returns the rules of a hybrid's ResNet, whose convolutions have no bias."""
    stem, block = "patch_embed.backbone.stem", "patch_embed.backbone.stages.{}.blocks.{}"
    modules = {"conv": f"{stem}.conv", "norm": f"{stem}.norm"}
    for kind in ("conv", "norm"):
        names = {f"{kind}{number}": f"{kind}{number}" for number in (1, 2, 3)}
        names[f"{kind}_shortcut"] = f"downsample.{kind}"
        modules |= {
            f"block_{{}}_{{}}/{ours}": f"{block}.{theirs}" for ours, theirs in names.items()
        }
    found = []
    for ours, theirs in modules.items():
        found.append(Rule(f"stem/{ours}/kernel", f"{theirs}.weight", KERNEL))
        found += norm(f"stem/{ours}", theirs)
    return found


def rules(model: nn.Module) -> list[Rule]:
    """Returns the rules of a plain vision transformer."""
    return [
        Rule("class_token", "cls_token", WITHOUT_BATCH),
        Rule("distillation_token", "dist_token", WITHOUT_BATCH),
        Rule("register_token", "reg_token", WITHOUT_BATCH),
        Rule("position", "pos_embed", WITHOUT_BATCH),
        *stem_rules(),
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
    stem = stem_settings(arrays)
    if stem:
        overrides["stem"] = stem
    patches, position = arrays.get("patch_embed.proj.weight"), arrays.get("pos_embed")
    if patches is not None and "patch_embed.proj.bias" not in arrays:
        overrides["patch_bias"] = False
    stride = ResNetStem(**stem).stride if stem else 1
    return overrides | patch_overrides(patches, position, front, stride)


def stem_settings(arrays: Arrays) -> dict[str, Any]:
    """Returns the settings of a hybrid's ResNet that the arrays determine; {}: there is none."""
    prefix = "patch_embed.backbone"
    names = [re.match(rf"{prefix}\.stages\.(\d+)\.blocks\.(\d+)\.conv3\.", x) for x in arrays]
    blocks = Counter(int(name[1]) for name in names if name)
    first = size_of(arrays, f"{prefix}.stem.conv.weight")
    stages = range(len(blocks))
    widths = [size_of(arrays, f"{prefix}.stages.{i}.blocks.0.conv3.weight") for i in stages]
    if not (first and widths and all(widths)):
        return {}
    return {"first": first, "widths": tuple(widths), "depths": tuple(blocks[i] for i in stages)}


def patch_overrides(
    patches: np.ndarray | None, position: np.ndarray | None, front: int, stride: int = 1
) -> dict[str, Any]:
    """Returns the sides of a patch and of the trained image, as far as arrays determine them.

    Args:
      patches: kernel of the patch embedding (C, 3, side, side), or of a map with other channels.
      position: position embeddings (1, T, C) with a square map of patches.
      front: number of position embeddings before the patches'.
      stride: stride of the map that is divided into patches [pixels]; 1: the image.
    """
    if patches is None or patches.ndim != 4:
        return {}
    overrides = {"patch_size": stride * patches.shape[-1]}
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
