"""Published weights: a table of names per layout, and their exchange with parameters of ours.

A layout is a list of rules. A rule pairs a name of ours with a name of theirs, both with one field
`{}` for the number of a block, and says how the arrays differ.
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


SAME = Change(lambda x: x, lambda x: x)
TRANSPOSED = Change(lambda x: x.transpose(), lambda x: x.transpose())
# (out, in, rows, columns) to (rows, columns, in, out)
KERNEL = Change(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))
WITHOUT_BATCH = Change(lambda x: x[0], lambda x: x[None])


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


def timm_vit(model: nn.Module) -> list[Rule]:
    """The rules of timm's `VisionTransformer` and `VisionTransformerDistilled`."""
    return [
        Rule("class_token", "cls_token", WITHOUT_BATCH),
        Rule("distillation_token", "dist_token", WITHOUT_BATCH),
        Rule("position", "pos_embed", WITHOUT_BATCH),
        *_linear("patches", "patch_embed.proj", KERNEL),
        *_norm("blocks_{}/norm1", "blocks.{}.norm1"),
        *_linear("blocks_{}/attention/qkv", "blocks.{}.attn.qkv"),
        *_linear("blocks_{}/attention/proj", "blocks.{}.attn.proj"),
        *_norm("blocks_{}/norm2", "blocks.{}.norm2"),
        *_linear("blocks_{}/mlp/fc1", "blocks.{}.mlp.fc1"),
        *_linear("blocks_{}/mlp/fc2", "blocks.{}.mlp.fc2"),
        *_norm("norm", "fc_norm" if model.pool == "mean" else "norm"),
        *_linear("classifier", "head"),
        *_linear("distillation_classifier", "head_dist"),
    ]


def timm_vit_settings(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the settings of a plain host that show in its weights; those it cannot read are left.

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


# Layout -> first part of a model's name -> its rules and how to read its settings.
LAYOUTS = {
    "timm": {
        "vit": (timm_vit, timm_vit_settings),
        "deit": (timm_vit, timm_vit_settings),
    }
}


def import_weights(
    arrays: Mapping[str, np.ndarray], expected: Mapping[str, Any], rules: list[Rule]
) -> dict[str, Any]:
    """Returns parameters of ours from arrays of theirs.

    Args:
      arrays: name of theirs -> array.
      expected: tree of shapes of the parameters.
      rules: of the layout.

    Returns:
      A tree like ``expected``, float32.

    Raises:
      UserError: names all entries that are missing, have another shape or belong to nothing.
    """
    left, params, wrong = dict(arrays), {}, []
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
    number = re.search(r"(?<=_)\d+(?=/)", path)
    pattern = path if number is None else path.replace(f"_{number[0]}/", "_{}/", 1)
    (rule,) = [rule for rule in rules if rule.ours == pattern]
    return rule.theirs.format(*([number[0]] if number else [])), rule.change
