"""Layouts of Swin Transformer v1 and v2: timm's, and the authors' (microsoft/Swin-Transformer).

The two differ in the stage that a patch merging belongs to, and in the name of the classifier.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import numpy as np

from tokenvit_jax.weights.rules import (
    FLAT,
    KERNEL,
    SAME,
    TABLE,
    Arrays,
    Layout,
    Rule,
    linear,
    norm,
    rows_of,
)

# Image size of most published Swin v2, if the file does not tell.
V2_IMAGE_SIZE = 256
# End of the names of tables of position biases, which Swin has and Swin v2 does not.
TABLE_NAME = "relative_position_bias_table"


def rules(model: nn.Module, merging_first: bool, classifier: str) -> list[Rule]:
    """Returns the rules of both versions.

    Args:
      model: a Swin.
      merging_first: whether a stage begins with its patch merging; else the stage before ends with
        it.
      classifier: name of the classifier in the file.
    """
    ours, theirs = "stages_{}_{}", "layers.{}.blocks.{}"
    attention, attn = f"{ours}/attention", f"{theirs}.attn"
    return [
        *linear("embeddings_0/conv", "patch_embed.proj", KERNEL),
        *norm("embeddings_0/norm", "patch_embed.norm"),
        *merging_rules(model, "layers.{}.downsample", merging_first),
        *norm(f"{ours}/norm1", f"{theirs}.norm1"),
        *linear(f"{attention}/qkv", f"{attn}.qkv"),
        *linear(f"{attention}/proj", f"{attn}.proj"),
        Rule(f"{attention}/relative_position_bias", f"{attn}.{TABLE_NAME}", TABLE),
        Rule(f"{attention}/q_bias", f"{attn}.q_bias", SAME),
        Rule(f"{attention}/v_bias", f"{attn}.v_bias", SAME),
        Rule(f"{attention}/logit_scale", f"{attn}.logit_scale", FLAT),
        *linear(f"{attention}/position_bias/fc1", f"{attn}.cpb_mlp.0"),
        *linear(f"{attention}/position_bias/fc2", f"{attn}.cpb_mlp.2"),
        *norm(f"{ours}/norm2", f"{theirs}.norm2"),
        *linear(f"{ours}/mlp/fc1", f"{theirs}.mlp.fc1"),
        *linear(f"{ours}/mlp/fc2", f"{theirs}.mlp.fc2"),
        *norm("head_norm", "norm"),
        *linear("classifier", classifier),
    ]


def merging_rules(model: nn.Module, theirs: str, merging_first: bool = False) -> list[Rule]:
    """Returns the rules of the patch mergings.

    Args:
      model: a Swin.
      theirs: name of a patch merging in the file, with `{}` for its stage.
      merging_first: as in :func:`rules`.
    """
    found = []
    for stage in range(1, len(model.settings.dims)):
        name = theirs.format(stage if merging_first else stage - 1)
        found += norm(f"embeddings_{stage}/norm", f"{name}.norm")
        found += linear(f"embeddings_{stage}/reduction", f"{name}.reduction")
    return found


# ------------------------------------------------------------------------------------------------
# Windows
# ------------------------------------------------------------------------------------------------


def window_overrides(arrays: Arrays, attention: str) -> dict[str, Any]:
    """Returns the windows that the arrays tell.

    Tables of position biases tell them in Swin. In Swin v2, `relative_position_index` does, which
    timm's recent files lack, and `relative_coords_table` tells the windows of the pretraining.

    Args:
      arrays: arrays of a file.
      attention: name of the attention of the first block of a stage, with `{}` for the stage.
    """
    table = arrays.get(f"{attention.format(0)}.{TABLE_NAME}")
    if table is not None and table.ndim == 2:
        return {"window_size": max((math.isqrt(len(table)) + 1) // 2, 1)}
    sides = stage_windows(arrays, attention)
    if not sides:
        return {}
    overrides = {"window_size": max(sides)}
    if f"{attention.format(0)}.logit_scale" in arrays:
        units = (
            _unit(arrays.get(f"{attention.format(stage)}.relative_coords_table"), side)
            for stage, side in enumerate(sides)
        )
        overrides["pretrained_window_sizes"] = tuple(units)
    return overrides


def stage_windows(arrays: Arrays, attention: str) -> tuple[int, ...]:
    """Returns the side of the windows of every stage, from `relative_position_index`; () without.

    Args:
      arrays: arrays of a file.
      attention: as in :func:`window_overrides`.
    """
    sides, stage = [], 0
    while (name := f"{attention.format(stage)}.relative_position_index") in arrays:
        # (side**2, side**2), or flat in early versions of timm.
        side = math.isqrt(math.isqrt(arrays[name].size))
        if side**4 != arrays[name].size:
            break
        sides.append(side)
        stage += 1
    return tuple(sides)


def _unit(table: np.ndarray | None, side: int) -> int:
    """Returns the window that is the unit of a table of offsets: log2(1 + 8 x) / 3 for x in units.

    Args:
      table: (1, 2 side - 1, 2 side - 1, 2), the last of which is the largest; None: no such table.
      side: side of the window, which is the unit unless the table tells another one.
    """
    largest = 0.0 if table is None or side == 1 else float(np.abs(table).max())
    if not 0 < largest < 10:  # damaged
        return side
    return round(8 * (side - 1) / (8**largest - 1)) + 1


def image_size(model: nn.Module, arrays: Arrays) -> int:
    """Returns the image size [pixels] at which the last map is one window, as published."""
    del arrays
    return 32 * model.settings.window_size


def _v2_image_size(attention: str, model: nn.Module, arrays: Arrays) -> int:
    del model
    sides = stage_windows(arrays, attention)
    return 32 * sides[-1] if sides else V2_IMAGE_SIZE


def version2(layout: Layout, attention: str) -> Layout:
    """Returns the layout of Swin v2 from that of Swin; ``attention`` as in window_overrides."""
    return layout._replace(
        marks=tuple(mark.replace(TABLE_NAME, "logit_scale") for mark in layout.marks),
        image_size=functools.partial(_v2_image_size, attention),
        assumed=functools.partial(_assumed_windows, attention),
    )


def _assumed_windows(attention: str, arrays: Arrays) -> tuple[str, ...]:
    known = stage_windows(arrays, attention)
    return () if known else ("window_size", "pretrained_window_sizes")


# ------------------------------------------------------------------------------------------------
# The layouts
# ------------------------------------------------------------------------------------------------

_ATTENTION = "layers.{}.blocks.0.attn"
_MARKS = (
    r"patch_embed\.norm\.weight",
    r"layers\.0\.blocks\.0\.attn\.qkv\.weight",
    rf"layers\.0\.blocks\.0\.attn\.{TABLE_NAME}",
)

TIMM = Layout(
    task="classification",
    marks=(*_MARKS, r"layers\.3\.downsample\.norm\.weight"),
    normalization="imagenet",
    rules=functools.partial(rules, merging_first=True, classifier="head.fc"),
    num_classes=rows_of("head.fc.weight"),
    model_overrides=functools.partial(window_overrides, attention=_ATTENTION),
    image_size=image_size,
)
TIMM_V2 = version2(TIMM, _ATTENTION)
OFFICIAL = TIMM._replace(
    marks=(*_MARKS, r"layers\.0\.downsample\.norm\.weight"),
    rules=functools.partial(rules, merging_first=False, classifier="head"),
    num_classes=rows_of("head.weight"),
    eval_crop=lambda image_size, arrays: 0.875 if image_size < 384 else 1.0,
)
OFFICIAL_V2 = version2(OFFICIAL, _ATTENTION)
