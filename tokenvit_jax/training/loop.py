"""The training loop, written as one linear function."""

import contextlib
import functools
import itertools
import logging
import math
from collections import deque
from collections.abc import Sized
from pathlib import Path

import jax
from ml_collections import ConfigDict

from tokenvit_jax import stopping
from tokenvit_jax.data import (
    check_records,
    eval_batches,
    open_split,
    train_batches,
    with_class_names,
)
from tokenvit_jax.errors import UserError
from tokenvit_jax.memory import keep_pages
from tokenvit_jax.tasks import create_task
from tokenvit_jax.training import devices, processes
from tokenvit_jax.training.batches import (
    DataWait,
    WaitWarning,
    check_train_batch,
    cores_of_process,
    prefetch,
)
from tokenvit_jax.training.checkpoint import Checkpoints, saved_steps
from tokenvit_jax.training.compiled import keep_compiled
from tokenvit_jax.training.evaluation import check_metrics, evaluate_batches
from tokenvit_jax.training.initial import (
    load_initial,
    start_from,
    with_initial_settings,
    with_searched_keep,
)
from tokenvit_jax.training.lock import workdir_lock
from tokenvit_jax.training.optimizer import make_optimizer
from tokenvit_jax.training.state import eval_variables, init_state
from tokenvit_jax.training.step import make_eval_step, make_train_step
from tokenvit_jax.training.teacher import taught_batches
from tokenvit_jax.training.train_log import Profile, TrainLog, announce, read_metrics, timed
from tokenvit_jax.training.validate import check_task, profiled_steps
from tokenvit_jax.training.workdir import check_same_run, has_config, read_config, write_config


def train(config: ConfigDict, workdir: Path) -> None:
    """Trains a model up to `config.num_steps`, from the latest checkpoint in the workdir if any.

    Args:
      config: configuration; see `tokenvit_jax.config` and the settings of the task.
      workdir: folder for the checkpoints and logs of this run.

    Raises:
      UserError: a value of the config is not valid, the loss is not finite, or the workdir
        cannot be written or read, or another training runs there.
    """
    keep_pages()  # before anything looks for devices
    with (
        processes.StopRequest() as stop,
        workdir_lock(workdir),
        contextlib.ExitStack() as opened,
    ):
        _train(with_class_names(config), workdir, stop, opened)


def _train(
    config: ConfigDict,
    workdir: Path,
    stop: processes.StopRequest,
    opened: contextlib.ExitStack,
) -> None:
    def close_later(thing):
        return opened.enter_context(contextlib.closing(thing))

    task = create_task(config)
    check_task(task)
    check_train_batch(task)
    keep_compiled(config)
    parallel = devices.make_parallel(config)
    # A run that goes on does not need the run that it once started from.
    resumed = read_config(workdir) if has_config(workdir) and saved_steps(workdir) else None
    initial = None if resumed else load_initial(config)
    config = with_initial_settings(config, resumed or (initial and initial.task.config))
    config = with_searched_keep(config, initial, resumed)
    announce(f"model    {config.model}, {config.task}, {config.dtype}")
    kind = jax.devices()[0].device_kind
    announce(f"devices  {jax.device_count()} x {kind}, {config.parallel}")
    task = create_task(config, parallel.axis_name)

    # ---------------------------------------------------------------- data
    process = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    splits = {
        split: open_split(config, split) for split in (task.info.train_split, task.info.eval_split)
    }
    sizes = (f"{len(source):,} images of the split {name}" for name, source in splits.items())
    announce(f"data     {config.dataset}: {', '.join(sizes)}")
    train_data = splits[task.info.train_split], task.examples(train=True), config
    eval_data = splits[task.info.eval_split], task.examples(train=False), config
    check_records(*eval_data)  # before the first step, not after the first epoch
    process["cores"] = cores_of_process()
    training = close_later(train_batches(*train_data, **process))
    evaluation = close_later(eval_batches(*eval_data, devices=jax.device_count(), **process))
    iterator = close_later(iter(training))
    # The workers start while the model is made. They begin with the batches that will probably be
    # needed first: a damaged checkpoint would not be restored.
    steps = saved_steps(workdir)
    iterator.set_state({"next_index": steps[-1] if steps else 0})
    iterator.start()
    evaluation.start()
    put_train_batch = taught_batches(task, parallel)

    # ---------------------------------------------------------------- model and steps
    model = task.make_model()
    optimizer = make_optimizer(config, model)
    init_fn = functools.partial(init_state, model, optimizer, config)
    abstract_state = parallel.abstract(init_fn)
    announce(f"{sum(leaf.size for leaf in jax.tree.leaves(abstract_state.params)):,} parameters")
    train_step = parallel.train_step(make_train_step(task, model, optimizer), abstract_state)
    eval_step = parallel.eval_step(make_eval_step(task, model))

    # ---------------------------------------------------------------- resume or start
    notes = []
    if steps:  # before they are opened, which sets damaged ones aside
        check_same_run(workdir, config, steps[-1])
    checkpoints = Checkpoints(
        workdir,
        keep_last=config.keep_last_checkpoints,
        keep_best=config.keep_best_checkpoints,
        score=task.score,
    )
    restored = checkpoints.restore(abstract_state)
    if restored is None:
        with timed("initialising the parameters"):
            state = parallel.init(init_fn)
        initial = initial or load_initial(config)  # all checkpoints of this run were damaged
        if initial is not None:
            state, notes = start_from(state, initial, task)
    else:
        global_state, progress = restored
        state = parallel.from_global(global_state)
        if iterator.get_state() != progress["data"]:
            iterator.set_state(progress["data"])
        warn_of_other_records(progress, train_data[0], workdir)
    first_step = int(state.step) + 1
    processes.on_main_process(functools.partial(write_config, workdir, config))
    data_wait = close_later(DataWait())
    log = TrainLog(
        workdir,
        steps_done=first_step - 1,
        num_steps=config.num_steps,
        batch_size=config.batch_size,
        every_steps=config.log_every_steps,
        waited=lambda: data_wait.seconds,
        warning=WaitWarning(training.workers, process["cores"]),
        enabled=processes.is_main_process(),
    )

    for note in notes:
        log.note(note)

    def evaluated(step: int) -> bool:
        """Evaluates the state after a step, which is saved; returns False if it was stopped."""
        checkpoints.wait()
        if stop.received():
            return False
        stopping.hold(False)  # nothing would be lost: a signal ends the process at any moment
        variables = eval_variables(state.params, state.model_state, state.ema)
        metrics = evaluate_batches(
            task, eval_step, variables, evaluation, parallel, stopped=stop.received
        )
        if metrics is None:
            return False
        check_metrics(metrics, workdir / "checkpoints" / str(step))
        checkpoints.record(step, metrics)
        log.write(step, metrics)  # last: a resumed run repeats an evaluation that is not logged
        return True

    # ---------------------------------------------------------------- steps
    pending = deque()  # (step, metrics) that are still being computed
    step = first_step - 1
    numbers = itertools.count(step)  # of the steps that the batches are for, from 0
    batches = prefetch(iterator, lambda batch: put_train_batch(batch, next(numbers)))
    profile = Profile(workdir, *profiled_steps(config))
    with checkpoints, log, profile:
        stopped = owes_evaluation(config, workdir, step) and not evaluated(step)
        steps = range(first_step, config.num_steps + 1)
        for step in () if stopped else steps:
            batch, data_state = data_wait.next(batches)
            profile.before(step)
            # The first call returns when the step is compiled.
            compiles = step == first_step
            with timed("compiling the training step") if compiles else contextlib.nullcontext():
                state, step_metrics = train_step(state, batch)
            data_wait.started(step_metrics["loss"])
            stopping.hold(True)  # from here on, a signal waits until this step is saved
            profile.after(step, step_metrics)
            pending.append((step, step_metrics))

            is_last = step == config.num_steps
            stopped = stop.received()
            evaluates = is_last or step % config.eval_every_steps == 0
            saves = evaluates or stopped or step % config.checkpoint_every_steps == 0

            # Metrics are fetched a step late, while the next step runs: the devices never wait for
            # the host. But nothing is saved before it is known to be finite.
            fetched = len(pending) if saves or step == first_step else len(pending) - 1
            done = jax.device_get([pending.popleft() for _ in range(fetched)])
            check_finite(done, workdir)
            log.write_steps(done)
            if saves:
                progress = {"data": data_state, "records": len(train_data[0])}
                checkpoints.save(step, parallel.to_global(state), progress)
            if evaluates and not stopped:
                stopped = not evaluated(step)
            if saves or step == first_step:
                log.restart_clock(step)
            if stopped:
                break

    # ---------------------------------------------------------------- end
    if stopped:
        log.note(f"stopped and saved after step {step}; the same command resumes from there")
    else:
        log.note(f"finished {config.num_steps} steps in {workdir}")


def owes_evaluation(config: ConfigDict, workdir: Path, step: int) -> bool:
    """Returns whether a resumed run has yet to evaluate the step that it resumes from.

    Args:
      config: reads `num_steps` and `eval_every_steps`.
      workdir: folder of the run, whose log tells.
      step: number of steps done.
    """
    if step == 0 or not (step == config.num_steps or step % config.eval_every_steps == 0):
        return False
    logged = [line for line in read_metrics(workdir) if line["step"] == step]
    # In the training log, steps may be left out, evaluations never.
    owes = not any(name.startswith("eval/") for line in logged for name in line)
    return processes.from_main_process(owes)


def warn_of_other_records(progress: dict, source: Sized, workdir: Path) -> None:
    """Warns if a resumed run has another number of training records, which change its stream."""
    before = progress.get("records", len(source))  # an earlier version did not store it
    if before != len(source):
        logging.warning(
            "the run in %s was trained on %s images so far, now there are %s: they come in another "
            "order",
            workdir,
            f"{before:,}",
            f"{len(source):,}",
        )


def check_finite(done: list[tuple[int, dict[str, float]]], workdir: Path) -> None:
    """Raises UserError if the loss or the gradient norm of a step is infinite or not a number."""
    for step, metrics in done:
        for name in ("loss", "grad_norm"):
            if not math.isfinite(metrics[name]):
                raise UserError(
                    f"{name} is {metrics[name]} at step {step}: stopped; the checkpoints before it "
                    f"are in {workdir / 'checkpoints'}"
                )
