"""Compares a clustered Swin Transformer in trained dense networks with cheaper forms of it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from experiments import pages, plots
from experiments.runs import Run, load_run
from tokenvit_jax.errors import UserError
from tokenvit_jax.training.expedite_run import with_measured_temperature

METHODS: dict[str, dict[str, Any]] = {
    "clustering": {},
    "pooling": {"iterations": 0},
    "pooling, bilinear": {"iterations": 0, "mode": "bilinear"},
}
SMALLER_IMAGE = "smaller image"

Scores = dict[str, np.ndarray]  # metric -> one value per run


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags that :func:`load_runs` reads."""
    flags.DEFINE_list("workdirs", None, "folders of training runs", flag_values=values)
    flags.DEFINE_bool("quick", False, "the first run only; writes nothing", flag_values=values)


class Setting(NamedTuple):
    """A way to run the network.

    Attributes:
      method: its name.
      expedite: settings of `Expedite`; None: the plain network.
      side: side of smaller images [pixels]; None: those of the run.
    """

    method: str
    expedite: Mapping[str, Any] | None = None
    side: int | None = None


class Result(NamedTuple):
    """What a setting costs [10^6 multiply-adds], and the metrics of all runs with it."""

    setting: Setting
    mmacs: float
    scores: Scores


def load_runs(values: flags.FlagValues, task: str, dataset: str, recipe: str) -> dict[Path, Run]:
    """Loads the runs that the flags name.

    Raises:
      UserError: the first run is not one of the recipe.
    """
    workdirs = [Path(workdir) for workdir in values.workdirs]
    runs = {path: load_run(path) for path in workdirs[: 1 if values.quick else None]}
    config = next(iter(runs.values())).config
    if (config.task, config.dataset) != (task, dataset):
        raise UserError(f"{workdirs[0]} is no run of {recipe}")
    return runs


def list_settings(
    depth: int,
    before: Sequence[int],
    sides: Sequence[int],
    smaller: Sequence[int] = (),
) -> list[Setting]:
    """Returns the settings that are compared, the plain network first.

    Args:
      depth: blocks of the third stage.
      before: blocks of the third stage that run on all tokens.
      sides: rows and columns of the centres, for 8 x 8 tokens.
      smaller: sides of smaller images [pixels].
    """
    clustered = [
        Setting(name, {"alpha": alpha, "beta": depth - alpha, "clusters": (side, side)} | changes)
        for name, changes in METHODS.items()
        for alpha in before
        for side in sides
    ]
    return [
        Setting("plain"), *clustered, *(Setting(SMALLER_IMAGE, side=side) for side in smaller)
    ]  # fmt: skip


def config_of(run: Run, workdir: Path, setting: Setting) -> ConfigDict:
    """Returns the configuration of a run with a setting, whose temperature is measured."""
    config = run.config.copy_and_resolve_references()
    if setting.side:  # predictions still have the size of the original images
        config.data.result_size = run.task.input_shape[:2]
        config.data.eval_size = (setting.side, setting.side)
    if setting.expedite is None:
        return config
    with config.unlocked():
        config.model_overrides.expedite = dict(setting.expedite)
    return with_measured_temperature(workdir, "last", config)


class Measures(NamedTuple):
    """What is measured of every setting.

    Attributes:
      metrics: name of a metric -> its name on the page.
      evaluate: returns the metrics of a run with a configuration.
      mmacs: returns the cost of a setting [10^6 multiply-adds].
      part: the part of the network whose cost that is; "": all of it.
    """

    metrics: Mapping[str, str]
    evaluate: Callable[[ConfigDict, Run], Mapping[str, float]]
    mmacs: Callable[[Run, Setting], float]
    part: str = ""


def compare(
    runs: Mapping[Path, Run], settings: Sequence[Setting], measures: Measures
) -> tuple[list[str], Figure]:
    """Evaluates all runs with all settings.

    Args:
      runs: workdir -> run; the runs differ in their seed.
      settings: the plain one first.
      measures: what is measured.

    Returns:
      The lines of a table, and a plot.
    """
    results, rows = [], []
    for setting in settings:
        found = [
            measures.evaluate(config_of(run, path, setting), run) for path, run in runs.items()
        ]
        scores = {name: 100 * np.array([one[name] for one in found]) for name in measures.metrics}
        first = next(iter(runs.values()))
        results.append(Result(setting, measures.mmacs(first, setting), scores))
        rows.append(_row(results[-1], results[0]))
        print(" | ".join(rows[-1]), flush=True)
    return pages.table(_columns(settings, measures), rows), _plot(results, measures)


def _columns(settings: Sequence[Setting], measures: Measures) -> list[str]:
    size = "centres or image" if any(setting.side for setting in settings) else "centres"
    cost = ", ".join(filter(None, ("MMACs", measures.part)))
    names = ["method", "blocks before", size, cost, "% of plain"]
    return names + [name for title in measures.metrics.values() for name in (title, "- plain")]


def _row(result: Result, plain: Result) -> list[str]:
    setting = result.setting
    before, size = "", ""
    if setting.expedite is not None:
        before, size = (
            str(setting.expedite["alpha"]),
            "{} x {}".format(*setting.expedite["clusters"]),
        )
    elif setting.side:
        size = f"{setting.side} x {setting.side}"
    cells = [
        setting.method, before, size, f"{result.mmacs:.1f}", f"{result.mmacs / plain.mmacs:.1%}"
    ]  # fmt: skip
    for name, values in result.scores.items():
        change = "" if result is plain else _percent(values - plain.scores[name], "+.1f")
        cells += [_percent(values, ".1f"), change]
    return cells


def _percent(values: np.ndarray, form: str) -> str:
    spread = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
    return f"{values.mean():{form}}{spread}"


def _plot(results: Sequence[Result], measures: Measures) -> Figure:
    """Draws metrics over the cost, one curve for each method and number of blocks before."""
    metrics = measures.metrics
    cost = ", ".join(filter(None, ("10^6 multiply-adds", measures.part)))
    figure, axes = plots.panels(len(metrics), width=5.0 * len(metrics), height=4.0, grid=True)
    for axis, (metric, title) in zip(axes, metrics.items(), strict=True):
        curves = {}
        for result in results:
            before = result.setting.expedite and result.setting.expedite["alpha"]
            method = result.setting.method
            name = f"{method}, after {before}" if before else method
            curves.setdefault(name, []).append((result.mmacs, result.scores[metric].mean()))
        for number, (name, points) in enumerate(curves.items()):
            line = "k*" if name == "plain" else f"{'os^vDP*X'[number % 8]}-"
            own = {} if name == "plain" else {"color": plots.color(number)}
            axis.plot(*zip(*points, strict=True), line, ms=5, label=name, **own)
        axis.set(xlabel=cost, ylabel=f"{title}, %")
    axes[0].legend(frameon=False, fontsize=7)
    return figure
