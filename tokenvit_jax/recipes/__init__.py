"""Training recipes: one file per family of models, and the two recipes that families share.

A file in `configs/` names its model and the values that it trains with, and calls one function of
this package.
"""

from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

from tokenvit_jax.errors import UserError, did_you_mean


def choose_config(arg: str, configs: Mapping[str, Callable[[], ConfigDict]]) -> ConfigDict:
    """Returns the configuration for the argument of `--config=FILE.py:ARGUMENT`.

    Args:
      arg: the argument; "" if there is none.
      configs: argument -> function that makes its configuration.

    Raises:
      UserError: the argument is unknown; the message lists the valid ones.
    """
    if arg not in configs:
        valid = ", ".join(name or "none" for name in configs)
        if not arg:
            raise UserError(f"--config=FILE:ARGUMENT needs an argument here; valid: {valid}")
        hint = did_you_mean(arg, configs)
        raise UserError(f"config argument {arg!r} is not valid{hint}; valid: {valid}")
    return configs[arg]()
