"""Reads pickles of NumPy arrays, as detectron2 writes them, without running code from them.

A pickle names the functions that it calls. Here it gets only those that make arrays and plain
containers; a file that names any other is refused.
"""

import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tokenvit_jax.errors import UserError
from tokenvit_jax.weights.rules import reason, shown
from tokenvit_jax.weights.torch_files import choose

START = b"\x80"  # of pickles from protocol 2 on; older ones are text


def _encoded(text: str, encoding: str) -> bytes:
    """Returns bytes that protocol 2 stores as text."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text in {encoding}")
    return text.encode("latin1")


def _array_functions() -> dict[str, Callable[..., Any]]:
    """Returns the functions that a file may call, by their names in old and new releases."""
    scalar, reconstruct = np.float32(0).__reduce__()[0], np.zeros(1).__reduce__()[0]
    from_buffer = np.zeros(1).__reduce_ex__(5)[0]
    numpy = {
        "multiarray.scalar": scalar,
        "multiarray._reconstruct": reconstruct,
        "numeric._frombuffer": from_buffer,
    }
    return {
        "numpy.dtype": np.dtype,
        "numpy.ndarray": np.ndarray,
        "collections.OrderedDict": OrderedDict,
        "_codecs.encode": _encoded,
        **{f"numpy.{core}.{name}": f for core in ("core", "_core") for name, f in numpy.items()},
    }


class _Unpickler(pickle.Unpickler):
    """Refuses all names but those of :func:`_array_functions`."""

    _functions = _array_functions()

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in self._functions:
            raise _RefusedError(f"{module}.{name}")
        return self._functions[f"{module}.{name}"]


class _RefusedError(Exception):
    """The name of a function or class that a pickle may not have."""


def read_pickle(path: Path, ema: bool) -> dict[str, np.ndarray]:
    """Reads the arrays of a pickle.

    Args:
      path: a pickle of arrays by name, possibly inside "model" or the like.
      ema: whether to read the moving average of the arrays in place of the arrays.

    Returns:
      Name -> array.

    Raises:
      UserError: the file is damaged, holds anything but arrays, texts and numbers, or no arrays by
        name.
    """
    try:
        with path.open("rb") as file:
            content = _Unpickler(file, fix_imports=False).load()
    except _RefusedError as error:
        raise UserError(
            f"--source={path} is refused: it is a pickle that holds more than NumPy arrays "
            f"({shown(str(error))}), and reading it could run code; valid: a pickle of arrays by "
            "name, or a safetensors file"
        ) from error
    except Exception as error:  # a damaged pickle raises many kinds
        raise UserError(f"--source={path} is truncated or damaged: {reason(error)}") from error
    arrays = choose(path, content, np.ndarray, ema)
    for name, array in arrays.items():
        if array.dtype.kind not in "biufc":
            raise UserError(
                f"--source={path}: {shown(name)} has the type {array.dtype}; valid: numbers"
            )
    return arrays
