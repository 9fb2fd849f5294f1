"""Evaluates a model in training, or a run, in one pass over the evaluation split."""

import contextlib
import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import length_hint
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from tokenvit_jax.data import eval_batches, open_split
from tokenvit_jax.data.workers import Batches
from tokenvit_jax.errors import UserError
from tokenvit_jax.measure.macs import summarize_model
from tokenvit_jax.models.backbone import variable_shapes
from tokenvit_jax.output import write_file
from tokenvit_jax.progress import progress
from tokenvit_jax.tasks import Task, create_task
from tokenvit_jax.training.devices import Parallel, make_parallel
from tokenvit_jax.training.expedite_run import with_measured_temperature
from tokenvit_jax.training.processes import check_alone, on_main_process
from tokenvit_jax.training.run import load_run
from tokenvit_jax.training.step import make_eval_step
from tokenvit_jax.training.validate import check_task
from tokenvit_jax.training.workdir import for_inference, read_config


def evaluate_batches(
    task: Task,
    eval_step: Callable,
    variables: Any,
    batches: Iterable,
    parallel: Parallel,
    per_class: bool = False,
    stopped: Callable[[], bool] = lambda: False,
    out: Path | None = None,
) -> dict[str, Any] | None:
    """Returns the metrics of a model over all batches.

    Args:
      task: task that provides the meter.
      eval_step: result of `Parallel.eval_step`.
      variables: variables of the model, on the devices.
      batches: this process's parts of the evaluation batches.
      parallel: places batches on the devices.
      per_class: whether to add metrics of every class, such as "per_class/iou": {name: value}, with
        None where the metric is not defined.
      stopped: called with every batch, equally in all processes; True ends the evaluation.
      out: file that receives the predictions in JSON, of a task with `has_results`; None: none.

    Returns:
      The metrics by name, with "eval/images_per_second", from the first request for a batch to the
      last result without the first call of the step, which may compile it; None if the evaluation
      was stopped.

    Raises:
      UserError: a record cannot be read, or none counts.
    """
    meter, pending = task.meter(), deque()
    images, begin = 0, time.monotonic()
    with contextlib.closing(iter(batches)) as iterator:
        read = progress(iterator, "evaluating", "batch", length_hint(batches))
        for batch in task.grouped(read):
            if stopped():
                return None
            placed, called = parallel.put_batch(batch), time.monotonic()
            pending.append(eval_step(variables, placed))
            if not images:
                begin += time.monotonic() - called
            images += batch["mask"].sum() * jax.process_count()
            # Two batches in flight keep the devices busy without filling their memory.
            if len(pending) > 2:
                meter.add(parallel.fetch(pending.popleft()))
    for outcome in pending:
        meter.add(parallel.fetch(outcome))
    metrics = meter.result()
    if out is not None:
        on_main_process(lambda: write_file(out, json.dumps(meter.results()), "--out"))
    metrics["eval/images_per_second"] = float(images) / (time.monotonic() - begin)
    if per_class:
        for name, values in meter.per_class().items():
            rounded = [None if math.isnan(value) else float(value) for value in values]
            metrics[f"per_class/{name}"] = dict(zip(task.class_names(), rounded, strict=True))
    return metrics


def check_metrics(metrics: Mapping[str, Any], checkpoint: Path) -> None:
    """Raises UserError if a metric of a whole evaluation is infinite or not a number.

    Args:
      metrics: result of :func:`evaluate_batches`.
      checkpoint: folder of the weights that were evaluated.
    """
    for name, value in metrics.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name} is {value} in the evaluation of the checkpoint {checkpoint}")


def evaluate_run(
    workdir: Path,
    checkpoint: str = "last",
    config: ConfigDict | None = None,
    per_class: bool = False,
    batches: Batches | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Returns the metrics of a checkpoint over the whole evaluation split.

    Args:
      workdir: folder of a training run.
      checkpoint: "last", "best" or a step.
      config: configuration that replaces the run's own, and suits these devices; None: the run's
        own.
      per_class: as in :func:`evaluate_batches`.
      batches: of the split, which stay open; None: opened and closed here.
      out: as in :func:`evaluate_batches`.

    Returns:
      "step" and the metrics of :func:`evaluate_batches`.

    Raises:
      UserError: there is no such checkpoint, the checkpoint does not fit the model, a value of the
        configuration is not valid, or a metric is not finite.
    """
    config = for_inference(read_config(workdir)) if config is None else config
    check_task(create_task(config), training=False)
    check_alone("evaluate")
    if batches is None:
        with contextlib.closing(_open_batches(config)) as batches:
            return evaluate_run(workdir, checkpoint, config, per_class, batches, out)
    batches.start()  # the workers start while the weights are loaded
    parallel = make_parallel(config)
    run = load_run(workdir, checkpoint, config=config, axis_name=parallel.axis_name)
    eval_step = parallel.eval_step(make_eval_step(run.task, run.model))
    variables = parallel.put_variables(run.variables)
    metrics = evaluate_batches(
        run.task, eval_step, variables, batches, parallel, per_class, out=out
    )
    check_metrics(metrics, workdir / "checkpoints" / str(run.step))
    return {"step": run.step, **metrics}


def _open_batches(config: ConfigDict) -> Batches:
    task = create_task(config)
    source = open_split(config, task.info.eval_split)
    return eval_batches(source, task.examples(train=False), config, devices=jax.device_count())


def evaluate_insertions(
    workdir: Path,
    checkpoint: str,
    config: ConfigDict,
    inserted: Mapping[str, Mapping[str, Any]],
    per_class: bool = False,
    out: Path | None = None,
) -> Iterator[dict[str, Any]]:
    """Yields the metrics of a checkpoint without insertions, then with each of them.

    Args:
      workdir: folder of a training run.
      checkpoint: "last", "best" or a step.
      config: configuration of the run, for these devices.
      inserted: label of an insertion -> overrides of the model; see
        :func:`tokenvit_jax.expediting.insertions.from_flags`.
      per_class: as in :func:`evaluate_batches`.
      out: as in :func:`evaluate_batches`; only without insertions.

    Yields:
      As :func:`evaluate_run`. If there are insertions, also "inserted", the label or "none",
      "gmacs", 10^9 multiply-adds per image, and with Expedite its "temperature".

    Raises:
      UserError: as :func:`evaluate_run`, or an insertion does not fit the model.
    """
    all_overrides = {"none": {}, **inserted}
    configs = {label: _insert(config, overrides) for label, overrides in all_overrides.items()}
    with contextlib.closing(_open_batches(config)) as batches:  # they do not depend on the model
        for label, changed in configs.items():
            overrides = all_overrides[label]
            if "expedite" in overrides:
                changed = with_measured_temperature(workdir, checkpoint, changed)
            metrics = evaluate_run(workdir, checkpoint, changed, per_class, batches, out)
            if inserted:
                task = create_task(changed)
                macs = summarize_model(
                    task.make_model(), task.input_size, changed.model, task.input_shape[-1]
                ).macs
                metrics |= {"inserted": label, "gmacs": macs / 1e9}
                if "expedite" in overrides:
                    metrics["temperature"] = changed.model_overrides.expedite.temperature
            yield metrics


def check_insertion(config: ConfigDict, overrides: Mapping[str, Any]) -> None:
    """Raises UserError unless a model with other settings can see the images; computes nothing.

    Args:
      config: configuration of the run.
      overrides: settings of the model that replace those of the run.
    """
    task = create_task(_insert(config, overrides))
    images = jax.ShapeDtypeStruct((1, *task.input_shape), "float32")
    variable_shapes(task.make_model(), images)


def _insert(config: ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
    """Returns a copy of a configuration with some settings of the model replaced."""
    changed = config.copy_and_resolve_references()
    with changed.unlocked():
        for key, value in overrides.items():  # `update` would keep parts of the old value
            changed.model_overrides[key] = value
    return changed
