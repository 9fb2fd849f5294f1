"""Layouts of Hugging Face's files of ViT, DeiT, DINOv2, CLIP, Swin and Swin v2.

Queries, keys and values are three layers there and one layer here. A name may begin with that of
the model, such as "vit." for a ViT with a classifier.
"""

import functools
import re
from typing import Any

import flax.linen as nn

from tokenvit_jax.errors import UserError
from tokenvit_jax.weights import clip, swin, timm_vit
from tokenvit_jax.weights.rules import (
    FLAT,
    KERNEL,
    SAME,
    TABLE,
    TRANSPOSED,
    WITHOUT_BATCH,
    Arrays,
    Layout,
    Rule,
    joined,
    linear,
    norm,
    rows_of,
    shown,
    size_of,
    timm_crop,
)

_PREFIX = re.compile(r"^(vit|deit|dinov2|dinov2_with_registers|swin|swinv2|backbone)\.")
_CLASSIFIERS = ("classifier.weight", "cls_classifier.weight")


def without_prefix(arrays: Arrays) -> Arrays:
    """Returns the arrays with names that do not begin with that of the model.

    Raises:
      UserError: two arrays would get the same name.
    """
    found, originals = {}, {}
    for name, array in arrays.items():
        short = _PREFIX.sub("", name, count=1)
        if other := originals.get(short):
            raise UserError(f"{shown(other)} and {shown(name)} are the same array; valid: one")
        found[short], originals[short] = array, name
    return found


# ------------------------------------------------------------------------------------------------
# ViT, DeiT, DINOv2
# ------------------------------------------------------------------------------------------------


def _embedding_rules() -> list[Rule]:
    return [
        Rule("class_token", "embeddings.cls_token", WITHOUT_BATCH),
        Rule("distillation_token", "embeddings.distillation_token", WITHOUT_BATCH),
        Rule("register_token", "embeddings.register_tokens", WITHOUT_BATCH),
        Rule("position", "embeddings.position_embeddings", WITHOUT_BATCH),
        *linear("patches", "embeddings.patch_embeddings.projection", KERNEL),
        *norm("norm", "layernorm"),
    ]


def _block_rules(block: str, scaled: bool) -> list[Rule]:
    """Returns the rules of a block of DINOv2 (``scaled``: with layer scale) or ViT."""
    attention = f"{block}.attention.attention"
    qkv = (f"{attention}.query", f"{attention}.key", f"{attention}.value")
    names = ("norm1", "norm2", "mlp.fc1", "mlp.fc2") if scaled else (
        "layernorm_before", "layernorm_after", "intermediate.dense", "output.dense"
    )  # fmt: skip
    norm1, norm2, fc1, fc2 = (f"{block}.{name}" for name in names)
    return [
        *norm("blocks_{}/norm1", norm1),
        *joined("blocks_{}/attention/qkv", *qkv),
        *linear("blocks_{}/attention/proj", f"{block}.attention.output.dense"),
        Rule("blocks_{}/scale1", f"{block}.layer_scale1.lambda1", SAME),
        *norm("blocks_{}/norm2", norm2),
        *linear("blocks_{}/mlp/fc1", fc1),
        *linear("blocks_{}/mlp/fc2", fc2),
        Rule("blocks_{}/scale2", f"{block}.layer_scale2.lambda1", SAME),
    ]


def _clip_rules() -> list[Rule]:
    tower, block = "vision_model", "vision_model.encoder.layers.{}"
    qkv = (f"{block}.self_attn.{part}_proj" for part in "qkv")
    return [
        Rule("class_token", f"{tower}.embeddings.class_embedding", clip.AS_ROW),
        Rule("position", f"{tower}.embeddings.position_embedding.weight", SAME),
        *linear("patches", f"{tower}.embeddings.patch_embedding", KERNEL),
        *norm("pre_norm", f"{tower}.pre_layrnorm"),  # misspelt there
        *norm("blocks_{}/norm1", f"{block}.layer_norm1"),
        *joined("blocks_{}/attention/qkv", *qkv),
        *linear("blocks_{}/attention/proj", f"{block}.self_attn.out_proj"),
        *norm("blocks_{}/norm2", f"{block}.layer_norm2"),
        *linear("blocks_{}/mlp/fc1", f"{block}.mlp.fc1"),
        *linear("blocks_{}/mlp/fc2", f"{block}.mlp.fc2"),
        *norm("norm", f"{tower}.post_layernorm"),
        Rule("projection/kernel", "visual_projection.weight", TRANSPOSED),
    ]


def vit_rules(model: nn.Module) -> list[Rule]:
    """Returns the rules of a ViT, a DeiT, a DINOv2 or an image tower of CLIP."""
    settings = model.settings
    if settings.pre_norm:
        return _clip_rules()
    classifier = "cls_classifier" if settings.distilled else "classifier"
    return [
        *_embedding_rules(),
        *_block_rules("encoder.layer.{}", scaled=settings.layer_scale > 0),
        *linear("classifier", classifier),
        *linear("distillation_classifier", "distillation_classifier"),
    ]


def vit_overrides(arrays: Arrays) -> dict[str, Any]:
    """Returns the settings that the arrays determine; assumes square maps of positions.

    Raises:
      UserError: the model gates its MLP (SwiGLU).
    """
    if gate := next((name for name in arrays if ".mlp.weights_in." in name), None):
        raise UserError(f"{gate}: models with a gated MLP (SwiGLU) are not supported")
    if _is_clip(arrays):
        return _clip_overrides(arrays)
    overrides = {"distilled": "embeddings.distillation_token" in arrays}
    overrides["position_resize"] = "bicubic"
    if _is_dinov2(arrays):
        overrides["layer_scale"] = timm_vit.LAYER_SCALE
    else:
        overrides["norm_epsilon"] = 1e-12
    if "embeddings.register_tokens" in arrays:
        overrides["num_registers"] = size_of(arrays, "embeddings.register_tokens", 1)
        overrides["position_resize"] = "bicubic_antialias"
    patches = arrays.get("embeddings.patch_embeddings.projection.weight")
    position = arrays.get("embeddings.position_embeddings")
    return overrides | timm_vit.patch_overrides(patches, position, 1 + overrides["distilled"])


def _is_clip(arrays):
    return "vision_model.pre_layrnorm.weight" in arrays


def _is_dinov2(arrays):
    return "encoder.layer.0.layer_scale1.lambda1" in arrays


def _clip_overrides(arrays):
    overrides = clip.OVERRIDES | clip.ACTIVATION | {"position_resize": "bicubic"}
    overrides["projection"] = size_of(arrays, "visual_projection.weight")
    patches = arrays.get("vision_model.embeddings.patch_embedding.weight")
    position = arrays.get("vision_model.embeddings.position_embedding.weight")
    position = None if position is None else position[None]
    return overrides | timm_vit.patch_overrides(patches, position, 1)


def vit_entries(arrays: Arrays) -> dict[str, Any]:
    """Returns the normalisation of CLIP and DINOv2."""
    if _is_clip(arrays):
        return {"data": {"normalization": "clip"}}
    if _is_dinov2(arrays):
        return {"data": {"normalization": "imagenet"}}
    return {}


LAYOUT_DEIT = Layout(
    task="classification",
    marks=(
        r"embeddings\.patch_embeddings\.projection\.weight"
        r"|vision_model\.embeddings\.patch_embedding\.weight",
        r"encoder\.layer\.0\.attention\.attention\.query\.weight"
        r"|vision_model\.encoder\.layers\.0\.self_attn\.q_proj\.weight",
    ),
    normalization="imagenet",
    rules=vit_rules,
    num_classes=rows_of(*_CLASSIFIERS),
    model_overrides=vit_overrides,
    image_size=timm_vit.image_size,
    config_entries=vit_entries,
    eval_crop=lambda size, arrays: 1.0 if _is_clip(arrays) else timm_crop(size, arrays),
    assumed=lambda arrays: ("activation",) if _is_clip(arrays) else (),
    # The pooler, which no published classifier uses; the token of masked pretraining; CLIP's text.
    unused=(
        r"pooler\.", r"embeddings\.mask_token", r"text_model\.", r"text_projection\.",
        r"logit_scale$", r"vision_model\.embeddings\.position_ids",
    ),
    prepare=without_prefix,
)  # fmt: skip
LAYOUT_VIT = LAYOUT_DEIT._replace(normalization="inception")


# ------------------------------------------------------------------------------------------------
# Swin and Swin v2
# ------------------------------------------------------------------------------------------------


def swin_rules(model: nn.Module) -> list[Rule]:
    """Returns the rules of both versions."""
    ours, theirs = "stages_{}_{}", "encoder.layers.{}.blocks.{}"
    attention, attn = f"{ours}/attention", f"{theirs}.attention.self"
    query, key, value = (f"{attn}.{part}" for part in ("query", "key", "value"))
    return [
        *linear("embeddings_0/conv", "embeddings.patch_embeddings.projection", KERNEL),
        *norm("embeddings_0/norm", "embeddings.norm"),
        *swin.merging_rules(model, "encoder.layers.{}.downsample"),
        *norm(f"{ours}/norm1", f"{theirs}.layernorm_before"),
        *joined(f"{attention}/qkv", query, key, value),
        *linear(f"{attention}/proj", f"{theirs}.attention.output.dense"),
        Rule(f"{attention}/relative_position_bias", f"{attn}.{swin.TABLE_NAME}", TABLE),
        Rule(f"{attention}/q_bias", f"{query}.bias", SAME),
        Rule(f"{attention}/v_bias", f"{value}.bias", SAME),
        Rule(f"{attention}/logit_scale", f"{attn}.logit_scale", FLAT),
        *linear(f"{attention}/position_bias/fc1", f"{attn}.continuous_position_bias_mlp.0"),
        *linear(f"{attention}/position_bias/fc2", f"{attn}.continuous_position_bias_mlp.2"),
        *norm(f"{ours}/norm2", f"{theirs}.layernorm_after"),
        *linear(f"{ours}/mlp/fc1", f"{theirs}.intermediate.dense"),
        *linear(f"{ours}/mlp/fc2", f"{theirs}.output.dense"),
        *norm("head_norm", "layernorm"),
        *linear("classifier", "classifier"),
    ]


_ATTENTION = "encoder.layers.{}.blocks.0.attention.self"

LAYOUT_SWIN = swin.TIMM._replace(
    marks=(
        r"embeddings\.patch_embeddings\.projection\.weight",
        rf"{re.escape(_ATTENTION.format(0))}\.query\.weight",
        rf"{re.escape(_ATTENTION.format(0))}\.{swin.TABLE_NAME}",
    ),
    rules=swin_rules,
    num_classes=rows_of("classifier.weight"),
    model_overrides=functools.partial(swin.window_overrides, attention=_ATTENTION),
    unused=LAYOUT_DEIT.unused,
    prepare=without_prefix,
)
LAYOUT_SWINV2 = swin.version2(LAYOUT_SWIN, _ATTENTION)
