"""Counts the parameters and multiply-adds (MACs) of models from shapes alone.

Linear layers, convolutions and attention count; elementwise work does not. The count of an operator
of :mod:`tokenvit_jax.ops` follows from its mathematics (attention in groups: 2kLC + 2LGC, Eq. 6 of
DGT), not from its implementation.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend import core

from tokenvit_jax.errors import UserError
from tokenvit_jax.kernels.platforms import default_forms
from tokenvit_jax.models.backbone import MIN_IMAGE_SIZE, variable_shapes
from tokenvit_jax.models.registry import create_model
from tokenvit_jax.ops.counted import MAC_FORMULAS, PREFIX
from tokenvit_jax.published import PUBLISHED, left_out

MAX_IMAGE_SIZE = 2**15  # a longer side is a typing error, which would end in a lack of memory


class Summary(NamedTuple):
    """Size and cost of a model.

    Attributes:
      name: name of the model.
      params: number of its parameters.
      macs: multiply-adds of the forward pass of one image.
      macs_as_published: multiply-adds that its paper counts; `published.LEFT_OUT` lists the parts
        that a paper leaves out.
    """

    name: str
    params: int
    macs: int
    macs_as_published: int


# ------------------------------------------------------------------------------------------------
# Models
# ------------------------------------------------------------------------------------------------


def summarize_models(
    names: Sequence[str],
    image_size: tuple[int, int],
    insertions: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> list[Summary]:
    """Summarizes models with 1000 classes, each followed by its variants.

    Args:
      names: some of :func:`tokenvit_jax.list_models`.
      image_size: height and width [pixels].
      insertions: model -> label of a variant -> overrides of `create_model`.

    Raises:
      UserError: a model is unknown, an override is not valid, or the images are too small.
    """
    summaries = []
    for name in names:
        summaries.append(summarize(name, image_size))
        for label, overrides in insertions.get(name, {}).items():
            model = create_model(name, **overrides)
            summaries.append(summarize_model(model, image_size, f"{name} {label}"))
    return summaries


def summarize(name: str, image_size: tuple[int, int]) -> Summary:
    """Counts the parameters and the multiply-adds of a model with 1000 classes.

    Args:
      name: one of :func:`tokenvit_jax.list_models`.
      image_size: height and width [pixels].

    Raises:
      UserError: the model is unknown, or the images are too small for it.
    """
    return summarize_model(create_model(name), image_size, name)


def summarize_model(
    model: nn.Module, image_size: tuple[int, int], name: str, channels: int = 3
) -> Summary:
    """Counts the parameters and the multiply-adds of a model with any settings.

    Args:
      model: a model of :func:`tokenvit_jax.create_model`, or one built on its backbone.
      image_size: height and width [pixels].
      name: name of the model, which selects the paper whose way of counting applies.
      channels: number of channels of the images.
    """
    images = jax.ShapeDtypeStruct((1, *image_size, channels), jnp.float32)
    variables = variable_shapes(model, images)
    params = sum(math.prod(x.shape) for x in jax.tree.leaves(variables["params"]))
    jaxpr = _trace(functools.partial(model.apply, train=False), variables, images)
    macs_as_published = _count(jaxpr, frozenset(left_out(name)))
    return Summary(name, params, _count(jaxpr, frozenset()), macs_as_published)


def fits(
    create: Callable[..., nn.Module], image_size: tuple[int, int]
) -> Callable[[Mapping[str, Any]], Any]:
    """Returns a function that raises UserError for overrides that do not fit a model.

    Args:
      create: returns the model with overrides as keyword arguments.
      image_size: height and width [pixels].
    """
    images = jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32)
    return lambda overrides: variable_shapes(create(**overrides), images)


def parse_image_size(text: str) -> tuple[int, int]:
    """Reads "224" or "HEIGHTxWIDTH" as height and width [pixels].

    Raises:
      UserError: the text has another form, or a side is too small or too large for every model.
    """
    sizes = re.fullmatch(r"(\d{1,99})(?:x(\d{1,99}))?", text)
    if not sizes:
        raise UserError(f"--image_size={text} is neither a number nor HEIGHTxWIDTH, like 224x320")
    height, width = int(sizes[1]), int(sizes[2] or sizes[1])
    if not MIN_IMAGE_SIZE <= min(height, width) <= max(height, width) <= MAX_IMAGE_SIZE:
        raise UserError(
            f"--image_size={text}: both sides must be at least {MIN_IMAGE_SIZE} and at most "
            f"{MAX_IMAGE_SIZE}"
        )
    return height, width


def format_summaries(summaries: Sequence[Summary], image_size: tuple[int, int]) -> str:
    """Formats summaries as a table that also shows the published numbers.

    Args:
      summaries: one row each.
      image_size: height and width of the image [pixels].
    """
    width = max(12, *(len(summary.name) for summary in summaries))
    lines = [
        f"one image of {image_size[0]} x {image_size[1]} pixels; published: at 224 x 224",
        f"{'model':<{width}}{'parameters':>14}{'published':>12}"
        f"{'GMACs':>14}{'as published':>16}{'published':>12}",
    ]
    for name, params, macs, macs_as_published in summaries:
        paper = PUBLISHED.get(name)
        known = [f"{paper.params_m:g} M", format_known(paper.gmacs)] if paper else ["", ""]
        lines.append(
            f"{name:<{width}}{params:>14,}{known[0]:>12}"
            f"{macs / 1e9:>14.3f}{macs_as_published / 1e9:>16.3f}{known[1]:>12}"
        )
    return "\n".join(lines)


def format_known(value: float | None) -> str:
    """Formats a published number; returns "" where the paper gives none."""
    return "" if value is None else f"{value:g}"


# ------------------------------------------------------------------------------------------------
# Functions
# ------------------------------------------------------------------------------------------------


def count_macs(fn: Callable, *args: Any, leave_out: tuple[str, ...] = ()) -> int:
    """Counts the multiply-adds of matrix products and convolutions in a forward computation.

    An operator of :mod:`tokenvit_jax.ops` is counted by its formula, which holds for a plain call,
    without differentiation and without `jax.vmap`. Elementwise work does not count.

    Args:
      fn: function of arrays.
      *args: trees of arrays or `jax.ShapeDtypeStruct`; only shapes and types matter.
      leave_out: names of operators and scopes (`jax.named_scope`) that do not count.

    Returns:
      The number of multiply-adds. A conditional counts its most expensive branch.

    Raises:
      ValueError: a `while` loop contains a product; it may run any number of times.
    """
    return _count(_trace(fn, *args), frozenset(leave_out))


def _trace(fn: Callable, *args: Any) -> core.Jaxpr:
    with default_forms():  # all forms count alike
        return jax.make_jaxpr(fn)(*args).jaxpr


def _count(jaxpr: core.Jaxpr, leave_out: frozenset[str]) -> int:
    return sum(_count_equation(equation, leave_out) for equation in jaxpr.eqns)


def _count_equation(equation: core.JaxprEqn, leave_out: frozenset[str]) -> int:
    primitive, params = equation.primitive.name, equation.params
    name = str(params.get("name"))
    scopes = str(equation.source_info.name_stack).split("/")
    if not leave_out.isdisjoint([name.removeprefix(PREFIX), *scopes]):
        return 0
    inputs, outputs = ([v.aval.shape for v in vs] for vs in (equation.invars, equation.outvars))
    if primitive == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return math.prod(outputs[0]) * math.prod(inputs[0][i] for i in contracted)
    if primitive == "conv_general_dilated":
        # The kernel already has the input channels of one group only.
        out_channel = params["dimension_numbers"].rhs_spec[0]
        kernel = math.prod(inputs[1]) // inputs[1][out_channel]
        return math.prod(outputs[0]) * kernel
    if name in MAC_FORMULAS:
        return MAC_FORMULAS[name](inputs, outputs)

    inner = [_count(jaxpr, leave_out) for jaxpr in _inner_jaxprs(params)]
    if primitive == "cond":
        return max(inner)
    if primitive == "while" and any(inner):
        raise ValueError("a product in a while loop, of unknown length, cannot be counted")
    return sum(inner) * (params["length"] if primitive == "scan" else 1)


def _inner_jaxprs(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else [value]:
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item
