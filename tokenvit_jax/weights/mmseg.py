"""Layouts of mmsegmentation: a Swin Transformer with UperNet or Semantic FPN.

Versions 0.x have the names of Swin's own code for segmentation
(SwinTransformer/Swin-Transformer-Semantic-Segmentation), which published most of these weights;
versions 1.x have other names, and another order of channels in patch mergings.
"""

import functools
from typing import Any

import flax.linen as nn

from tokenvit_jax.heads import SemanticFpn, UperNet
from tokenvit_jax.heads.upernet import POOL_SIDES
from tokenvit_jax.weights.openmmlab import ORIGINAL, RENAMED, Backbone
from tokenvit_jax.weights.rules import (
    KERNEL,
    SAME,
    STATISTICS,
    Arrays,
    Layout,
    Rule,
    linear,
    norm,
    rows_of,
    size_of,
)

# Crops of the training and shorter side of the images in the published evaluation [pixels].
IMAGE_SIZE = 512


def rules(model: nn.Module, backbone: Backbone) -> list[Rule]:
    """Returns the rules of a segmentation model with either head.

    Args:
      model: a Segmenter around a Swin.
      backbone: layout of the Swin.

    Raises:
      LookupError: the model has another head.
    """
    if not isinstance(model.head, SemanticFpn | UperNet):
        raise LookupError(f"the layout has no {type(model.head).__name__}")
    found = backbone.rules(model.backbone)
    found += linear("head/classifier", "decode_head.conv_seg", KERNEL)
    # UperNet.
    for i, side in enumerate(POOL_SIDES):
        found += _block(f"head/pool_{side}", f"decode_head.psp_modules.{i}.1")
    found += _block("head/bottleneck", "decode_head.bottleneck")
    for i in range(3):
        found += _block(f"head/lateral_{i + 1}", f"decode_head.lateral_convs.{i}")
        found += _block(f"head/fpn_{i + 1}", f"decode_head.fpn_convs.{i}")
    found += _block("head/fusion", "decode_head.fpn_bottleneck")
    found += _block("auxiliary/convolution", "auxiliary_head.convs.0")
    found += linear("auxiliary/classifier", "auxiliary_head.conv_seg", KERNEL)
    # Semantic FPN, whose neck is a module of its own.
    for i in range(4):
        found += linear(f"head/lateral_{i + 1}", f"neck.lateral_convs.{i}.conv", KERNEL)
        found += linear(f"head/output_{i + 1}", f"neck.fpn_convs.{i}.conv", KERNEL)
        for j in range(max(i, 1)):  # resizing takes the odd numbers
            theirs = f"decode_head.scale_heads.{i}.{2 * j}"
            found += _block(f"head/scale_{i + 1}_{j + 1}", theirs)
    return found


def _block(ours: str, theirs: str) -> list[Rule]:
    """Returns the rules of a convolution with BatchNorm."""
    return [
        Rule(f"{ours}/conv/kernel", f"{theirs}.conv.weight", KERNEL),
        *norm(f"{ours}/norm", f"{theirs}.bn"),
        Rule(f"{STATISTICS}/{ours}/norm/mean", f"{theirs}.bn.running_mean", SAME),
        Rule(f"{STATISTICS}/{ours}/norm/var", f"{theirs}.bn.running_var", SAME),
    ]


def config_entries(arrays: Arrays) -> dict[str, Any]:
    """Returns the head with its settings, and the published evaluation, as entries."""
    if any(name.startswith("neck.") for name in arrays):
        sizes = {
            "channels": "decode_head.scale_heads.0.0.conv.weight",
            "neck_channels": "neck.fpn_convs.0.conv.weight",
        }
        entries = {"head": "semantic_fpn"}
    else:
        sizes = {
            "channels": "decode_head.bottleneck.conv.weight",
            "auxiliary_channels": "auxiliary_head.convs.0.conv.weight",
        }
        entries = {"head": "upernet"}
        if sizes["auxiliary_channels"] not in arrays:
            entries["auxiliary_weight"] = 0.0
    found = {name: size_of(arrays, key) for name, key in sizes.items()}
    return entries | {
        "head_overrides": {name: size for name, size in found.items() if size},
        "inference": {"window": "whole"},
        "data": {"eval_size": (2 * IMAGE_SIZE, 2 * IMAGE_SIZE)},
    }


def _layout(backbone: Backbone) -> Layout:
    return Layout(
        task="segmentation",
        marks=(
            *backbone.marks,
            r"backbone\.norm0\.weight",
            r"decode_head\.bottleneck\.conv\.weight|decode_head\.scale_heads\.0\.0\.conv\.weight",
        ),
        normalization="imagenet",
        rules=functools.partial(rules, backbone=backbone),
        num_classes=rows_of("decode_head.conv_seg.weight"),
        model_overrides=backbone.model_overrides,
        image_size=lambda model, arrays: IMAGE_SIZE,
        eval_crop=None,
        config_entries=config_entries,
    )


VERSION_0 = _layout(ORIGINAL)
VERSION_1 = _layout(RENAMED)
