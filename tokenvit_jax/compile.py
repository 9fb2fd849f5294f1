"""Compiles the steps of a config for GPUs and TPUs that are not here, and tells what they cost.

    python -m tokenvit_jax.compile --config=configs/dgt_t.py --target=h100
    python -m tokenvit_jax.compile --config=configs/dgt_t.py --target=h100x8 --fit
    python -m tokenvit_jax.compile --config=configs/dgt_t.py --target=v5e:16x16 --format=json

It compiles the same step as `train`, on any machine and without data, and prints the memory of a
device, the kernels and their least time part by part, the collectives, estimated images per second,
and kernels that cannot take their arguments. The compilers for GPUs and TPUs are packages:

    pip install './tokenvit_jax[aot-gpu]'
    pip install './tokenvit_jax[aot-tpu]'

A training step takes a minute or two to compile on two cores, detectors longer. Exit status 1: an
error, also if the step does not fit into the memory of a device.
"""

from tokenvit_jax import stopping

if __name__ == "__main__":
    stopping.watch(saves=False)  # compilers do not return to Python for minutes

import sys

from absl import flags

from tokenvit_jax import cli
from tokenvit_jax.errors import UserError
from tokenvit_jax.valid import whole

# A test compares both with `ahead`, whose import is too slow for --help.
MODES = ("train", "evaluate", "predict")
FORMATS = ("table", "markdown", "json")

FLAGS = cli.config_flags()
flags.DEFINE_string(
    "target",
    None,
    "devices: a GPU (h100, h200, a100), several (h100x8), or a TPU topology (v5e:16x16, v4:4x4x8)",
    flag_values=FLAGS,
)
flags.DEFINE_enum(
    "mode",
    "train",
    MODES,
    "step to compile; predict: the outputs of an exported model",
    flag_values=FLAGS,
)
cli.define_number(
    FLAGS,
    "batch_per_device",
    None,
    "images per device; default: the batch of the configuration, with --mode=predict 1",
    whole(1, 2**16),
)
flags.DEFINE_bool(
    "fit",
    False,
    "search the largest batch per device that fits into the memory, and report on it",
    flag_values=FLAGS,
)
flags.DEFINE_enum("format", "table", FORMATS, "output format", flag_values=FLAGS)


def main(flag_values: flags.FlagValues) -> None:
    """Compiles the step and prints the report."""
    from tokenvit_jax.ahead import report
    from tokenvit_jax.ahead.command import compile_for

    found = compile_for(
        cli.read_config(flag_values),
        flag_values.target,
        flag_values.mode,
        flag_values.batch_per_device,
        fit=flag_values.fit,
        announce=lambda text: print(text, file=sys.stderr, flush=True),
    )
    print(report.format_report(found.compiled, flag_values.format, found.largest, found.step))
    if not found.compiled.fits:
        sys.stdout.flush()
        raise UserError(report.excess(found.compiled, found.step))


if __name__ == "__main__":
    cli.run(main, FLAGS, required=["config", "target"])
