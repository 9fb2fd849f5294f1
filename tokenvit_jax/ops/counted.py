"""Marks an operator as one unit whose multiply-adds are given by a formula.

The products in an operator's jaxpr depend on the implementation (padding, masked products, shifted
sums), not only on the mathematics. A counted operator appears in a jaxpr as one jitted call with
its own name; :func:`count_macs` uses the formula instead of looking inside.
"""

from collections.abc import Callable

import jax

PREFIX = "tokenvit_jax.ops."

# Name of the jitted call -> (input shapes, output shapes) -> multiply-adds.
MAC_FORMULAS: dict[str, Callable[[list, list], int]] = {}


def counted(
    formula: Callable[[list, list], int], static_argnames: tuple[str, ...] = ()
) -> Callable[[Callable], Callable]:
    """Jits an operator under its own name and registers the formula for its multiply-adds.

    Args:
      formula: maps the shapes of the flattened array inputs and outputs to multiply-adds.
      static_argnames: arguments that are Python values.

    Returns:
      The decorator.
    """

    def decorate(function):
        function.__name__ = PREFIX + function.__name__
        MAC_FORMULAS[function.__name__] = formula
        return jax.jit(function, static_argnames=static_argnames)

    return decorate


def counted_as(name: str, macs_per_image: int, function: Callable) -> Callable:
    """Jits a function of arrays as one unit whose multiply-adds do not follow from the shapes.

    Args:
      name: name of the operator.
      macs_per_image: multiply-adds for one image.
      function: function for the shapes and settings of one call; its first argument has a leading
        axis of images. The caller is itself jitted, so that this code runs once per shape.

    Returns:
      The jitted function.
    """

    def run(*args):
        return function(*args)

    run.__name__ = f"{PREFIX}{name}_{macs_per_image}"
    MAC_FORMULAS[run.__name__] = lambda inputs, outputs: inputs[0][0] * macs_per_image
    return jax.jit(run)
