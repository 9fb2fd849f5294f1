"""Checks calls against the shapes that the types of a function state (jaxtyping)."""

import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Callable, Iterator

import jax
from jaxtyping import jaxtyped

VAR_POSITIONAL = inspect.Parameter.VAR_POSITIONAL


def public_callables(package: types.ModuleType) -> Iterator[tuple[str, Callable]]:
    """Yields every public function and class that a module of a package defines, with its path."""
    for info in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        for name, value in vars(importlib.import_module(info.name)).items():
            own = getattr(value, "__module__", None) == info.name
            if own and callable(value) and not name.startswith("_"):
                yield f"{info.name.rpartition('.')[2]}.{name}", value


def missing_annotations(function: Callable) -> list[str]:
    """Returns the names of arguments without a type, and "return" if the result has none."""
    signature = inspect.signature(inspect.unwrap(function))
    empty = inspect.Parameter.empty
    missing = [
        name
        for name, parameter in signature.parameters.items()
        if parameter.annotation is empty and name != "self"
    ]
    return missing + ["return"] * (signature.return_annotation is empty)


def trace_checked(function: Callable, *args, **kwargs) -> None:
    """Traces a call and checks its arguments and its result; nothing is compiled."""
    leaves, tree = jax.tree.flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]

    def call(arrays):
        traced = dict(zip(places, arrays, strict=True))
        args, kwargs = tree.unflatten([traced.get(i, leaf) for i, leaf in enumerate(leaves)])
        check_call(function, args, kwargs, function(*args, **kwargs))

    jax.eval_shape(call, [leaves[i] for i in places])


def check_call(function: Callable, args: tuple, kwargs: dict, result) -> None:
    """Raises AssertionError unless arguments and result have the types of the function.

    The check follows the call, so that the function's own errors come first. Sizes with the same
    name must be equal.
    """
    function = inspect.unwrap(function)
    types_by_name = typing.get_type_hints(function)
    signature = inspect.signature(function)
    named = [*signature.bind(*args, **kwargs).arguments.items(), ("return", result)]
    with jaxtyped("context"):
        for name, value in named:
            expected = types_by_name.get(name, typing.Any)
            several = name != "return" and signature.parameters[name].kind is VAR_POSITIONAL
            for x in value if several else [value]:
                assert _fits(x, expected), f"{name} is {_shapes(x)}; its type is {expected}"


def _shapes(value):
    return jax.tree.map(lambda x: x.aval if hasattr(x, "aval") else x, value)


def _fits(value, expected):
    origin, parts = typing.get_origin(expected), typing.get_args(expected)
    if expected is typing.Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(parts) == 2 and parts[1] is Ellipsis:
            parts = parts[:1] * len(value)
        return len(value) == len(parts) and all(map(_fits, value, parts))
    if origin is not None:
        return isinstance(value, origin)
    if expected is float:
        return isinstance(value, (float, int))
    if expected is None:
        return value is None
    if not isinstance(value, expected):
        return False
    if hasattr(expected, "_fields"):  # a NamedTuple
        fields = typing.get_type_hints(expected)
        return all(_fits(getattr(value, name), fields[name]) for name in expected._fields)
    return True
