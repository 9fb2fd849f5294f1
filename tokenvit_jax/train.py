"""Trains a model: python -m tokenvit_jax.train --config=configs/dgt_t.py --workdir=DIRECTORY.

Rerunning the same command resumes from the latest checkpoint in the workdir. On several machines,
run it on each with --coordinator=host:port --num_processes=N --process_id=I; on TPU pods and under
SLURM these are found automatically.
"""

import contextlib
import functools
import math
from collections import deque
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict

from tokenvit_jax import cli
from tokenvit_jax.data import dataset_info
from tokenvit_jax.errors import UserError
from tokenvit_jax.memory import keep_pages
from tokenvit_jax.tasks import task_of
from tokenvit_jax.tasks.batches import eval_dataset, train_dataset
from tokenvit_jax.training import parallel as devices
from tokenvit_jax.training.checkpoint import Checkpoints
from tokenvit_jax.training.initial import load_initial, start_from, with_searched_keep
from tokenvit_jax.training.logging import Profile, TrainLog
from tokenvit_jax.training.optimizer import make_optimizer
from tokenvit_jax.training.state import eval_variables, init_state
from tokenvit_jax.training.step import make_eval_step, make_train_step
from tokenvit_jax.training.teacher import labelled_batches
from tokenvit_jax.training.validate import check_config, profiled_steps
from tokenvit_jax.training.workdir import check_same_run, write_config

FLAGS = flags.FlagValues()
cli.define_config(FLAGS)
flags.DEFINE_string("workdir", None, "folder of the run, made if there is none", flag_values=FLAGS)
flags.DEFINE_string(
    "coordinator", None, "several processes: host:port of process 0", flag_values=FLAGS
)
flags.DEFINE_integer("num_processes", None, "several processes: how many", flag_values=FLAGS)
flags.DEFINE_integer(
    "process_id", None, "several processes: this one's number, from 0", flag_values=FLAGS
)


def train(config: ConfigDict, workdir: Path) -> None:
    """Trains a model up to `config.num_steps`, from the latest checkpoint in the workdir if any.

    Args:
      config: see `tokenvit_jax.config`.
      workdir: folder for the checkpoints and logs of this run.

    Raises:
      UserError: a value of the config does not fit, the loss is not finite, or the workdir
        cannot be written or read.
    """
    check_config(config)
    devices.check_train_batch(config)
    keep_pages()
    parallel = devices.make_parallel(config)
    initial = load_initial(config)
    config = with_searched_keep(config, initial)
    stop = devices.StopRequest()

    # ---------------------------------------------------------------- data
    process = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    train_batches = iter(train_dataset(config, **process))
    eval_batches = eval_dataset(config, **process)
    num_classes = dataset_info(config.dataset).num_classes
    put_train_batch = labelled_batches(config, num_classes, parallel)

    # ---------------------------------------------------------------- model and steps
    task = task_of(config.dataset)
    model = task.make_model(config, num_classes, axis_name=parallel.axis_name)
    optimizer = make_optimizer(config)
    init_fn = functools.partial(init_state, model, optimizer, config)
    abstract_state = parallel.abstract(init_fn)
    train_step = parallel.train_step(
        make_train_step(model, optimizer, config, num_classes, axis_name=parallel.axis_name),
        abstract_state,
    )
    eval_step = parallel.eval_step(make_eval_step(model, config, axis_name=parallel.axis_name))

    # ---------------------------------------------------------------- resume or start
    checkpoints = Checkpoints(
        workdir, keep_last=config.keep_last_checkpoints, keep_best=config.keep_best_checkpoints
    )
    if checkpoints.steps():
        check_same_run(workdir, config)
    restored = checkpoints.restore(abstract_state)
    if restored is None:
        state = parallel.init(init_fn)
        if initial is not None:
            state = start_from(state, initial)
    else:
        global_state, progress = restored
        state = parallel.from_global(global_state)
        train_batches.set_state(progress["data"])
    first_step = int(state.step) + 1
    devices.on_main_process(functools.partial(write_config, workdir, config))
    log = TrainLog(
        workdir,
        steps_done=first_step - 1,
        num_steps=config.num_steps,
        batch_size=config.batch_size,
        every_steps=config.log_every_steps,
        enabled=devices.is_main_process(),
    )

    # ---------------------------------------------------------------- steps
    pending = deque()  # (step, metrics) that are still being computed
    step = first_step - 1
    batches = devices.prefetch(train_batches, put_train_batch)
    profile = Profile(workdir, *profiled_steps(config))
    with contextlib.closing(train_batches), checkpoints, log, profile:
        for step in range(first_step, config.num_steps + 1):
            batch, data_state = next(batches)
            profile.before(step)
            state, step_metrics = train_step(state, batch)
            profile.after(step, step_metrics)
            pending.append((step, step_metrics))

            is_last = step == config.num_steps
            stopping = stop.received(step)
            evaluates = is_last or step % config.eval_every_steps == 0
            saves = is_last or stopping or step % config.checkpoint_every_steps == 0

            # Metrics are fetched a step late, while the next one runs: the devices never wait for
            # the host. But nothing is evaluated or saved before it is known to be finite.
            fetched = len(pending) if evaluates or saves or step == first_step else len(pending) - 1
            done = jax.device_get([pending.popleft() for _ in range(fetched)])
            check_finite(done, workdir)
            log.write_steps(done)

            eval_metrics = None
            if evaluates:
                variables = eval_variables(state.params, state.model_state, state.ema)
                sums = devices.map_batches(
                    functools.partial(eval_step, variables), eval_batches, parallel.put_batch
                )
                eval_metrics = task.mean_metrics(sums)
                log.write(step, eval_metrics)
            if saves or (evaluates and checkpoints.is_best(eval_metrics)):
                checkpoints.save(
                    step, parallel.to_global(state), {"data": data_state}, eval_metrics
                )
            if evaluates or saves or step == first_step:
                log.restart_clock(step)
            if stopping:
                break

    # ---------------------------------------------------------------- end
    if step < config.num_steps:
        log.note(f"stopped and saved after step {step}; the same command resumes from there")
    else:
        log.note(f"finished {config.num_steps} steps in {workdir}")


def check_finite(done: list[tuple[int, dict[str, float]]], workdir: Path) -> None:
    """Raises UserError if the loss or the gradient's norm of a step is infinite or not a number."""
    for step, metrics in done:
        for name in ("loss", "grad_norm"):
            if not math.isfinite(metrics[name]):
                raise UserError(
                    f"{name} is {metrics[name]} at step {step}: stopped; the checkpoints before it "
                    f"are in {workdir / 'checkpoints'}"
                )


def main(flag_values: flags.FlagValues) -> None:
    """Runs the command."""
    config = cli.read_config(flag_values)
    check_config(config)
    devices.connect(flag_values.coordinator, flag_values.num_processes, flag_values.process_id)
    train(config, Path(flag_values.workdir))


if __name__ == "__main__":
    cli.run(main, FLAGS, required=("config", "workdir"))
