"""An operator at one shape, with its alternatives: what the benchmark of operators times."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Case(NamedTuple):
    """One operator at one shape.

    Attributes:
      shape: names and values that describe the shape in the output.
      inputs: arrays.
      num_differentiated: number of leading inputs that have a gradient.
      contenders: name -> function of the inputs, the obvious alternative first and ours last.
      peers: mode -> calls of operators of other packages by name; none where they are missing.
    """

    shape: dict[str, Any]
    inputs: tuple[jax.Array, ...]
    num_differentiated: int
    contenders: dict[str, Callable[..., jax.Array]]
    peers: Callable[[str], dict[str, Callable[[], Any]]] = lambda mode: {}
