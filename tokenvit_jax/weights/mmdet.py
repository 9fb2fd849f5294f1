"""Layouts of mmdetection: a Swin Transformer with RetinaNet, Mask R-CNN or HTC.

The original layout is that of Swin's own code for detection
(SwinTransformer/Swin-Transformer-Object-Detection), which published most of these weights;
mmdetection 3.x has other names, and another order of channels in patch mergings. In HTC++ as ViT's
adapters have it, the neck is a list: a transformer block, and the feature pyramid.
"""

import functools
import re
from typing import Any

import flax.linen as nn
import numpy as np

from tokenvit_jax.heads import Htc, MaskRcnn, RetinaNet
from tokenvit_jax.heads.retinanet import NUM_COARSER, PER_CELL
from tokenvit_jax.heads.roi_heads import BOX_SIZE
from tokenvit_jax.weights.openmmlab import ORIGINAL, RENAMED, Backbone
from tokenvit_jax.weights.rules import (
    KERNEL,
    TRANSPOSED_KERNEL,
    Arrays,
    Change,
    Layout,
    Rule,
    linear,
    norm,
    size_of,
)

# The published evaluation: shorter and longer side of the images [pixels]. The canvas of a batch,
# height and width, is a multiple of the largest stride.
SHORT_SIDE, LONG_SIDE = 800, 1333
CANVAS = (800, 1344)

_LOGITS = {  # array with a row for every class -> its rows per class
    "roi_head.mask_head.conv_logits.weight": 1,
    "roi_head.mask_head.0.conv_logits.weight": 1,
    "bbox_head.retina_cls.weight": PER_CELL,
}


def _from_channels_first(x: np.ndarray) -> np.ndarray:
    """Returns the kernel of a layer behind flattened features: (out, C, rows, columns) there."""
    x = x.reshape(len(x), -1, BOX_SIZE, BOX_SIZE)
    return x.transpose(2, 3, 1, 0).reshape(-1, len(x))


def _to_channels_first(x: np.ndarray) -> np.ndarray:
    x = x.reshape(BOX_SIZE, BOX_SIZE, -1, x.shape[-1])
    return x.transpose(3, 2, 0, 1).reshape(x.shape[-1], -1)


_FLATTENED = Change(_from_channels_first, _to_channels_first)


def rules(model: nn.Module, backbone: Backbone) -> list[Rule]:
    """Returns the rules of a detector with one of the heads.

    Args:
      model: a Detector around a Swin.
      backbone: layout of the Swin.

    Raises:
      LookupError: the model has another head.
    """
    found = {MaskRcnn: _mask_rcnn_rules, RetinaNet: _retinanet_rules, Htc: _htc_rules}
    if type(model.head) not in found:
        raise LookupError(f"the layout has no {type(model.head).__name__}")
    return [*backbone.rules(model.backbone), *found[type(model.head)](model.head)]


def _fpn_rules(num_maps: int, num_convolved: int = 0, neck: str = "neck") -> list[Rule]:
    found = []
    for i in range(num_maps):
        found += linear(f"head/fpn/lateral_{i + 1}", f"{neck}.lateral_convs.{i}.conv", KERNEL)
        found += linear(f"head/fpn/output_{i + 1}", f"{neck}.fpn_convs.{i}.conv", KERNEL)
    for i in range(num_convolved):
        theirs = f"{neck}.fpn_convs.{num_maps + i}.conv"
        found += linear(f"head/fpn/coarser_{i + 1}", theirs, KERNEL)
    return found


def _mask_rcnn_rules(head: MaskRcnn) -> list[Rule]:
    return [
        *_fpn_rules(num_maps=4),
        *_rpn_rules(),
        *_box_head_rules("head/box_head", "roi_head.bbox_head"),
        *_mask_head_rules("head/mask_head", "roi_head.mask_head", head.num_mask_convs),
    ]


def _htc_rules(head: Htc) -> list[Rule]:
    box, mask, semantic = (f"roi_head.{name}_head" for name in ("bbox", "mask", "semantic"))
    has_block = bool(head.global_head_dim)
    return [
        *(_block_rules("head/global_block", "neck.0") if has_block else ()),
        *_fpn_rules(num_maps=4, neck="neck.1" if has_block else "neck"),
        *_rpn_rules(),
        *_box_head_rules("head/box_heads_{}", f"{box}.{{}}", head.num_box_convs),
        *_mask_head_rules("head/mask_heads_{}", f"{mask}.{{}}", head.num_mask_convs),
        *linear("head/mask_heads_{}/flow", f"{mask}.{{}}.conv_res.conv", KERNEL),
        *linear("head/semantic/lateral_{}", f"{semantic}.lateral_convs.{{}}.conv", KERNEL),
        *linear("head/semantic/convs_{}", f"{semantic}.convs.{{}}.conv", KERNEL),
        *linear("head/semantic/embedding", f"{semantic}.conv_embedding.conv", KERNEL),
        *linear("head/semantic/logits", f"{semantic}.conv_logits", KERNEL),
    ]


def _block_rules(ours: str, theirs: str) -> list[Rule]:
    return [
        *norm(f"{ours}/norm1", f"{theirs}.norm1"),
        *linear(f"{ours}/attn/qkv", f"{theirs}.attn.qkv"),
        *linear(f"{ours}/attn/proj", f"{theirs}.attn.proj"),
        *norm(f"{ours}/norm2", f"{theirs}.norm2"),
        *linear(f"{ours}/mlp/fc1", f"{theirs}.ffn.fc1"),
        *linear(f"{ours}/mlp/fc2", f"{theirs}.ffn.fc2"),
        *norm(f"{ours}/norm3", f"{theirs}.final_norm"),
    ]


def _rpn_rules() -> list[Rule]:
    return [
        *linear("head/rpn/shared", "rpn_head.rpn_conv", KERNEL),
        *linear("head/rpn/logits", "rpn_head.rpn_cls", KERNEL),
        *linear("head/rpn/deltas", "rpn_head.rpn_reg", KERNEL),
    ]


def _box_head_rules(ours: str, theirs: str, num_convs: int = 0) -> list[Rule]:
    found = [
        *linear(f"{ours}/fc1", f"{theirs}.shared_fcs.0", _FLATTENED),
        *linear(f"{ours}/fc2", f"{theirs}.shared_fcs.1"),
        *linear(f"{ours}/logits", f"{theirs}.fc_cls"),
        *linear(f"{ours}/deltas", f"{theirs}.fc_reg"),
    ]
    for i in range(num_convs):
        found += linear(f"{ours}/conv{i + 1}", f"{theirs}.shared_convs.{i}.conv", KERNEL)
    return found


def _mask_head_rules(ours: str, theirs: str, num_convs: int) -> list[Rule]:
    found = [
        *linear(f"{ours}/upsample", f"{theirs}.upsample", TRANSPOSED_KERNEL),
        *linear(f"{ours}/logits", f"{theirs}.conv_logits", KERNEL),
    ]
    for i in range(num_convs):
        found += linear(f"{ours}/conv{i + 1}", f"{theirs}.convs.{i}.conv", KERNEL)
    return found


def _retinanet_rules(head: RetinaNet) -> list[Rule]:
    return [
        *_fpn_rules(4 - head.first_map, NUM_COARSER),
        *linear("head/class_convs_{}", "bbox_head.cls_convs.{}.conv", KERNEL),
        *linear("head/box_convs_{}", "bbox_head.reg_convs.{}.conv", KERNEL),
        *linear("head/class_logits", "bbox_head.retina_cls", KERNEL),
        *linear("head/box_deltas", "bbox_head.retina_reg", KERNEL),
    ]


def num_classes(arrays: Arrays) -> int:
    """Returns the number of classes of a file."""
    return next((size_of(arrays, key) // rows for key, rows in _LOGITS.items() if key in arrays), 0)


def config_entries(arrays: Arrays) -> dict[str, Any]:
    """Returns the head with its settings, and the published evaluation, as entries."""
    sizes = {"channels": size_of(arrays, "rpn_head.rpn_conv.weight")}
    further = {}
    if any(name.startswith("roi_head.semantic_head.") for name in arrays):
        head, box, mask = "htc", r"roi_head.bbox_head.0", r"roi_head\.mask_head\.0"
        sizes["hidden"] = size_of(arrays, f"{box}.shared_fcs.0.weight")
        sizes["num_mask_convs"] = _count(arrays, rf"{mask}\.convs\.\d+\.conv\.weight")
        sizes["num_stuff"] = size_of(arrays, "roi_head.semantic_head.conv_logits.weight")
        convs = re.escape(box) + r"\.shared_convs\.\d+\.conv\.weight"
        further["num_box_convs"] = _count(arrays, convs)
        if "neck.0.attn.qkv.weight" not in arrays:
            further["global_head_dim"] = 0
    elif any(name.startswith("roi_head.") for name in arrays):
        head = "mask_rcnn"
        sizes["hidden"] = size_of(arrays, "roi_head.bbox_head.shared_fcs.0.weight")
        sizes["num_mask_convs"] = _count(arrays, r"roi_head\.mask_head\.convs\.\d+\.conv\.weight")
    else:
        head = "retinanet"
        sizes["channels"] = size_of(arrays, "neck.lateral_convs.0.conv.weight")
        sizes["num_convs"] = _count(arrays, r"bbox_head\.cls_convs\.\d+\.conv\.weight")
    return {
        "head": head,
        "head_overrides": {name: size for name, size in sizes.items() if size} | further,
        "data": {"eval_short_side": SHORT_SIDE, "long_side": LONG_SIDE},
    }


def _count(arrays: Arrays, pattern: str) -> int:
    return sum(re.fullmatch(pattern, name) is not None for name in arrays)


def _layout(backbone: Backbone) -> Layout:
    return Layout(
        task="detection",
        marks=(
            *backbone.marks,
            r"neck\.lateral_convs\.0\.conv\.weight|neck\.1\.lateral_convs\.0\.conv\.weight",
            r"neck\.fpn_convs\.0\.conv\.weight|neck\.1\.fpn_convs\.0\.conv\.weight",
            "|".join(map(re.escape, _LOGITS)),
        ),
        normalization="imagenet",
        rules=functools.partial(rules, backbone=backbone),
        num_classes=num_classes,
        model_overrides=backbone.model_overrides,
        image_size=lambda model, arrays: CANVAS,
        eval_crop=None,
        config_entries=config_entries,
    )


SWIN = _layout(ORIGINAL)
MMDET = _layout(RENAMED)
