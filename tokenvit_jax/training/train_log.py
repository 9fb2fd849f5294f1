"""Writes the logs of a run: a progress bar or lines, `metrics.jsonl`, TensorBoard events.

A number has the same name in all logs, such as "loss", "grad_norm", "learning_rate",
"images_per_second", "data/skipped", "eval/accuracy".
"""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from tensorboardX import SummaryWriter
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from tokenvit_jax import progress
from tokenvit_jax.training.processes import is_main_process
from tokenvit_jax.training.workdir import replace_file

METRICS_FILE = "metrics.jsonl"


class TrainLog:
    """Writes the metrics of a run; does nothing in processes other than the main one."""

    def __init__(
        self,
        workdir: Path,
        *,
        steps_done: int,
        num_steps: int,
        batch_size: int,
        every_steps: int,
        enabled: bool,
    ):
        """Opens the logs of a new or resumed run.

        Args:
          workdir: folder of the logs.
          steps_done: number of steps done; lines that an interrupted run logged for later steps are
            dropped.
          num_steps: number of steps of the whole run.
          batch_size: number of images per step.
          every_steps: number of steps between two logged ones.
          enabled: whether this process writes.
        """
        self._enabled = enabled
        self._batch_size = batch_size
        self._every_steps = every_steps
        self._clock = None
        if not enabled:
            return
        path = workdir / METRICS_FILE
        _drop_later_steps(path, steps_done)
        self._file = path.open("a", buffering=1)  # line by line
        self._events = SummaryWriter(str(workdir), purge_step=steps_done + 1)
        self._bar = tqdm(
            total=num_steps, initial=steps_done, unit="step", disable=not progress.on_terminal()
        )
        self._redirected = contextlib.ExitStack()  # of warnings, which would tear the bar
        if steps_done:
            self.note(f"resumed {workdir} after step {steps_done}")

    def __enter__(self) -> "TrainLog":
        if self._enabled and not self._bar.disable:
            self._redirected.enter_context(logging_redirect_tqdm())
        return self

    def __exit__(self, *_: Any) -> None:
        if self._enabled:
            self._redirected.close()
            self._bar.close()
            self._events.close()
            self._file.close()

    def restart_clock(self, step: int) -> None:
        """Restarts the throughput clock, to leave out the time to compile, evaluate and save."""
        self._clock = step, time.monotonic()

    def write_steps(self, done: list[tuple[int, dict[str, float]]]) -> None:
        """Moves the progress bar and logs every n-th step.

        Args:
          done: steps since the last call, with their metrics.
        """
        if not self._enabled or not done:
            return
        last_step, last_metrics = done[-1]
        throughput = self._throughput(last_step)
        logged = [(step, metrics) for step, metrics in done if step % self._every_steps == 0]
        for step, metrics in logged:
            numbers = {name: value.item() for name, value in metrics.items()} | throughput
            self.write(step, numbers, visible=self._bar.disable)
        if logged:
            self.restart_clock(last_step)
        shown = {"loss": last_metrics["loss"], **throughput}
        self._bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()})
        self._bar.update(last_step - self._bar.n)

    def write(self, step: int, metrics: dict[str, float], *, visible: bool = True) -> None:
        """Logs the metrics of a step and, if `visible`, also prints them."""
        if not self._enabled:
            return
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)
        self._events.flush()
        if visible:
            numbers = "  ".join(f"{name} {value:.6g}" for name, value in metrics.items())
            self.note(f"step {step}  {numbers}")

    def note(self, text: str) -> None:
        """Prints a line, above the progress bar if there is one."""
        if self._enabled:
            progress.note(text)

    def _throughput(self, step: int) -> dict[str, float]:
        """Returns the images per second since the clock started; empty until a step has ended."""
        if self._clock is None or self._clock[0] == step:
            return {}
        clock_step, clock = self._clock
        images = (step - clock_step) * self._batch_size
        return {"images_per_second": images / (time.monotonic() - clock)}


def announce(text: str) -> None:
    """Prints a line, in the main process only."""
    if is_main_process():
        progress.note(text)


@contextlib.contextmanager
def timed(what: str) -> Iterator[None]:
    """Prints what begins, such as "compiling the training step", and afterwards its time."""
    announce(f"{what} ...")
    start = time.monotonic()
    yield
    announce(f"{what}: {time.monotonic() - start:.1f} s")


class Profile:
    """Writes a profiler trace of some steps to `WORKDIR/profile`, for TensorBoard or Perfetto."""

    def __init__(self, workdir: Path, first: int, last: int):
        """Traces the steps from `first` to `last` that this process runs."""
        self._folder = workdir / "profile"
        self._first, self._last = first, last
        self._running = False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False

    def before(self, step: int) -> None:
        """Starts the trace if this is the first step to trace; call this before each step."""
        if step == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, results: Any) -> None:
        """Ends the trace if this was its last step; call this after each step with its results."""
        if self._running and step == self._last:
            jax.block_until_ready(results)
            self.__exit__()


def read_metrics(workdir: Path) -> list[dict[str, float]]:
    """Returns the logged metrics of a run, in order; an incomplete last line is left out.

    Args:
      workdir: folder of the run.
    """
    path = workdir / METRICS_FILE
    # A process that is killed while it writes leaves a last line without a line end.
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _drop_later_steps(path: Path, last_step: int) -> None:
    kept = [line for line in read_metrics(path.parent) if line["step"] <= last_step]
    replace_file(path, "".join(json.dumps(line) + "\n" for line in kept))
