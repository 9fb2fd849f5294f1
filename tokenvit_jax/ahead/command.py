"""Compiles a step at a batch, or at the largest batch that fits."""

from collections.abc import Callable
from typing import NamedTuple

from ml_collections import ConfigDict

from tokenvit_jax.ahead.compiling import (
    Compiled,
    batch_per_device,
    check,
    compile_step,
    smallest_batch,
    with_batch,
)
from tokenvit_jax.ahead.fitting import MARGIN, largest_fit
from tokenvit_jax.ahead.report import images_text
from tokenvit_jax.ahead.targets import Target, parse_target

_WHAT = {"train": "training step", "evaluate": "evaluation step", "predict": "prediction"}


class Found(NamedTuple):
    """What :func:`compile_for` found.

    Attributes:
      compiled: the step, at the largest batch if that was searched.
      largest: largest batch per device that fits; None: it was not searched.
      step: batches per device are multiples of it.
    """

    compiled: Compiled
    largest: int | None
    step: int


def compile_for(
    config: ConfigDict,
    name: str,
    mode: str,
    batch: int | None = None,
    *,
    fit: bool = False,
    announce: Callable[[str], None] = lambda text: None,
) -> Found:
    """Compiles a step of a configuration.

    Args:
      config: configuration.
      name: name of the target, such as "h100x8".
      mode: one of `compiling.MODES`.
      batch: images per device, where --fit begins; None: those of the configuration.
      fit: whether to search the largest batch that fits into the memory.
      announce: called with a line before each compilation.

    Raises:
      UserError: see `targets.parse_target` and `compiling.compile_step`.
    """
    target = parse_target(name)
    batch = batch or batch_per_device(config, mode, target)
    check(with_batch(config, mode, batch * target.num_devices), target, mode)

    def compiled_at(size: int) -> Compiled:
        announce(f"compiling the {_WHAT[mode]} for {name}: {images_text(size)} per device ...")
        return compile_step(config, target, mode, size)

    step = smallest_batch(config, mode, target)
    if not fit:
        return Found(compiled_at(batch), None, step)
    return _fitted(compiled_at, target, batch, step)


def _fitted(compiled_at: Callable[[int], Compiled], target: Target, batch: int, step: int) -> Found:
    """Searches the largest batch that fits."""
    done: dict[int, Compiled] = {}

    def memory_of(size: int) -> tuple[int, int]:
        done[size] = compiled_at(size)
        return done[size].memory.state, done[size].memory.total

    capacity = int((1 - MARGIN) * target.device.memory)
    largest = largest_fit(memory_of, capacity, batch, step)
    return Found(done[largest or min(done)], largest, step)
