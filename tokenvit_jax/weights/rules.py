"""Rules that map published arrays to parameters of this project, and back.

A layout is a table. Each rule pairs the path of a parameter here with the name of an array in the
published file, both with the same number of fields `{}` for stages and blocks, and converts between
the two arrays. A parameter may also come from several arrays, such as those of queries, keys and
values.
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
    """Converts published arrays into a parameter of this project, and back.

    Attributes:
      to_ours: takes the published arrays of a rule, one argument each.
      to_theirs: returns the published array; a tuple for rules with several of them.
    """

    to_ours: Callable[..., np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray | tuple[np.ndarray, ...]]


class Rule(NamedTuple):
    """Pairs a parameter with one or more published arrays.

    Attributes:
      ours: path of the parameter, such as "blocks_{}/norm1/scale"; of a running statistic, with
        `STATISTICS` in front, such as "batch_stats/head/norm/mean".
      theirs: name of the array in the file, such as "blocks.{}.norm1.weight", or several names.
      change: conversion between the arrays.
    """

    ours: str
    theirs: str | tuple[str, ...]
    change: Change


Arrays = Mapping[str, np.ndarray]


def timm_crop(image_size: int, arrays: Arrays) -> float:
    """Returns the side of the centre crop over the shorter side in timm's evaluation."""
    del arrays
    return 0.9 if image_size < 384 else 1.0


class Layout(NamedTuple):
    """Names and shapes of the arrays that one code base publishes for one family of models.

    Attributes:
      task: name of the task that the models solve.
      marks: regular expressions for names; a file has this layout if each of them matches the start
        of a name.
      normalization: pixel normalisation of most weights published in this layout.
      rules: model -> its rules; the first rule that matches a path applies.
      num_classes: arrays of a file -> number of classes; 0: the file has no classifier.
      model_overrides: arrays of a file -> the settings of the model or backbone that the arrays
        determine.
      image_size: model and arrays of a file -> height and width of the images that the model was
        trained on [pixels].
      eval_crop: image size and arrays of a file -> side of the centre crop over the shorter side
        in the evaluation of the published models; None: the task has no crop.
      config_entries: arrays of a file -> further entries of the configuration, such as the head.
      assumed: arrays of a file -> names of settings on which the outputs depend, and which the
        arrays do not determine; the importer states their values.
      unused: regular expressions for the start of the names of arrays that have no counterpart in
        the models of this project.
      prepare: changes the arrays of a file before all else, such as their names.
      complete: adds to the arrays of a model those that the published code wants to read, but on
        which no output depends.
    """

    task: str
    marks: tuple[str, ...]
    normalization: str
    rules: Callable[[nn.Module], list[Rule]]
    num_classes: Callable[[Arrays], int]
    model_overrides: Callable[[Arrays], dict[str, Any]]
    image_size: Callable[[nn.Module, Arrays], int | tuple[int, int]]
    eval_crop: Callable[[int, Arrays], float] | None = timm_crop
    config_entries: Callable[[Arrays], dict[str, Any]] = lambda arrays: {}
    assumed: Callable[[Arrays], tuple[str, ...]] = lambda arrays: ()
    unused: tuple[str, ...] = ()
    prepare: Callable[[Arrays], Arrays] = lambda arrays: arrays
    complete: Callable[[Arrays], Arrays] = lambda arrays: arrays

    def missing_marks(self, arrays: Arrays) -> list[str]:
        """Returns the marks that no name of a file matches, without the regular expression."""
        names = self.prepare(arrays)
        lacking = [mark for mark in self.marks if not any(re.match(mark, name) for name in names)]
        return [mark.split("|")[0].replace("\\", "") for mark in lacking]


SAME = Change(lambda x: x, lambda x: x)
TRANSPOSED = Change(lambda x: x.transpose(), lambda x: x.transpose())
# (out, in, rows, columns) -> (rows, columns, in, out)
KERNEL = Change(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))
# (in, out, rows, columns) -> (rows, columns, in, out), of a transposed convolution
TRANSPOSED_KERNEL = Change(lambda x: x.transpose(2, 3, 0, 1), lambda x: x.transpose(2, 3, 0, 1))
WITHOUT_BATCH = Change(lambda x: x[0], lambda x: x[None])
# (heads, 1, 1) -> (heads,)
FLAT = Change(lambda x: x.reshape(-1), lambda x: x.reshape(-1, 1, 1))
# (rows * columns, heads) -> (rows, columns, heads), square
TABLE = Change(
    lambda x: x.reshape(math.isqrt(len(x)), -1, x.shape[-1]), lambda x: x.reshape(-1, x.shape[-1])
)

# Three times (C, C) -> (C, 3 C), queries, keys, values; and the same for biases.
JOINED = Change(
    lambda *x: np.concatenate(x).transpose(), lambda x: tuple(np.split(x.transpose(), 3))
)
JOINED_BIAS = Change(lambda *x: np.concatenate(x), lambda x: tuple(np.split(x, 3)))

STATISTICS = "batch_stats"  # collection of the running statistics of BatchNorm
# Suffixes of arrays that some files hold, but that the models here compute or need not count.
COMPUTED = (
    "relative_position_index", "relative_coords_table", "attn_mask", "num_batches_tracked"
)  # fmt: skip
_NAMED = 10  # entries that an error message names; the others are counted
_SHOWN, _REASON = 80, 200  # characters of a name, and of another program's error, in a message


def shown(name: str) -> str:
    """Returns a name from a file for a message: on one line, and not too long."""
    text = name if name.isprintable() else repr(name)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def reason(error: Exception) -> str:
    """Returns an error of another program for a message: on one line, and not too long."""
    return " ".join(str(error).split())[:_REASON] or type(error).__name__


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


def joined(ours: str, *theirs: str) -> list[Rule]:
    """Returns the rules of one linear layer for queries, keys and values from three layers."""
    return [
        Rule(f"{ours}/kernel", tuple(f"{name}.weight" for name in theirs), JOINED),
        Rule(f"{ours}/bias", tuple(f"{name}.bias" for name in theirs), JOINED_BIAS),
    ]


def size_of(arrays: Arrays, name: str, axis: int = 0) -> int:
    """Returns the size of an array along an axis; 0 if there is no such array or axis."""
    shape = arrays[name].shape if name in arrays else ()
    return shape[axis] if -len(shape) <= axis < len(shape) else 0


def rows_of(*names: str) -> Callable[[Arrays], int]:
    """Returns a function from arrays to the rows of the first of some arrays; 0: none is there."""
    return lambda arrays: next(filter(None, (size_of(arrays, name) for name in names)), 0)


def within(ours: str, theirs: str, rules: list[Rule]) -> list[Rule]:
    """Returns the rules of a submodule with the parameters' names in the whole model."""
    return [Rule(f"{ours}/{rule.ours}", f"{theirs}.{rule.theirs}", rule.change) for rule in rules]


def parameter_shapes(model: nn.Module) -> dict[str, Any]:
    """Returns the tree of the model's parameters, as `jax.ShapeDtypeStruct`."""
    return _shapes(model)["params"]


def _shapes(model):
    return variable_shapes(model, jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))


def import_weights(
    arrays: Mapping[str, np.ndarray], model: nn.Module, layout: Layout
) -> dict[str, Any]:
    """Returns the parameters of :func:`import_variables`, for models without other variables."""
    return import_variables(arrays, model, layout)["params"]


def import_variables(
    arrays: Mapping[str, np.ndarray], model: nn.Module, layout: Layout
) -> dict[str, Any]:
    """Converts published arrays into variables of a model.

    Args:
      arrays: published name -> array. Arrays that the model computes itself are ignored, and a
        classifier if the model has none.
      model: model that receives the variables.
      layout: names and shapes of the arrays.

    Returns:
      The tree of variables [float32]: "params", and "batch_stats" if the model has statistics.

    Raises:
      UserError: arrays are missing, have another shape, are not finite floating-point numbers, or
        have no counterpart in the model; the message counts all and names the first of them.
    """
    rules = layout.rules(model)
    left = {
        name: array
        for name, array in arrays.items()
        if not name.endswith(COMPUTED) and not any(re.match(x, name) for x in layout.unused)
    }
    shapes = _by_path(_shapes(model))
    if not any(_is_classifier(path) for path in shapes):
        for name in [
            name for rule in rules if _is_classifier(rule.ours) for name in _tuple(rule.theirs)
        ]:
            left.pop(name, None)
    found_variables, wrong = {}, []
    for path, leaf in shapes.items():
        names, change = _theirs(path, rules)
        expected = _tuple(change.to_theirs(np.broadcast_to(np.float32(0), leaf.shape)))
        pairs = zip(names, expected, strict=True)
        found = [left.pop(name, None) for name in names]
        problems = [
            _problem(name, array, like.shape)
            for (name, like), array in zip(pairs, found, strict=True)
        ]
        wrong += filter(None, problems)
        if not any(problems):
            found_variables[path] = np.ascontiguousarray(change.to_ours(*found), np.float32)
    wrong += [
        f"{shown(name)} {array.shape} has no counterpart in the model"
        for name, array in left.items()
    ]
    if wrong:
        more = f"; and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
        entries = "1 entry does" if len(wrong) == 1 else f"{len(wrong)} entries do"
        raise UserError(f"{entries} not fit the model: {'; '.join(wrong[:_NAMED])}{more}")
    return _from_paths(found_variables)


def _by_path(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns variables by the paths that rules have for them."""
    flat = flatten_dict(variables, sep="/")
    return {path.removeprefix("params/"): leaf for path, leaf in flat.items()}


def _from_paths(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Undoes :func:`_by_path`."""
    full = {
        path if path.startswith(f"{STATISTICS}/") else f"params/{path}": leaf
        for path, leaf in leaves.items()
    }
    return unflatten_dict(full, sep="/")


def _is_classifier(path: str) -> bool:
    return path.split("/")[0] in ("classifier", "distillation_classifier")


def _problem(name: str, array: np.ndarray | None, shape: tuple[int, ...]) -> str | None:
    """Returns why an array cannot become a parameter; None: it can."""
    if array is None:
        return f"{name} is missing"
    if array.shape != shape:
        return f"{name} has shape {array.shape}, expected {shape}"
    if not jnp.issubdtype(array.dtype, jnp.floating):  # numpy's does not know bfloat16
        return f"{name} has the type {array.dtype}, expected floating-point numbers"
    if not np.isfinite(array).all():
        return f"{name} has values that are not finite"
    return None


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
    return export_variables({"params": params}, model, layout)


def export_variables(
    variables: Mapping[str, Any], model: nn.Module, layout: Layout
) -> dict[str, np.ndarray]:
    """Converts variables of a model into published arrays: inverse of :func:`import_variables`.

    Args:
      variables: "params", and "batch_stats" if the model has statistics.
      model: model of the variables.
      layout: names and shapes of the arrays.

    Returns:
      Published name -> array.

    Raises:
      LookupError: the layout has no name for a variable.
    """
    rules, arrays = layout.rules(model), {}
    for path, leaf in _by_path(variables).items():
        names, change = _theirs(path, rules)
        for name, array in zip(names, _tuple(change.to_theirs(np.asarray(leaf))), strict=True):
            arrays[name] = np.ascontiguousarray(array)
    return dict(layout.complete(arrays))


def _theirs(path: str, rules: list[Rule]) -> tuple[tuple[str, ...], Change]:
    for rule in rules:
        if numbers := re.fullmatch(rule.ours.replace("{}", r"(\d+)"), path):
            names = (name.format(*numbers.groups()) for name in _tuple(rule.theirs))
            return tuple(names), rule.change
    raise LookupError(f"no rule of the layout matches the parameter {path}")


def _tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
