"""Prints the names of the models, configs or datasets: tokenvit list models|configs|datasets.

A model is a value of --config.model, a dataset of --config.dataset, and a config of --config: its
title follows its name, and its docstring lists its arguments (dgt_t:digits).
"""

from absl import flags

from tokenvit_jax import cli
from tokenvit_jax.config_flag import config_files, title_of
from tokenvit_jax.errors import did_you_mean

FLAGS = flags.FlagValues()
KINDS = ("models", "configs", "datasets")


def main(flag_values: flags.FlagValues, kind: str) -> None:
    """Prints one name per line."""
    if kind == "configs":
        files = config_files()
        width = max(map(len, files)) + 2
        print("\n".join(f"{name:{width}}{title_of(file)}" for name, file in files.items()))
    elif kind == "models":
        from tokenvit_jax.models import list_models

        print("\n".join(list_models()))
    elif kind == "datasets":
        from tokenvit_jax.data import datasets_with

        print("\n".join(datasets_with(frozenset())))
    else:
        hint = did_you_mean(kind, KINDS)
        raise cli.UsageError(f"{kind!r} cannot be listed{hint}; valid: {', '.join(KINDS)}")


if __name__ == "__main__":
    cli.run(main, FLAGS, positional=("models|configs|datasets",))
