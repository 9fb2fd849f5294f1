"""Arrays of mmdetection's detectors for the tests of heads, and its names in this project."""

import functools
import re
from pathlib import Path

import numpy as np
from flax.traverse_util import unflatten_dict

# Pattern of mmdetection's names -> our module.
MODULES = [
    (r"lateral_convs\.(\d)\.conv", lambda i: f"lateral_{i + 1}"),
    (r"fpn_convs\.([0-2])\.conv", lambda i: f"output_{i + 1}"),
    (r"fpn_convs\.([34])\.conv", lambda i: f"coarser_{i - 2}"),  # with three maps
    (r"cls_convs\.(\d)\.conv", lambda i: f"class_convs_{i}"),
    (r"reg_convs\.(\d)\.conv", lambda i: f"box_convs_{i}"),
    ("retina_cls", lambda: "class_logits"),
    ("retina_reg", lambda: "box_deltas"),
    (r"rpn_head\.rpn_conv", lambda: "rpn.shared"),
    (r"rpn_head\.rpn_cls", lambda: "rpn.logits"),
    (r"rpn_head\.rpn_reg", lambda: "rpn.deltas"),
    (r"roi_head\.semantic_head\.lateral_convs\.(\d)\.conv", lambda i: f"semantic.lateral_{i}"),
    (r"roi_head\.semantic_head\.convs\.(\d)\.conv", lambda i: f"semantic.convs_{i}"),
    (r"roi_head\.semantic_head\.conv_embedding\.conv", lambda: "semantic.embedding"),
    (r"roi_head\.semantic_head\.conv_logits", lambda: "semantic.logits"),
    (
        r"roi_head\.bbox_head\.(\d)\.shared_convs\.(\d)\.conv",
        lambda s, i: f"box_heads_{s}.conv{i + 1}",
    ),
    (
        r"roi_head\.bbox_head\.(\d)\.shared_fcs\.(\d)",
        lambda s, i: f"box_heads_{s}.fc{i + 1}",
    ),
    (r"roi_head\.bbox_head\.(\d)\.fc_cls", lambda s: f"box_heads_{s}.logits"),
    (r"roi_head\.bbox_head\.(\d)\.fc_reg", lambda s: f"box_heads_{s}.deltas"),
    (
        r"roi_head\.mask_head\.(\d)\.convs\.(\d)\.conv",
        lambda s, i: f"mask_heads_{s}.conv{i + 1}",
    ),
    (r"roi_head\.mask_head\.(\d)\.conv_res\.conv", lambda s: f"mask_heads_{s}.flow"),
    (r"roi_head\.mask_head\.(\d)\.upsample", lambda s: f"mask_heads_{s}.upsample"),
    (r"roi_head\.mask_head\.(\d)\.conv_logits", lambda s: f"mask_heads_{s}.logits"),
    (r"(?:roi_head\.bbox_head\.)?shared_fcs\.(\d)", lambda i: f"box_head.fc{i + 1}"),
    (r"(?:roi_head\.bbox_head\.)?fc_cls", lambda: "box_head.logits"),
    (r"(?:roi_head\.bbox_head\.)?fc_reg", lambda: "box_head.deltas"),
    (r"(?:roi_head\.mask_head\.)?convs\.(\d)\.conv", lambda i: f"mask_head.conv{i + 1}"),
    (r"(?:roi_head\.mask_head\.)?upsample", lambda: "mask_head.upsample"),
    (r"(?:roi_head\.mask_head\.)?conv_logits", lambda: "mask_head.logits"),
]
BINS = 7  # rows and columns of the features that the box head reads


@functools.cache
def golden(name):
    """Returns the arrays of a file by name; maps have channels last."""
    arrays = dict(np.load(Path(__file__).parent / "golden" / f"{name}.npz"))
    is_map = lambda key, x: x.ndim == 4 and "w/" not in key and "masks" not in key  # noqa: E731
    return {k: x.transpose(0, 2, 3, 1) if is_map(k, x) else x for k, x in arrays.items()}


def maps_of(arrays, start):
    """Returns the maps whose names are ``start`` and a level, the finest first."""
    return [arrays[key] for key in sorted(arrays) if re.fullmatch(re.escape(start) + r"\d", key)]


def params_of(arrays, start="w/"):
    """Returns the parameters whose names begin with ``start`` as this project has them."""
    return unflatten_dict(
        dict(_ours(k.removeprefix(start), x) for k, x in arrays.items() if k.startswith(start))
    )


def _ours(name, array):
    path = next(
        make(*map(int, found.groups())).split(".")
        for pattern, make in MODULES
        if (found := re.match(pattern, name))
    )
    if name.endswith("bias"):
        return (*path, "bias"), array
    if path[-1] == "upsample":  # (in, out, rows, columns)
        array = array.transpose(2, 3, 0, 1)
    elif (
        path[-1] == "fc1"
    ):  # its inputs are (channels, rows, columns), ours (rows, columns, channels)
        array = array.reshape(len(array), -1, BINS**2).transpose(2, 1, 0).reshape(-1, len(array))
    else:
        array = array.T if array.ndim == 2 else array.transpose(2, 3, 1, 0)
    return (*path, "kernel"), array
