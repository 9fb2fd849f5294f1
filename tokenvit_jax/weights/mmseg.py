"""Layouts of mmsegmentation: a Swin Transformer with UperNet or Semantic FPN.

Versions 0.x have the names of Swin's own code for segmentation
(SwinTransformer/Swin-Transformer-Semantic-Segmentation), which published most of these weights;
versions 1.x have other names, and another order of channels in patch mergings.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import numpy as np

from tokenvit_jax.heads import SemanticFpn, UperNet
from tokenvit_jax.heads.upernet import POOL_SIDES
from tokenvit_jax.weights import swin
from tokenvit_jax.weights.rules import (
    KERNEL,
    SAME,
    STATISTICS,
    Arrays,
    Change,
    Layout,
    Rule,
    linear,
    norm,
    rows_of,
    size_of,
    within,
)

# Crops of the training and shorter side of the images in the published evaluation [pixels].
IMAGE_SIZE = 512

# A patch merging of mmsegmentation 1.x has the inputs 4 c + 2 row + column. Here and in Swin's code
# they are (2 column + row) C + c.
_SQUARES = [0, 2, 1, 3]  # its own inverse


def _to_ours(x: np.ndarray) -> np.ndarray:
    """Reorders the last axis of the arrays of a patch merging, 4 C."""
    return x.reshape(*x.shape[:-1], -1, 4).swapaxes(-1, -2)[..., _SQUARES, :].reshape(x.shape)


def _to_theirs(x: np.ndarray) -> np.ndarray:
    return x.reshape(*x.shape[:-1], 4, -1)[..., _SQUARES, :].swapaxes(-1, -2).reshape(x.shape)


_MERGING_NORM = Change(_to_ours, _to_theirs)
_MERGING = Change(lambda x: _to_ours(x).transpose(), lambda x: _to_theirs(x.transpose()))

_NEW_NAMES = (  # patterns in the names of 0.x -> names of 1.x
    (r"^layers\.", "stages."),
    (r"^patch_embed\.proj\.", "patch_embed.projection."),
    (r"\.attn\.", ".attn.w_msa."),
    (r"\.mlp\.fc1\.", ".ffn.layers.0.0."),
    (r"\.mlp\.fc2\.", ".ffn.layers.1."),
)


def backbone_rules_0(backbone: nn.Module) -> list[Rule]:
    """Returns the rules of a Swin in 0.x."""
    return swin.rules(backbone, merging_first=False, classifier="head")


def backbone_rules_1(backbone: nn.Module) -> list[Rule]:
    """Returns the rules of a Swin in 1.x."""
    return [_renamed(rule) for rule in backbone_rules_0(backbone)]


def _renamed(rule: Rule) -> Rule:
    theirs, change = rule.theirs, rule.change
    for pattern, name in _NEW_NAMES:
        theirs = re.sub(pattern, name, theirs)
    if ".downsample." in theirs:
        change = _MERGING_NORM if change is SAME else _MERGING
    return Rule(rule.ours, theirs, change)


def rules(model: nn.Module, backbone_rules: Callable[[nn.Module], list[Rule]]) -> list[Rule]:
    """Returns the rules of a segmentation model with either head.

    Args:
      model: a Segmenter around a Swin.
      backbone_rules: :func:`backbone_rules_0` or :func:`backbone_rules_1`.

    Raises:
      LookupError: the model has another head.
    """
    if not isinstance(model.head, SemanticFpn | UperNet):
        raise LookupError(f"the layout has no {type(model.head).__name__}")
    found = within("backbone", "backbone", backbone_rules(model.backbone))
    for i in range(4):
        found += norm(f"map_norm_{i + 1}", f"backbone.norm{i}")
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


def _layout(blocks: str, attention: str, backbone_rules: Callable) -> Layout:
    """Returns a layout.

    Args:
      blocks: name of the blocks of a stage, with `{}` for the stage.
      attention: name of the attention within a block.
      backbone_rules: as in :func:`rules`.
    """
    first = f"{blocks.format(0)}.0.{attention}".replace(".", r"\.")
    return Layout(
        task="segmentation",
        marks=(
            rf"{first}\.qkv\.weight",
            rf"{first}\.{swin.TABLE_NAME}",
            r"backbone\.norm0\.weight",
            r"decode_head\.(bottleneck|scale_heads\.0\.0)\.conv\.weight",
        ),
        normalization="imagenet",
        rules=functools.partial(rules, backbone_rules=backbone_rules),
        num_classes=rows_of("decode_head.conv_seg.weight"),
        model_overrides=functools.partial(
            swin.window_overrides, attention=f"{blocks}.0.{attention}"
        ),
        image_size=lambda model, arrays: IMAGE_SIZE,
        eval_crop=None,
        config_entries=config_entries,
    )


VERSION_0 = _layout("backbone.layers.{}.blocks", "attn", backbone_rules_0)
VERSION_1 = _layout("backbone.stages.{}.blocks", "attn.w_msa", backbone_rules_1)
