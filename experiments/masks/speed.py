"""Measures how many of the saved multiply-adds become speed: Mask2Former with Swin-L.

    python -m experiments.masks.speed [--seconds=60]

For ADE20K semantic and COCO panoptic, the network with the plain backbone and with the released
setting of Expedite take turns in one process, with random weights and one image: from the image to
the logits of classes and masks. Nothing else should run on the machine. Writes speed.md here.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import pages
from experiments.masks.published import EXPEDITE, NETWORKS, Expedited, expedite_of, model_of
from experiments.runs import random_variables
from tokenvit_jax import cli
from tokenvit_jax.measure.macs import count_macs
from tokenvit_jax.measure.timing import compile_program, environment, time_in_turns
from tokenvit_jax.memory import keep_pages

FLAGS = flags.FlagValues()
flags.DEFINE_float("seconds", 60.0, "measuring time of each program", flag_values=FLAGS)

SIZES = {"ADE20K semantic": (640, 640), "COCO panoptic": (800, 1200)}
PLAIN, CLUSTERED = "plain", "clustered"
COLUMNS = [
    "network", "image", "GMACs, plain", "GMACs, clustered", "saved", "speed, ratio",
    "share of the saving", "rounds",
]  # fmt: skip
ABOUT = """
Swin-L with the released settings of Expedite, against the same network without. "saved" is the
ratio of the multiply-adds of the whole network, "speed" the ratio of the median times of calls in
turns, and the share is their quotient.
"""


def measure(row: Expedited, seconds: float) -> list[str]:
    """Returns the cells of a setting.

    Args:
      row: the setting; its name is also that of the network.
      seconds: measuring time of each program [s].
    """
    size = SIZES[row.name]
    network = next(network for network in NETWORKS if network.name == row.name)
    models = {
        PLAIN: model_of(network),
        CLUSTERED: model_of(network, expedite_of(row, row.location)),
    }
    images = jnp.asarray(np.random.default_rng(0).normal(size=(1, *size, 3)), jnp.float32)
    variables = random_variables(models[PLAIN], images)
    macs: dict[str, float] = {}
    calls: dict[str, Callable[[], Any]] = {}
    for name, model in models.items():
        apply = functools.partial(model.apply, train=False)
        macs[name] = count_macs(apply, variables, images) / 1e9
        program = compile_program(apply, variables, images).call
        calls[name] = functools.partial(program, variables, images)
    times = time_in_turns(calls, seconds=seconds)
    saved = macs[PLAIN] / macs[CLUSTERED]
    speed = float(np.median(times[PLAIN]) / np.median(times[CLUSTERED]))
    return [
        row.name, "{} x {}".format(*size), f"{macs[PLAIN]:.1f}", f"{macs[CLUSTERED]:.1f}",
        f"{saved:.3f}", f"{speed:.3f}", f"{speed / saved:.3f}", str(len(times[PLAIN])),
    ]  # fmt: skip


def main(flag_values: flags.FlagValues) -> None:
    """Runs the experiment."""
    keep_pages()
    rows = []
    for row in EXPEDITE:
        if row.name in SIZES:
            rows.append(measure(row, flag_values.seconds))
            print(" | ".join(rows[-1]), flush=True)
    machine = ", ".join(f"{key} {value}" for key, value in environment().items())
    lines = [
        *pages.heading("Speed of a clustered Mask2Former", __file__, ABOUT),
        *("", *pages.paragraph(f"Measured on {machine}."), "", *pages.table(COLUMNS, rows)),
    ]
    pages.write(__file__, lines)


if __name__ == "__main__":
    cli.run(main, FLAGS)
