"""Layouts of mmdetection: a Swin Transformer with RetinaNet or Mask R-CNN.

The original layout is that of Swin's own code for detection
(SwinTransformer/Swin-Transformer-Object-Detection), which published most of these weights;
mmdetection 3.x has other names, and another order of channels in patch mergings.
"""

import functools
import re
from typing import Any

import flax.linen as nn
import numpy as np

from tokenvit_jax.heads import MaskRcnn, RetinaNet
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
    size_of,
)

# The published evaluation: shorter and longer side of the images [pixels]. The canvas of a batch,
# height and width, is a multiple of the largest stride.
SHORT_SIDE, LONG_SIDE = 800, 1333
CANVAS = (800, 1344)

_LOGITS = {  # array with a row for every class -> its rows per class
    "roi_head.mask_head.conv_logits.weight": 1,
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
    """Returns the rules of a detector with either head.

    Args:
      model: a Detector around a Swin.
      backbone: layout of the Swin.

    Raises:
      LookupError: the model has another head.
    """
    found = {MaskRcnn: _mask_rcnn_rules, RetinaNet: _retinanet_rules}
    if type(model.head) not in found:
        raise LookupError(f"the layout has no {type(model.head).__name__}")
    return [*backbone.rules(model.backbone), *found[type(model.head)](model.head)]


def _fpn_rules(num_maps: int, num_convolved: int = 0) -> list[Rule]:
    found = []
    for i in range(num_maps):
        found += linear(f"head/fpn/lateral_{i + 1}", f"neck.lateral_convs.{i}.conv", KERNEL)
        found += linear(f"head/fpn/output_{i + 1}", f"neck.fpn_convs.{i}.conv", KERNEL)
    for i in range(num_convolved):
        theirs = f"neck.fpn_convs.{num_maps + i}.conv"
        found += linear(f"head/fpn/coarser_{i + 1}", theirs, KERNEL)
    return found


def _mask_rcnn_rules(head: MaskRcnn) -> list[Rule]:
    rpn, box, mask = "rpn_head", "roi_head.bbox_head", "roi_head.mask_head"
    found = [
        *_fpn_rules(num_maps=4),
        *linear("head/rpn/shared", f"{rpn}.rpn_conv", KERNEL),
        *linear("head/rpn/logits", f"{rpn}.rpn_cls", KERNEL),
        *linear("head/rpn/deltas", f"{rpn}.rpn_reg", KERNEL),
        *linear("head/box_head/fc1", f"{box}.shared_fcs.0", _FLATTENED),
        *linear("head/box_head/fc2", f"{box}.shared_fcs.1"),
        *linear("head/box_head/logits", f"{box}.fc_cls"),
        *linear("head/box_head/deltas", f"{box}.fc_reg"),
        *linear("head/mask_head/upsample", f"{mask}.upsample", TRANSPOSED_KERNEL),
        *linear("head/mask_head/logits", f"{mask}.conv_logits", KERNEL),
    ]
    for i in range(head.num_mask_convs):
        found += linear(f"head/mask_head/conv{i + 1}", f"{mask}.convs.{i}.conv", KERNEL)
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
    sizes = {"channels": size_of(arrays, "neck.lateral_convs.0.conv.weight")}
    if any(name.startswith("roi_head.") for name in arrays):
        head = "mask_rcnn"
        sizes["hidden"] = size_of(arrays, "roi_head.bbox_head.shared_fcs.0.weight")
        sizes["num_mask_convs"] = _count(arrays, r"roi_head\.mask_head\.convs\.\d+\.conv\.weight")
    else:
        head = "retinanet"
        sizes["num_convs"] = _count(arrays, r"bbox_head\.cls_convs\.\d+\.conv\.weight")
    return {
        "head": head,
        "head_overrides": {name: size for name, size in sizes.items() if size},
        "data": {"eval_short_side": SHORT_SIDE, "long_side": LONG_SIDE},
    }


def _count(arrays: Arrays, pattern: str) -> int:
    return sum(re.fullmatch(pattern, name) is not None for name in arrays)


def _layout(backbone: Backbone) -> Layout:
    return Layout(
        task="detection",
        marks=(
            *backbone.marks,
            r"neck\.lateral_convs\.0\.conv\.weight",
            r"neck\.fpn_convs\.0\.conv\.weight",
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
