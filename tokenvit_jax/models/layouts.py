"""Published weights: a table of names per layout, and their exchange with parameters of ours.

The rules of a layout pair names of ours with names of theirs, both with as many fields `{}` for the
numbers of stages and blocks, and say how the arrays differ.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from tokenvit_jax.errors import UserError


class Change(NamedTuple):
    """How an array of theirs becomes one of ours, and back."""

    to_ours: Callable[[np.ndarray], np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray]


class Rule(NamedTuple):
    """ours: path of a parameter; theirs: name in the file; change: between the arrays."""

    ours: str
    theirs: str
    change: Change


# From the arrays of a file.
Settings = Callable[[Mapping[str, np.ndarray]], dict[str, Any]]


class Layout(NamedTuple):
    """Names and shapes of a family of models.

    rules: of a model; of those that fit a path, the first one applies.
    settings: attributes of a model, or of a backbone, that show in its weights; those it cannot
      read are left.
    image_size: side of the images, pixels, that a model is for.
    head: entries of a configuration on the head of a backbone.
    task: that of the datasets whose classes a model tells.
    normalization: of the pixels, as most of the published weights want it.
    unused: beginnings of the names of what files hold and models of ours do not have.
    """

    rules: Callable[[nn.Module], list[Rule]]
    settings: Settings
    image_size: Callable[[nn.Module], int]
    head: Settings = lambda arrays: {}
    task: str = "classification"
    normalization: str = "imagenet"
    unused: tuple[str, ...] = ()


SAME = Change(lambda x: x, lambda x: x)
TRANSPOSED = Change(lambda x: x.transpose(), lambda x: x.transpose())
# (out, in, rows, columns) to (rows, columns, in, out)
KERNEL = Change(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))
WITHOUT_BATCH = Change(lambda x: x[0], lambda x: x[None])
FLAT = Change(lambda x: x.reshape(-1), lambda x: x.reshape(-1, 1, 1))
# (rows * columns, heads) to (rows, columns, heads), as many rows as columns
TABLE = Change(
    lambda x: x.reshape(math.isqrt(len(x)), -1, x.shape[-1]), lambda x: x.reshape(-1, x.shape[-1])
)

# Ends of names that are no weights: what a model computes anew, and some files hold.
COMPUTED = ("relative_position_index", "relative_coords_table", "attn_mask")


def _linear(ours: str, theirs: str, change: Change = TRANSPOSED) -> list[Rule]:
    return [
        Rule(f"{ours}/kernel", f"{theirs}.weight", change),
        Rule(f"{ours}/bias", f"{theirs}.bias", SAME),
    ]


def _norm(ours: str, theirs: str) -> list[Rule]:
    return [
        Rule(f"{ours}/scale", f"{theirs}.weight", SAME),
        Rule(f"{ours}/bias", f"{theirs}.bias", SAME),
    ]


def _vit_block(ours: str) -> list[Rule]:
    """The rules of a block of timm's transformers; ours: path of its module PART."""
    norm1, attention, norm2, mlp = (
        ours.replace("PART", part) for part in ("norm1", "attention", "norm2", "mlp")
    )
    return [
        *_norm(norm1, "blocks.{}.norm1"),
        *_linear(f"{attention}/qkv", "blocks.{}.attn.qkv"),
        *_linear(f"{attention}/proj", "blocks.{}.attn.proj"),
        *_norm(norm2, "blocks.{}.norm2"),
        *_linear(f"{mlp}/fc1", "blocks.{}.mlp.fc1"),
        *_linear(f"{mlp}/fc2", "blocks.{}.mlp.fc2"),
    ]


def timm_vit(model: nn.Module) -> list[Rule]:
    """The rules of timm's `VisionTransformer` and `VisionTransformerDistilled`."""
    return [
        Rule("class_token", "cls_token", WITHOUT_BATCH),
        Rule("distillation_token", "dist_token", WITHOUT_BATCH),
        Rule("position", "pos_embed", WITHOUT_BATCH),
        *_linear("patches", "patch_embed.proj", KERNEL),
        *_vit_block("blocks_{}/PART"),
        *_norm("norm", "fc_norm" if model.settings.pool == "mean" else "norm"),
        *_linear("classifier", "head"),
        *_linear("distillation_classifier", "head_dist"),
    ]


def timm_vit_settings(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the settings of a plain host that show in its weights.

    The map of the position embeddings is taken to be square.
    """
    settings = {"distilled": "dist_token" in arrays}
    settings["pool"] = "mean" if "fc_norm.weight" in arrays else "token"
    patches, position = arrays.get("patch_embed.proj.weight"), arrays.get("pos_embed")
    if patches is not None and patches.ndim == 4:
        settings["patch_size"] = patches.shape[-1]
        if position is not None and position.ndim == 3:
            patches_of_map = position.shape[1] - 1 - settings["distilled"]
            side = settings["patch_size"] * math.isqrt(patches_of_map)
            settings["position_size"] = (side, side)
    return settings


def timm_swin(model: nn.Module) -> list[Rule]:
    """The rules of timm's `SwinTransformer` and `SwinTransformerV2`."""
    ours, theirs = "stages_{}_{}", "layers.{}.blocks.{}"
    attention, attn = f"{ours}/attention", f"{theirs}.attn"
    return [
        *_linear("embeddings_0/conv", "patch_embed.proj", KERNEL),
        *_norm("embeddings_0/norm", "patch_embed.norm"),
        *_norm("embeddings_{}/norm", "layers.{}.downsample.norm"),
        *_linear("embeddings_{}/reduction", "layers.{}.downsample.reduction"),
        *_norm(f"{ours}/norm1", f"{theirs}.norm1"),
        *_linear(f"{attention}/qkv", f"{attn}.qkv"),
        *_linear(f"{attention}/proj", f"{attn}.proj"),
        Rule(f"{attention}/relative_position_bias", f"{attn}.relative_position_bias_table", TABLE),
        Rule(f"{attention}/q_bias", f"{attn}.q_bias", SAME),
        Rule(f"{attention}/v_bias", f"{attn}.v_bias", SAME),
        Rule(f"{attention}/logit_scale", f"{attn}.logit_scale", FLAT),
        *_linear(f"{attention}/position_bias/fc1", f"{attn}.cpb_mlp.0"),
        *_linear(f"{attention}/position_bias/fc2", f"{attn}.cpb_mlp.2"),
        *_norm(f"{ours}/norm2", f"{theirs}.norm2"),
        *_linear(f"{ours}/mlp/fc1", f"{theirs}.mlp.fc1"),
        *_linear(f"{ours}/mlp/fc2", f"{theirs}.mlp.fc2"),
        *_norm("head_norm", "norm"),
        *_linear("classifier", "head.fc"),
    ]


def timm_swin_settings(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the settings of a Swin Transformer that show in its weights.

    Those of Swin v2 do not tell the size of its windows.
    """
    table = arrays.get("layers.0.blocks.0.attn.relative_position_bias_table")
    if table is None or table.ndim != 2:
        return {}
    return {"window_size": max((math.isqrt(len(table)) + 1) // 2, 1)}


def segmenter(model: nn.Module) -> list[Rule]:
    """The rules of the original code of Segmenter, github.com/rstrudel/segmenter.

    Both decoders; the encoder is timm's vision transformer.
    """
    decoder = [
        *_linear("classifier", "head"),
        *_linear("embedding", "proj_dec"),
        Rule("class_token", "cls_emb", WITHOUT_BATCH),
        *_vit_block("PART_{}"),
        *_norm("norm", "decoder_norm"),
        Rule("patch_projection/kernel", "proj_patch", SAME),
        Rule("class_projection/kernel", "proj_classes", SAME),
        *_norm("mask_norm", "mask_norm"),
    ]
    return [
        *_within("backbone", "encoder", timm_vit(model.backbone)),
        *_within("head", "decoder", decoder),
    ]


def _within(ours: str, theirs: str, rules: list[Rule]) -> list[Rule]:
    """The rules of a part of a model."""
    return [Rule(f"{ours}/{rule.ours}", f"{theirs}.{rule.theirs}", rule.change) for rule in rules]


def segmenter_settings(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the settings of a Segmenter's backbone; its position embeddings fit a square."""
    encoder = {
        name.removeprefix("encoder."): x
        for name, x in arrays.items()
        if name.startswith("encoder.")
    }
    return timm_vit_settings(encoder) | {"norm_epsilon": 1e-5, "position_resize": "bilinear"}


def segmenter_head(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns which decoder a Segmenter has, and of how many blocks, as a configuration does."""
    if "decoder.cls_emb" not in arrays:
        return {"head": "linear"}
    blocks = {name.split(".")[2] for name in arrays if name.startswith("decoder.blocks.")}
    return {"head": "mask_transformer", "head_overrides": {"depth": len(blocks)}}


_TIMM_VIT = Layout(timm_vit, timm_vit_settings, lambda model: model.settings.position_size[0])
_SEGMENTER = Layout(
    segmenter,
    segmenter_settings,
    lambda model: model.backbone.settings.position_size[0],
    segmenter_head,
    task="segmentation",
    unused=("encoder.head.", "encoder.head_dist."),  # classifiers, on which no mask depends
)
LAYOUTS = {  # name -> first part of a model's name -> its layout
    "timm": {
        "vit": _TIMM_VIT,
        "deit": _TIMM_VIT,
        # The last map of a published model is one window.
        "swin": Layout(
            timm_swin, timm_swin_settings, lambda model: 32 * model.settings.window_size
        ),
        # All that have 1000 classes and the windows of the registered ones.
        "swinv2": Layout(timm_swin, timm_swin_settings, lambda model: 256),
    },
    "segmenter": {
        "vit": _SEGMENTER._replace(normalization="inception"),
        "deit": _SEGMENTER,
    },
}


def import_weights(
    arrays: Mapping[str, np.ndarray],
    expected: Mapping[str, Any],
    rules: list[Rule],
    unused: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Returns parameters of ours from arrays of theirs.

    Args:
      arrays: name of theirs -> array; those that a model computes anew are passed over.
      expected: tree of shapes of the parameters.
      rules: of the layout.
      unused: beginnings of the names of other arrays to pass over.

    Returns:
      A tree like ``expected``, float32.

    Raises:
      UserError: names all entries that are missing, have another shape or belong to nothing.
    """
    left = {
        name: array
        for name, array in arrays.items()
        if not name.endswith(COMPUTED) and not name.startswith(unused)
    }
    params, wrong = {}, []
    for path, leaf in flatten_dict(expected, sep="/").items():
        name, change = _theirs(path, rules)
        shape = change.to_theirs(np.broadcast_to(np.float32(0), leaf.shape)).shape
        array = left.pop(name, None)
        if array is None:
            wrong.append(f"{name} is missing")
        elif array.shape != shape:
            wrong.append(f"{name} has shape {array.shape}, expected {shape}")
        else:
            params[path] = np.ascontiguousarray(change.to_ours(array), np.float32)
    wrong += [f"{name} {array.shape} belongs to nothing" for name, array in left.items()]
    if wrong:
        raise UserError(f"{len(wrong)} entries do not fit the model: {'; '.join(wrong)}")
    return unflatten_dict(params, sep="/")


def export_weights(params: Mapping[str, Any], rules: list[Rule]) -> dict[str, np.ndarray]:
    """Returns arrays of theirs from parameters of ours: undoes :func:`import_weights`."""
    arrays = {}
    for path, leaf in flatten_dict(params, sep="/").items():
        name, change = _theirs(path, rules)
        arrays[name] = np.ascontiguousarray(change.to_theirs(np.asarray(leaf)))
    return arrays


def _theirs(path: str, rules: list[Rule]) -> tuple[str, Change]:
    for rule in rules:
        if numbers := re.fullmatch(rule.ours.replace("{}", r"(\d+)"), path):
            return rule.theirs.format(*numbers.groups()), rule.change
    raise LookupError(f"no rule of the layout has {path}")
