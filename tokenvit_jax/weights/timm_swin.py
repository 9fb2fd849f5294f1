"""timm's layouts of Swin Transformer v1 (`SwinTransformer`) and v2 (`SwinTransformerV2`)."""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from tokenvit_jax.weights.rules import FLAT, KERNEL, SAME, TABLE, Layout, Rule, linear, norm

# Image size of every published Swin v2 with 1000 classes and the registered window size.
V2_IMAGE_SIZE = 256


def rules(model: nn.Module) -> list[Rule]:
    """Returns the rules of both versions."""
    ours, theirs = "stages_{}_{}", "layers.{}.blocks.{}"
    attention, attn = f"{ours}/attention", f"{theirs}.attn"
    return [
        *linear("embeddings_0/conv", "patch_embed.proj", KERNEL),
        *norm("embeddings_0/norm", "patch_embed.norm"),
        *norm("embeddings_{}/norm", "layers.{}.downsample.norm"),
        *linear("embeddings_{}/reduction", "layers.{}.downsample.reduction"),
        *norm(f"{ours}/norm1", f"{theirs}.norm1"),
        *linear(f"{attention}/qkv", f"{attn}.qkv"),
        *linear(f"{attention}/proj", f"{attn}.proj"),
        Rule(f"{attention}/relative_position_bias", f"{attn}.relative_position_bias_table", TABLE),
        Rule(f"{attention}/q_bias", f"{attn}.q_bias", SAME),
        Rule(f"{attention}/v_bias", f"{attn}.v_bias", SAME),
        Rule(f"{attention}/logit_scale", f"{attn}.logit_scale", FLAT),
        *linear(f"{attention}/position_bias/fc1", f"{attn}.cpb_mlp.0"),
        *linear(f"{attention}/position_bias/fc2", f"{attn}.cpb_mlp.2"),
        *norm(f"{ours}/norm2", f"{theirs}.norm2"),
        *linear(f"{ours}/mlp/fc1", f"{theirs}.mlp.fc1"),
        *linear(f"{ours}/mlp/fc2", f"{theirs}.mlp.fc2"),
        *norm("head_norm", "norm"),
        *linear("classifier", "head.fc"),
    ]


def model_overrides(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the window size of a Swin; the arrays of Swin v2 do not determine it."""
    table = arrays.get("layers.0.blocks.0.attn.relative_position_bias_table")
    if table is None or table.ndim != 2:
        return {}
    return {"window_size": max((math.isqrt(len(table)) + 1) // 2, 1)}


def image_size(model: nn.Module) -> int:
    """Returns the image size [pixels] at which the last map is one window, as published."""
    return 32 * model.settings.window_size


LAYOUT = Layout(
    task="classification",
    normalization="imagenet",
    rules=rules,
    model_overrides=model_overrides,
    image_size=image_size,
)
LAYOUT_V2 = LAYOUT._replace(image_size=lambda model: V2_IMAGE_SIZE)
