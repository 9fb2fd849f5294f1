"""Files of weights with the names of this project: safetensors with a description inside.

Any family fits, because nothing is renamed: the array of a variable has the variable's path as its
name, such as "params/blocks_0/attention/qkv/kernel" or "batch_stats/norm/mean".
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import save_file

from tokenvit_jax.errors import UserError
from tokenvit_jax.output import new_file
from tokenvit_jax.weights.files import (
    METADATA,
    check_file,
    is_safetensors,
    read_header,
    read_safetensors,
)
from tokenvit_jax.weights.rules import reason

_KEY = "tokenvit_jax"  # of the description in the header


def named_arrays(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the variables of a model by their paths, (name -> array)."""
    return flatten_dict(variables, sep="/")


def variables_of(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the tree of variables: the inverse of :func:`named_arrays`."""
    return unflatten_dict(arrays, sep="/")


def write_own(
    path: Path, variables: Mapping[str, Any], about: Mapping[str, Any], name: str = ""
) -> None:
    """Writes the variables of a model, and a description, as one safetensors file.

    Args:
      path: the new file.
      variables: variables for `model.apply`.
      about: description that :func:`read_own` returns, of values that JSON can hold.
      name: how the caller calls the path, for messages.

    Raises:
      UserError: the file cannot be written.
    """
    # Not `np.ascontiguousarray`, which gives scalars an axis.
    arrays = {name: np.asarray(x, order="C") for name, x in named_arrays(variables).items()}
    with new_file(path, name, (SafetensorError,)) as temporary:
        save_file(arrays, temporary, metadata={_KEY: json.dumps(about)})


def is_own(path: Path) -> bool:
    """Returns whether a file was written by :func:`write_own`.

    Raises:
      UserError: it is a safetensors file that is truncated or damaged.
    """
    return path.is_file() and is_safetensors(path) and _KEY in read_header(path).get(METADATA, {})


def read_own(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a file of :func:`write_own`.

    Args:
      path: the file.

    Returns:
      The variables, and the description.

    Raises:
      UserError: the file does not exist, is damaged, or comes from another program.
    """
    check_file(path)
    if not is_safetensors(path):
        raise UserError(
            f"--source={path} is not a readable safetensors file; valid: a file of --layout=own"
        )
    arrays, metadata = read_safetensors(path)
    try:
        about = json.loads(metadata.get(_KEY, "null"))
        variables = variables_of(arrays)
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"--source={path} is damaged: {reason(error)}") from error
    if not isinstance(about, dict):
        raise UserError(
            f"--source={path} does not name its model: tokenvit_jax did not write it; valid: the "
            "--layout of the program that did"
        )
    return variables, about
