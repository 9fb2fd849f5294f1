"""Layout of the Segmenter authors' code, github.com/rstrudel/segmenter, with either decoder.

The encoder is timm's vision transformer.
"""

from typing import Any

import flax.linen as nn

from tokenvit_jax.weights import timm_vit
from tokenvit_jax.weights.rules import (
    SAME,
    WITHOUT_BATCH,
    Arrays,
    Layout,
    Rule,
    linear,
    norm,
    size_of,
    within,
)

_DECODER = [
    *linear("classifier", "head"),
    *linear("embedding", "proj_dec"),
    Rule("class_token", "cls_emb", WITHOUT_BATCH),
    *timm_vit.block_rules("PART_{}"),
    *norm("norm", "decoder_norm"),
    Rule("patch_projection/kernel", "proj_patch", SAME),
    Rule("class_projection/kernel", "proj_classes", SAME),
    *norm("mask_norm", "mask_norm"),
]


def rules(model: nn.Module) -> list[Rule]:
    """Returns the rules of a Segmenter."""
    return [
        *within("backbone", "encoder", timm_vit.rules(model.backbone)),
        *within("head", "decoder", _DECODER),
    ]


def model_overrides(arrays: Arrays) -> dict[str, Any]:
    """Returns the settings of the backbone; assumes square maps of positions."""
    encoder = {
        name.removeprefix("encoder."): array
        for name, array in arrays.items()
        if name.startswith("encoder.")
    }
    return timm_vit.model_overrides(encoder) | {"norm_epsilon": 1e-5, "position_resize": "bilinear"}


def config_entries(arrays: Arrays) -> dict[str, Any]:
    """Returns the decoder and its number of blocks as entries of a configuration."""
    if "decoder.cls_emb" not in arrays:
        return {"head": "linear"}
    blocks = {name.split(".")[2] for name in arrays if name.startswith("decoder.blocks.")}
    return {"head": "mask_transformer", "head_overrides": {"depth": len(blocks)}}


def num_classes(arrays: Arrays) -> int:
    """Returns the number of classes of the decoder."""
    return size_of(arrays, "decoder.cls_emb", 1) or size_of(arrays, "decoder.head.weight")


LAYOUT_DEIT = Layout(
    task="segmentation",
    marks=(r"encoder\.blocks\.0\.attn\.qkv\.weight", r"decoder\."),
    normalization="imagenet",
    rules=rules,
    model_overrides=model_overrides,
    num_classes=num_classes,
    image_size=lambda model, arrays: timm_vit.image_size(model.backbone, arrays),
    eval_crop=None,
    config_entries=config_entries,
    # The encoder's classifiers, on which no mask depends.
    unused=(r"encoder\.head\.", r"encoder\.head_dist\."),
)
LAYOUT_VIT = LAYOUT_DEIT._replace(normalization="inception")
