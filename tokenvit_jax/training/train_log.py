"""Writes the logs of a run: a progress bar or lines, `metrics.jsonl`, TensorBoard events.

A number has the same name in all logs, such as "loss", "grad_norm", "learning_rate",
"images_per_second", "data/wait", "data/skipped", "eval/accuracy".
"""

import contextlib
import json
import logging
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from tokenvit_jax import progress
from tokenvit_jax.output import Log, write_file
from tokenvit_jax.training.batches import WaitWarning
from tokenvit_jax.training.processes import is_main_process
from tokenvit_jax.training.workdir import CONFIG_FILE, has_config, read_file

METRICS_FILE = "metrics.jsonl"
DAMAGED_FILE = "metrics.jsonl.damaged"  # lines that could not be read when the run went on
_NUM_NAMED = 5  # damaged lines that a warning names
_START = b'{"step": '  # of each line


class TrainLog:
    """Writes the metrics of a run; processes other than the main one only warn."""

    def __init__(
        self,
        workdir: Path,
        *,
        steps_done: int,
        num_steps: int,
        batch_size: int,
        every_steps: int,
        waited: Callable[[], float],
        warning: WaitWarning,
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
          waited: returns for how long the devices have waited for data so far [s].
          warning: is told the waits.
          enabled: whether this process writes.

        Raises:
          UserError: a log cannot be read or written; later calls raise it, too.
        """
        self._enabled = enabled
        self._batch_size = batch_size
        self._every_steps = every_steps
        self._clock = None  # (step, time, wait until then)
        self._waited, self._warning = waited, warning
        if not enabled:
            return
        _drop_later_steps(workdir, steps_done)
        self._lines = Log(workdir / METRICS_FILE)
        self._events = _Events(workdir, steps_done)
        self._config_file = workdir / CONFIG_FILE
        self._config = read_file(self._config_file) if has_config(workdir) else None
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
            self._lines.close()

    def restart_clock(self, step: int) -> None:
        """Restarts the clock, to leave out the time to compile, evaluate and save."""
        self._clock = step, time.monotonic(), self._waited()

    def write_steps(self, done: list[tuple[int, dict[str, float]]]) -> None:
        """Moves the progress bar and logs every n-th step.

        Args:
          done: steps since the last call, with their metrics.
        """
        if not done:
            return
        last_step, last_metrics = done[-1]
        speed = self._speed(last_step)
        logged = [(step, metrics) for step, metrics in done if step % self._every_steps == 0]
        if self._enabled:
            for step, metrics in logged:
                numbers = {name: value.item() for name, value in metrics.items()} | speed
                self.write(step, numbers, visible=self._bar.disable)
            shown = {"loss": last_metrics["loss"], **speed}
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()})
            self._bar.update(last_step - self._bar.n)
        if logged:
            self._warn()
            self.restart_clock(last_step)

    def write(self, step: int, metrics: dict[str, float], *, visible: bool = True) -> None:
        """Logs the metrics of a step and, if `visible`, also prints them."""
        if not self._enabled:
            return
        self._lines.append(json.dumps({"step": step, **metrics}).encode() + b"\n")
        self._events.write(step, metrics)
        if self._config is not None and not os.path.lexists(self._config_file):
            logging.warning("%s was deleted: written again", self._config_file)
            write_file(self._config_file, self._config)
        if visible:
            numbers = "  ".join(f"{name} {value:.6g}" for name, value in metrics.items())
            self.note(f"step {step}  {numbers}")

    def note(self, text: str) -> None:
        """Prints a line, above the progress bar if there is one."""
        if self._enabled:
            progress.note(text)

    def _speed(self, step: int) -> dict[str, float]:
        """Returns what was measured since the clock started; empty until a step has ended."""
        if self._clock is None or self._clock[0] == step:
            return {}
        clock_step, _, _ = self._clock
        waited, elapsed = self._since_clock()
        images = (step - clock_step) * self._batch_size
        return {"images_per_second": images / elapsed, "data/wait": waited / elapsed}

    def _warn(self) -> None:
        if self._clock is not None:
            self._warning.add(*self._since_clock())

    def _since_clock(self) -> tuple[float, float]:
        """Returns the wait for data and the time since the clock started [s]."""
        _, clock, waited = self._clock
        return self._waited() - waited, time.monotonic() - clock


class _Events:
    """A file of TensorBoard's, written in the thread of its caller, which receives the errors."""

    def __init__(self, workdir: Path, steps_done: int):
        # tensorboardX imports torch if it is installed, which takes a second: while workers start.
        from tensorboardX.proto import event_pb2, summary_pb2
        from tensorboardX.record_writer import masked_crc32c

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._check = masked_crc32c
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
        self._log = Log(workdir / name)
        self._add(file_version="brain.Event:2")
        # TensorBoard hides what an interrupted run logged from this step on.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(step=steps_done + 1, session_log=start)
        self.close = self._log.close

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Adds the metrics of a step."""
        make = self._summary.Value
        values = [make(tag=name, simple_value=value) for name, value in metrics.items()]
        self._add(step=step, summary=self._summary(value=values))

    def _add(self, **fields: Any) -> None:
        """Adds an event that happens now."""
        content = self._event(wall_time=time.time(), **fields).SerializeToString()
        size = struct.pack("<Q", len(content))
        check = [struct.pack("<I", self._check(part)) for part in (size, content)]
        self._log.append(size + check[0] + content + check[1])


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
        self._before: set[Path] = set()  # files of earlier traces

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: Any) -> None:
        if not self._running:
            return
        self._running = False
        try:
            jax.profiler.stop_trace()
        except (OSError, RuntimeError) as error:  # a trace that is lost does not end the training
            logging.warning("%s cannot be written: %s", self._folder, error)
            for path in set(self._folder.rglob("*.*")) - self._before:  # parts of the trace
                if path.is_file():
                    path.unlink()

    def before(self, step: int) -> None:
        """Starts the trace if this is the first step to trace; call this before each step."""
        if step == self._first:
            self._before = set(self._folder.rglob("*.*"))
            try:
                jax.profiler.start_trace(str(self._folder))
            except (OSError, RuntimeError) as error:  # such as another trace in a notebook
                logging.warning("%s cannot be written: %s", self._folder, error)
            else:
                self._running = True

    def after(self, step: int, results: Any) -> None:
        """Ends the trace if this was its last step; call this after each step with its results."""
        if self._running and step == self._last:
            jax.block_until_ready(results)
            self.__exit__()


def read_metrics(workdir: Path) -> list[dict[str, float]]:
    """Returns the logged metrics of a run, in order.

    A last line that a killed process left incomplete is left out, and with a warning any other line
    that cannot be read.

    Args:
      workdir: folder of the run.

    Raises:
      UserError: the file cannot be read.
    """
    readable, _ = _read_lines(workdir / METRICS_FILE)
    return [metrics for _, metrics in readable]


def _drop_later_steps(workdir: Path, last_step: int) -> None:
    """Keeps the lines up to a step, and moves those that cannot be read to another file."""
    path, aside = workdir / METRICS_FILE, workdir / DAMAGED_FILE
    if not os.path.lexists(path):
        return
    readable, damaged = _read_lines(path)
    if damaged:
        before = read_file(aside) if os.path.lexists(aside) else b""
        write_file(aside, before + b"".join(line + b"\n" for line in damaged))
        logging.warning("they are moved to %s", aside)
    kept = [line + b"\n" for line, metrics in readable if metrics["step"] <= last_step]
    write_file(path, b"".join(kept))


def _read_lines(path: Path) -> tuple[list[tuple[bytes, dict[str, float]]], list[bytes]]:
    """Returns the lines of a file with their metrics, and with a warning the damaged lines."""
    if not os.path.lexists(path):
        return [], []
    *lines, last = read_file(path).split(b"\n")
    # A killed process may leave a part of a line; what begins otherwise is damaged.
    if _parse(last) or last[: len(_START)] != _START[: len(last)]:
        lines.append(last)
    numbered = [(number, line, _parse(line)) for number, line in enumerate(lines, start=1)]
    damaged = [(number, line) for number, line, metrics in numbered if not metrics]
    if damaged:
        named = ", ".join(str(number) for number, _ in damaged[:_NUM_NAMED])
        more = ", ..." if len(damaged) > _NUM_NAMED else ""
        what = f"{len(damaged)} of {len(lines)} lines cannot be read and are left out"
        logging.warning("%s: %s: line %s%s", path, what, named, more)
    readable = [(line, metrics) for _, line, metrics in numbered if metrics]
    return readable, [line for _, line in damaged]


def _parse(line: bytes) -> dict[str, float]:
    """Returns the metrics in a line; empty if it is no line of :meth:`TrainLog.write`."""
    try:
        metrics = json.loads(line)
    except (ValueError, RecursionError):  # also text that is not UTF-8
        return {}
    if not isinstance(metrics, dict) or type(metrics.get("step")) is not int:
        return {}
    return metrics if all(type(value) in (int, float) for value in metrics.values()) else {}
