"""Layout of DPT, github.com/isl-org/DPT, for depth: a hybrid or plain vision transformer.

The files also hold arrays on which no depth depends: the backbone's classifier and last LayerNorm,
and the first unit of the coarsest fusion.
"""

import functools
import re
from typing import Any

import flax.linen as nn
import numpy as np

from tokenvit_jax.heads.dpt import LEVELS
from tokenvit_jax.weights import timm_vit
from tokenvit_jax.weights.rules import (
    KERNEL,
    TRANSPOSED_KERNEL,
    Arrays,
    Layout,
    Rule,
    linear,
    size_of,
    within,
)

IMAGENET_CLASSES = 1000


def rules(model: nn.Module) -> list[Rule]:
    """Returns the rules of a depth model."""
    found = within("backbone", "pretrained.model", timm_vit.rules(model.backbone))
    convolution = functools.partial(linear, change=KERNEL)
    for level in range(1, LEVELS + 1):
        theirs = f"pretrained.act_postprocess{level}"
        found += linear(f"head/readout_{level}", f"{theirs}.0.project.0")
        found += convolution(f"head/project_{level}", f"{theirs}.3")
        change = TRANSPOSED_KERNEL if level < 3 else KERNEL
        found += linear(f"head/resize_{level}", f"{theirs}.4", change)
        found += convolution(f"head/level_{level}", f"scratch.layer{level}_rn")
        ours, theirs = f"head/fusion_{level}", f"scratch.refinenet{level}"
        found += convolution(f"{ours}_output", f"{theirs}.out_conv")
        for part, number in (("skip", 1), ("sum", 2)):
            unit = f"{theirs}.resConfUnit{number}"
            found += convolution(f"{ours}_{part}/conv1", f"{unit}.conv1")
            found += convolution(f"{ours}_{part}/conv2", f"{unit}.conv2")
    for i, number in enumerate((0, 2, 4), 1):
        found += convolution(f"head/output_{i}", f"scratch.output_conv.{number}")
    return found


def model_overrides(arrays: Arrays) -> dict[str, Any]:
    """Returns the settings of the backbone; assumes square maps of positions."""
    prefix = "pretrained.model."
    backbone = {k.removeprefix(prefix): x for k, x in arrays.items() if k.startswith(prefix)}
    return timm_vit.model_overrides(backbone) | {"position_resize": "bilinear"}


def config_entries(arrays: Arrays) -> dict[str, Any]:
    """Returns the settings of the decoder, where they are not the published ones."""
    names = {
        "channels": "scratch.refinenet1.out_conv.weight",
        "last_channels": "scratch.output_conv.2.weight",
    }
    overrides = {setting: size_of(arrays, name) for setting, name in names.items()}
    levels = tuple(size_of(arrays, f"scratch.layer{i}_rn.weight", 1) for i in range(1, LEVELS + 1))
    if all(levels):
        overrides["level_channels"] = levels
    return {"head_overrides": {name: size for name, size in overrides.items() if size}}


def prepare(arrays: Arrays) -> Arrays:
    """Takes the weights out of a file of training, which has them under "model."."""
    prefix = "model."
    if not all(re.match(rf"{prefix}(pretrained|scratch)\.", name) for name in arrays):
        return arrays
    return {name.removeprefix(prefix): x for name, x in arrays.items()}


def complete(arrays: Arrays) -> Arrays:
    """Adds zeros for the classifier, the last LayerNorm and the first unit of the coarsest fusion.

    The published code has these layers and refuses files without them.
    """
    backbone, unit = "pretrained.model", "scratch.refinenet4.resConfUnit"
    dim = size_of(arrays, f"{backbone}.cls_token", -1)
    shapes = {
        f"{backbone}.norm.weight": (dim,),
        f"{backbone}.norm.bias": (dim,),
        f"{backbone}.head.weight": (IMAGENET_CLASSES, dim),
        f"{backbone}.head.bias": (IMAGENET_CLASSES,),
    }
    for name, array in arrays.items():
        if name.startswith(f"{unit}2."):
            shapes[name.replace(f"{unit}2.", f"{unit}1.")] = array.shape
    return {**arrays, **{name: np.zeros(shape, np.float32) for name, shape in shapes.items()}}


def image_size(model: nn.Module, arrays: Arrays) -> int:
    """Returns the image size of the training [pixels]: that of the position embeddings."""
    return timm_vit.image_size(model.backbone, arrays)


LAYOUT = Layout(
    task="depth",
    marks=(r"pretrained\.model\.blocks\.0\.attn\.qkv\.weight", r"scratch\.refinenet1\."),
    normalization="inception",
    rules=rules,
    num_classes=lambda arrays: 0,
    model_overrides=model_overrides,
    image_size=image_size,
    eval_crop=None,
    config_entries=config_entries,
    unused=(
        r"pretrained\.model\.(head|norm)\.",
        r"scratch\.refinenet4\.resConfUnit1\.",
        r"auxlayer\.",
    ),
    prepare=prepare,
    complete=complete,
)
