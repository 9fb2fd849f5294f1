"""Variables that training leaves as they are: `optimizer.freeze`."""

import contextlib
import fnmatch
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
from jax import lax

from tokenvit_jax.errors import UserError
from tokenvit_jax.layers import BatchNorm
from tokenvit_jax.models.backbone import BACKBONE


class Frozen:
    """The frozen variables of a model; without patterns, no variable is frozen.

    A frozen variable gets no gradient, no weight decay and no state of the optimizer. Other
    collections do not move either: frozen BatchNorms use and keep their statistics, frozen
    centroids stay where they are.
    """

    def __init__(self, freeze: str, model: nn.Module | None):
        """Reads `optimizer.freeze`.

        Args:
          freeze: patterns of paths, separated by commas; a pattern also names everything inside
            the modules that it matches. "backbone" names all but the classifier or head.
          model: model that is trained; None is valid without patterns.
        """
        self._patterns = [part.strip() for part in freeze.split(",") if part.strip()]
        self._model = model

    def __bool__(self) -> bool:
        return bool(self._patterns)

    def __call__(self, path: str) -> bool:
        """Returns whether the variable with this path, such as "blocks_0/norm1/bias", is frozen."""
        return any(self._matches(path, pattern) for pattern in self._patterns)

    def labels(self, params: Any) -> Any:
        """Returns a tree like `params` of "frozen" and "trained".

        Raises:
          UserError: a pattern matches no parameter, or all parameters are frozen.
        """
        paths = jax.tree.leaves(map_paths(lambda path, _: path, params))
        modules = ", ".join(sorted({BACKBONE, *(path.split("/")[0] for path in paths)}))
        for pattern in self._patterns:
            if not any(self._matches(path, pattern) for path in paths):
                raise UserError(
                    f"config.optimizer.freeze={pattern!r} matches no parameter; valid: {modules}, "
                    f"paths such as {paths[0]}, and patterns of these with * and ?"
                )
        if all(map(self, paths)):
            raise UserError(
                f"config.optimizer.freeze={','.join(self._patterns)!r} leaves no parameter to "
                f"train; there are: {modules}"
            )
        return map_paths(lambda path, _: "frozen" if self(path) else "trained", params)

    def stop_gradient(self, params: Any) -> Any:
        """Returns the parameters, without gradients of the frozen ones."""
        if not self:
            return params
        return map_paths(lambda path, x: lax.stop_gradient(x) if self(path) else x, params)

    def hold(self, new: Any, old: Any) -> Any:
        """Returns the variables `new`, but the frozen ones of `old`.

        Args:
          new: variables by collection.
          old: variables with these collections.
        """
        if not self:
            return new
        return {
            name: map_paths(lambda path, x, y: y if self(path) else x, tree, old[name])
            for name, tree in new.items()
        }

    @contextlib.contextmanager
    def statistics(self) -> Iterator[None]:
        """Inside, frozen BatchNorms use their statistics in training as in evaluation."""

        def intercept(call, args, kwargs, context):
            module = context.module
            if isinstance(module, BatchNorm) and self("/".join((*module.path, "mean"))):
                kwargs = {**kwargs, "use_running_average": True}
            return call(*args, **kwargs)

        with nn.intercept_methods(intercept) if self else contextlib.nullcontext():
            yield

    def _matches(self, path, pattern):
        if pattern == BACKBONE:
            return not self._model.is_head(path)
        return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"{pattern}/*")


def map_paths(function: Callable[..., Any], *trees: Any) -> Any:
    """Maps `function(path, *leaves)` over equal trees; a path is names joined by "/"."""

    def call(path, *leaves):
        return function(jax.tree_util.keystr(path, simple=True, separator="/"), *leaves)

    return jax.tree_util.tree_map_with_path(call, *trees)
