"""Times a network with clustered tokens against the same network without, in turns."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from experiments import pages
from experiments.runs import random_variables
from tokenvit_jax.measure.macs import count_macs
from tokenvit_jax.measure.timing import compile_program, environment, time_in_turns

COLUMNS = [
    "network", "image", "GMACs, plain", "GMACs, clustered", "saved", "speed, ratio",
    "share of the saving", "rounds",
]  # fmt: skip


def measure(
    name: str,
    plain: nn.Module,
    clustered: nn.Module,
    image_size: tuple[int, int],
    seconds: float,
    **options: Any,
) -> list[str]:
    """Returns the cells of `COLUMNS` for one image and random weights, and prints them.

    Args:
      name: first cell.
      plain: the network.
      clustered: the network with clustered tokens, which has the same variables.
      image_size: height and width [pixels].
      seconds: measuring time of each program [s].
      options: of `Module.apply`.
    """
    images = jnp.asarray(np.random.default_rng(0).normal(size=(1, *image_size, 3)), jnp.float32)
    variables = random_variables(plain, images)
    macs: list[float] = []
    calls: dict[int, Callable[[], Any]] = {}
    for place, model in enumerate((plain, clustered)):
        apply = functools.partial(model.apply, **options)
        macs.append(count_macs(apply, variables, images) / 1e9)
        program = compile_program(apply, variables, images).call
        calls[place] = functools.partial(program, variables, images)
    times = time_in_turns(calls, seconds=seconds)
    saved = macs[0] / macs[1]
    speed = float(np.median(times[0]) / np.median(times[1]))
    cells = [
        name, "{} x {}".format(*image_size), *(f"{count:.1f}" for count in macs),
        f"{saved:.3f}", f"{speed:.3f}", f"{speed / saved:.3f}", str(len(times[0])),
    ]  # fmt: skip
    print(" | ".join(cells), flush=True)
    return cells


def table(rows: list[list[str]]) -> list[str]:
    """Returns the lines of the machine and of the table of rows of :func:`measure`."""
    machine = ", ".join(f"{key} {value}" for key, value in environment().items())
    return [*pages.paragraph(f"Measured on {machine}."), "", *pages.table(COLUMNS, rows)]
