"""Short trainings on the embedded digits, compared over several seeds."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from tokenvit_jax.data import dataset_info, eval_dataset, train_dataset
from tokenvit_jax.memory import keep_pages
from tokenvit_jax.pictures.draw import COLORS
from tokenvit_jax.tasks import classification
from tokenvit_jax.training.checkpoint import Checkpoint
from tokenvit_jax.training.initial import start_from
from tokenvit_jax.training.optimizer import make_optimizer
from tokenvit_jax.training.parallel import make_parallel
from tokenvit_jax.training.state import TrainState, eval_variables, init_state
from tokenvit_jax.training.step import make_eval_step, make_train_step


class Run(NamedTuple):
    """What one training showed.

    Attributes:
      loss: of every step (num_steps,).
      accuracy: on the test images, at the end.
      test_loss: on the test images, at the end, nats.
      model: the module that was trained.
      variables: of the model, after training.
    """

    loss: np.ndarray
    accuracy: float
    test_loss: float
    model: nn.Module
    variables: dict


def make_hard(config: ConfigDict) -> ConfigDict:
    """Shortens the digits recipe and turns and shifts the digits further, in place.

    The plain recipe ends at 98 to 99 % whatever the attention does; this leaves room for
    differences.
    """
    config.num_steps = 160
    config.augment.rotation = 40.0
    config.augment.translation = 0.2
    return config


def run_all(
    make_config: Callable[[], ConfigDict],
    settings: dict[str, dict],
    seeds: Sequence[int],
    run: Callable[[ConfigDict], NamedTuple] | None = None,
) -> dict[str, list]:
    """Trains with every setting and seed.

    Args:
      make_config: makes the configuration that all settings start from.
      settings: name -> entries of the configuration, such as {"centroids.rule": "literal"}.
      seeds: of the configuration.
      run: what to do with a configuration; default: :func:`train`. Its results have `accuracy`.

    Returns:
      name -> one result of ``run`` per seed.
    """
    run = run or train
    runs = {name: [] for name in settings}
    for name, entries in settings.items():
        for seed in seeds:
            config = make_config()
            config.seed = seed
            config.update_from_flattened_dict(entries)
            runs[name].append(run(config))
            print(f"{name}, seed {seed}: test accuracy {runs[name][-1].accuracy:.4f}", flush=True)
    return runs


def train(
    config: ConfigDict,
    watch: Callable[[nn.Module, int, TrainState], None] | None = None,
    initial: Run | None = None,
) -> Run:
    """Trains with a configuration, in this process and without a workdir.

    Args:
      config: see `tokenvit_jax.config`.
      watch: called with the model, the number of steps done and the state, before every step and
        at the end.
      initial: a run whose variables training starts from; None: from random ones.

    Returns:
      What it showed.
    """
    keep_pages()
    num_classes = dataset_info(config.dataset).num_classes
    model = classification.make_model(config, num_classes)
    optimizer = make_optimizer(config)
    parallel = make_parallel(config)
    init_fn = functools.partial(init_state, model, optimizer, config)
    state = parallel.init(init_fn)
    if initial:
        steps = len(initial.loss)
        state = start_from(state, Checkpoint(steps, Path("memory"), initial.variables))
    train_step = parallel.train_step(
        make_train_step(model, optimizer, config, num_classes), parallel.abstract(init_fn)
    )
    eval_step = parallel.eval_step(make_eval_step(model, config))
    loss = []
    for step, batch in zip(range(config.num_steps), iter(train_dataset(config)), strict=False):
        if watch:
            watch(model, step, state)
        state, metrics = train_step(state, batch)
        loss.append(float(metrics["loss"]))
    if watch:
        watch(model, config.num_steps, state)
    variables = eval_variables(state.params, state.model_state, state.ema)
    sums = [jax.device_get(eval_step(variables, batch)) for batch in eval_dataset(config)]
    metrics = classification.mean_metrics(sums)
    return Run(np.array(loss), metrics["eval/accuracy"], metrics["eval/loss"], model, variables)


def mean_and_spread(values: Sequence[float]) -> str:
    """Formats the mean and the standard deviation over seeds."""
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"


def write_comparison(
    folder: Path,
    make_config: Callable[[], ConfigDict],
    settings: dict[str, dict],
    seeds: Sequence[int],
    *,
    network: str,
    column: str,
) -> tuple[dict[str, list[Run]], list[str]]:
    """Trains with overrides of a network's settings and draws `comparison.png`.

    Args:
      folder: receives the plot.
      make_config: makes the configuration that all settings start from.
      settings: name -> entries of `model_overrides`.
      seeds: of the configuration.
      network: what is trained, for the titles.
      column: heading of the names.

    Returns:
      The runs, and the lines of a text with their table.
    """
    entries = {
        name: {f"model_overrides.{key}": value for key, value in overrides.items()}
        for name, overrides in settings.items()
    }
    runs = run_all(make_config, entries, seeds)
    title = f"{network} on turned and shifted digits, {make_config().num_steps} steps"
    figure = plot_comparison(runs, f"{title}, {len(seeds)} seeds")
    figure.savefig(folder / "comparison.png", dpi=120)
    lines = [
        f"{title},",
        f"{len(seeds)} seeds, mean ± standard deviation; 360 test images, so one image is 0.003.",
        f"Written by `python -m experiments.{folder.name}.comparison`.",
        "",
        *results_table(runs, column),
    ]
    return runs, lines


def results_table(runs: dict[str, list[Run]], column: str) -> list[str]:
    """Returns the lines of a table of accuracies and losses, mean and spread over the seeds.

    Args:
      runs: of :func:`run_all`.
      column: heading of the names.
    """
    lines = [
        f"| {column} | test accuracy | test loss | last training loss |",
        "| --- | --- | --- | --- |",
    ]
    for name, group in runs.items():
        cells = (
            [run.accuracy for run in group],
            [run.test_loss for run in group],
            [run.loss[-20:].mean() for run in group],
        )
        lines.append(f"| {name} | " + " | ".join(map(mean_and_spread, cells)) + " |")
    return lines


def plot_comparison(runs: dict[str, list[Run]], title: str) -> Figure:
    """Draws the training loss over steps, and test accuracy and loss of every seed.

    Args:
      runs: of :func:`run_all`.
      title: of the figure.
    """
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    curve, accuracy, test_loss = figure.subplots(1, 3, width_ratios=(1.3, 1, 1))
    for place, (name, group) in enumerate(runs.items()):
        color = COLORS[place % len(COLORS)]
        style = ("-", "--")[place // len(COLORS)]
        loss = np.stack([r.loss.reshape(-1, 10).mean(1) for r in group])
        steps = 10 * np.arange(loss.shape[1]) + 5
        curve.plot(steps, loss.mean(0), style, color=color, label=name)
        curve.fill_between(steps, loss.min(0), loss.max(0), color=color, alpha=0.15, lw=0)
        for axis, values in (
            (accuracy, [100 * r.accuracy for r in group]),
            (test_loss, [r.test_loss for r in group]),
        ):
            axis.plot(values, [place] * len(group), "o", color=color, alpha=0.6)
            axis.plot(np.mean(values), place, "|", color="black", markersize=14)
    curve.set(xlabel="step", title="training loss (mean of 10 steps)")
    curve.legend(frameon=False, fontsize=8)
    accuracy.set(title="test accuracy, % (line: mean)", yticks=range(len(runs)))
    accuracy.set_yticklabels(runs, fontsize=8)
    test_loss.set(title="test loss", yticks=range(len(runs)), yticklabels=[])
    for axis in (curve, accuracy, test_loss):
        axis.spines[["top", "right"]].set_visible(False)
    for axis in (accuracy, test_loss):
        axis.invert_yaxis()
        axis.grid(axis="x", color="0.92")
    figure.suptitle(title, fontsize=10)
    return figure
