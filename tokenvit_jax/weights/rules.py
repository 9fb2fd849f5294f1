"""Rules that map published arrays to parameters of this project, and back.

A layout is a table. Each rule pairs the path of a parameter here with the name of an array in the
published file, both with the same number of fields `{}` for stages and blocks, and converts between
the two arrays.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from tokenvit_jax.errors import UserError
from tokenvit_jax.models.backbone import variable_shapes


class Change(NamedTuple):
    """Converts a published array into a parameter of this project, and back."""

    to_ours: Callable[[np.ndarray], np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray]


class Rule(NamedTuple):
    """Pairs a parameter with a published array.

    Attributes:
      ours: path of the parameter, such as "blocks_{}/norm1/scale".
      theirs: name of the array in the file, such as "blocks.{}.norm1.weight".
      change: conversion between the two arrays.
    """

    ours: str
    theirs: str
    change: Change


class Layout(NamedTuple):
    """Names and shapes of the arrays that one code base publishes for one family of models.

    Attributes:
      task: name of the task that the models solve.
      normalization: pixel normalisation of most weights published in this layout.
      rules: model -> its rules; the first rule that matches a path applies.
      model_overrides: arrays of a file -> the settings of the model or backbone that the arrays
        determine.
      image_size: model -> height and width of the images it was trained on [pixels].
      config_entries: arrays of a file -> further entries of the configuration, such as the head.
      unused: prefixes of array names that have no counterpart in the models of this project.
    """

    task: str
    normalization: str
    rules: Callable[[nn.Module], list[Rule]]
    model_overrides: Callable[[Mapping[str, np.ndarray]], dict[str, Any]]
    image_size: Callable[[nn.Module], int]
    config_entries: Callable[[Mapping[str, np.ndarray]], dict[str, Any]] = lambda arrays: {}
    unused: tuple[str, ...] = ()


SAME = Change(lambda x: x, lambda x: x)
TRANSPOSED = Change(lambda x: x.transpose(), lambda x: x.transpose())
# (out, in, rows, columns) -> (rows, columns, in, out)
KERNEL = Change(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))
WITHOUT_BATCH = Change(lambda x: x[0], lambda x: x[None])
# (heads, 1, 1) -> (heads,)
FLAT = Change(lambda x: x.reshape(-1), lambda x: x.reshape(-1, 1, 1))
# (rows * columns, heads) -> (rows, columns, heads), square
TABLE = Change(
    lambda x: x.reshape(math.isqrt(len(x)), -1, x.shape[-1]), lambda x: x.reshape(-1, x.shape[-1])
)

# Suffixes of arrays that some files hold, but that the models here compute.
COMPUTED = ("relative_position_index", "relative_coords_table", "attn_mask")


def linear(ours: str, theirs: str, change: Change = TRANSPOSED) -> list[Rule]:
    """Returns the rules of a linear layer, or with the change KERNEL of a convolution."""
    return [
        Rule(f"{ours}/kernel", f"{theirs}.weight", change),
        Rule(f"{ours}/bias", f"{theirs}.bias", SAME),
    ]


def norm(ours: str, theirs: str) -> list[Rule]:
    """Returns the rules of a LayerNorm."""
    return [
        Rule(f"{ours}/scale", f"{theirs}.weight", SAME),
        Rule(f"{ours}/bias", f"{theirs}.bias", SAME),
    ]


def within(ours: str, theirs: str, rules: list[Rule]) -> list[Rule]:
    """Returns the rules of a submodule with the parameters' names in the whole model."""
    return [Rule(f"{ours}/{rule.ours}", f"{theirs}.{rule.theirs}", rule.change) for rule in rules]


def parameter_shapes(model: nn.Module) -> dict[str, Any]:
    """Returns the tree of the model's parameters, as `jax.ShapeDtypeStruct`."""
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    return variable_shapes(model, images)["params"]


def import_weights(
    arrays: Mapping[str, np.ndarray], model: nn.Module, layout: Layout
) -> dict[str, Any]:
    """Converts published arrays into parameters of a model.

    Args:
      arrays: published name -> array. Arrays that the model computes itself are ignored.
      model: model that receives the parameters.
      layout: names and shapes of the arrays.

    Returns:
      The tree of parameters [float32].

    Raises:
      UserError: arrays are missing, have another shape, or have no counterpart in the model; the
        message lists all of them.
    """
    rules = layout.rules(model)
    left = {
        name: array
        for name, array in arrays.items()
        if not name.endswith(COMPUTED) and not name.startswith(layout.unused)
    }
    params, wrong = {}, []
    for path, leaf in flatten_dict(parameter_shapes(model), sep="/").items():
        name, change = _theirs(path, rules)
        shape = change.to_theirs(np.broadcast_to(np.float32(0), leaf.shape)).shape
        array = left.pop(name, None)
        if array is None:
            wrong.append(f"{name} is missing")
        elif array.shape != shape:
            wrong.append(f"{name} has shape {array.shape}, expected {shape}")
        else:
            params[path] = np.ascontiguousarray(change.to_ours(array), np.float32)
    wrong += [
        f"{name} {array.shape} has no counterpart in the model" for name, array in left.items()
    ]
    if wrong:
        raise UserError(f"{len(wrong)} entries do not fit the model: {'; '.join(wrong)}")
    return unflatten_dict(params, sep="/")


def export_weights(
    params: Mapping[str, Any], model: nn.Module, layout: Layout
) -> dict[str, np.ndarray]:
    """Converts parameters of a model into published arrays: the inverse of :func:`import_weights`.

    Args:
      params: tree of the model's parameters.
      model: model of the parameters.
      layout: names and shapes of the arrays.

    Returns:
      Published name -> array.
    """
    rules, arrays = layout.rules(model), {}
    for path, leaf in flatten_dict(params, sep="/").items():
        name, change = _theirs(path, rules)
        arrays[name] = np.ascontiguousarray(change.to_theirs(np.asarray(leaf)))
    return arrays


def _theirs(path: str, rules: list[Rule]) -> tuple[str, Change]:
    for rule in rules:
        if numbers := re.fullmatch(rule.ours.replace("{}", r"(\d+)"), path):
            return rule.theirs.format(*numbers.groups()), rule.change
    raise LookupError(f"no rule of the layout matches the parameter {path}")
