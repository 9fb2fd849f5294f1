"""The program `tokenvit`: tokenvit COMMAND --flag=value ..., the same as python -m tokenvit_jax."""

import runpy
import sys
from pathlib import Path

from absl import flags

from tokenvit_jax import cli
from tokenvit_jax.config_flag import title_of
from tokenvit_jax.errors import did_you_mean

# Each is a module with a docstring, FLAGS and main.
COMMANDS = (
    "train",
    "evaluate",
    "predict",
    "prepare",
    "label",
    "convert",
    "expedite",
    "export",
    "summary",
    "benchmark",
    "compile",
    "list",
)


def main() -> None:
    """Runs the command that the first argument names, as `python -m tokenvit_jax.COMMAND` does."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name not in COMMANDS:
        sys.argv = sys.argv[:1]
        cli.run(lambda _: _without_command(name), flags.FlagValues())
    sys.argv = [f"tokenvit {name}", *sys.argv[2:]]
    with cli.interruptible():
        runpy.run_module(f"tokenvit_jax.{name}", run_name="__main__", alter_sys=True)


def _without_command(name: str) -> None:
    if name not in cli.HELP:
        hint = did_you_mean(name, COMMANDS)
        raise cli.UsageError(f"no command {name!r}{hint}; valid: {', '.join(COMMANDS)}")
    print(usage())


def usage() -> str:
    """Returns the list of the commands."""
    folder = Path(__file__).parent
    titles = {name: title_of(folder / f"{name}.py").split(": python -m")[0] for name in COMMANDS}
    lines = [f"  {name:<12}{title}" for name, title in titles.items()]
    return "\n".join(
        [
            "Token-efficient vision transformers: tokenvit COMMAND --flag=value ...",
            "",
            *lines,
            "",
            "tokenvit COMMAND --help describes a command and its flags; tokenvit train --help "
            "--config=NAME also the entries of a config.",
        ]
    )


if __name__ == "__main__":
    main()
