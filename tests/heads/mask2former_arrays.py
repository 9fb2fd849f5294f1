"""Arrays of Mask2Former for the tests of heads, and its parameters in this project."""

import functools
import re
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict


@functools.cache
def golden(name):
    """Returns the arrays of a file by name."""
    return dict(np.load(Path(__file__).parent / "golden" / f"{name}.npz"))


def params_of(module, arrays, rules, *args):
    """Returns the parameters of a module from arrays whose names begin with "w:".

    Args:
      module: the module.
      arrays: arrays by name; all of them are used.
      rules: the part of a layout for the module.
      *args: arguments of a call of the module.
    """
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *args))["params"]
    left = {k.removeprefix("w:"): x for k, x in arrays.items() if k.startswith("w:")}
    params = {}
    for path, leaf in flatten_dict(shapes, sep="/").items():
        rule, found = next(
            (rule, found)
            for rule in rules
            if (found := re.fullmatch(rule.ours.replace("{}", r"(\d+)"), path))
        )
        params[path] = rule.change.to_ours(left.pop(rule.theirs.format(*found.groups())))
        assert params[path].shape == leaf.shape
    assert not left
    return unflatten_dict(params, sep="/")
