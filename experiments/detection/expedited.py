"""Compares a clustered Swin Transformer in a detector with cheaper forms of the same network.

    python -m experiments.detection.expedited --workdirs=RUN_0,RUN_1,RUN_2 [--quick]

The runs are trainings of Mask R-CNN on the embedded scenes that differ only in their seed, such as
RUNS/mask_rcnn_swin_0 of `python -m experiments.detection.detectors --runs=RUNS`. Nothing is trained
here. Writes expedited.md and expedited.png.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from experiments import pages, plots
from experiments.runs import Run, load_run, make_evaluate, make_model
from tokenvit_jax import cli
from tokenvit_jax.errors import UserError
from tokenvit_jax.measure.macs import count_macs
from tokenvit_jax.models.backbone import variable_shapes
from tokenvit_jax.training.expedite_run import with_measured_temperature

FLAGS = flags.FlagValues()
flags.DEFINE_list("workdirs", None, "folders of training runs", flag_values=FLAGS)
flags.DEFINE_bool("quick", False, "the first run only; writes nothing", flag_values=FLAGS)

METRICS = {"eval/box_ap": "box AP", "eval/mask_ap": "mask AP"}
BEFORE = (1, 2, 3)  # blocks of the third stage that run on all tokens
SIDES = (6, 5, 4)  # rows and columns of the centres, for 8 x 8 tokens
METHODS: dict[str, dict[str, Any]] = {
    "clustering": {},
    "pooling": {"iterations": 0},
    "pooling, bilinear": {"iterations": 0, "mode": "bilinear"},
}
COLUMNS = ["method", "blocks before", "centres", "MMACs, backbone", "% of plain", "box AP",
           "- plain", "mask AP", "- plain"]  # fmt: skip

Result = dict[str, np.ndarray]  # metric -> one value per run


class Setting(NamedTuple):
    """A way to run the network.

    Attributes:
      method: its name.
      expedite: settings of `Expedite`; None: the plain network.
    """

    method: str
    expedite: Mapping[str, Any] | None = None


def settings(depth: int) -> list[Setting]:
    """Returns the settings that are compared, the plain network first.

    Args:
      depth: blocks of the third stage.
    """
    clustered = [
        Setting(name, {"alpha": alpha, "beta": depth - alpha, "clusters": (side, side)} | changes)
        for name, changes in METHODS.items()
        for alpha in BEFORE
        for side in SIDES
    ]
    return [Setting("plain"), *clustered]


def config_of(run: Run, workdir: Path, setting: Setting) -> ConfigDict:
    """Returns the configuration of a run with a setting, whose temperature is measured."""
    config = run.config.copy_and_resolve_references()
    if setting.expedite is None:
        return config
    with config.unlocked():
        config.model_overrides.expedite = dict(setting.expedite)
    return with_measured_temperature(workdir, "last", config)


def evaluate(runs: Mapping[Path, Run], setting: Setting) -> Result:
    """Returns the metrics of a setting in all runs."""
    found = []
    for workdir, run in runs.items():
        config = config_of(run, workdir, setting)
        found.append(make_evaluate(config, make_model(config))(run.variables))
    return {name: np.array([one[name] for one in found]) for name in METRICS}


def mmacs(run: Run, setting: Setting) -> float:
    """Returns the multiply-adds [10^6] of the backbone's maps for one image."""
    backbone = run.model.backbone
    if setting.expedite is not None:
        backbone = backbone.clone(expedite=setting.expedite)
    images = jax.ShapeDtypeStruct((1, *run.task.input_shape), "float32")
    variables = variable_shapes(backbone, images)
    maps = functools.partial(backbone.apply, method="features")
    return count_macs(maps, variables, images) / 1e6


def row(setting: Setting, cost: tuple[float, float], result: Result, plain: Result) -> list[str]:
    """Returns the cells of a setting.

    Args:
      setting: the setting.
      cost: multiply-adds of the backbone [10^6], with this setting and plain.
      result: metrics with this setting.
      plain: metrics of the plain network.
    """
    before, centres = "", ""
    if setting.expedite is not None:
        before, centres = setting.expedite["alpha"], "{} x {}".format(*setting.expedite["clusters"])
    cells = [setting.method, before, centres, f"{cost[0]:.1f}", f"{cost[0] / cost[1]:.1%}"]
    for name in METRICS:
        values = 100 * result[name]
        change = "" if result is plain else signed(values - 100 * plain[name])
        cells += [f"{values.mean():.1f} ± {values.std(ddof=1):.1f}", change]
    return cells


def signed(values: np.ndarray) -> str:
    """Formats the mean and the standard deviation of differences."""
    return f"{values.mean():+.1f} ± {values.std(ddof=1):.1f}"


def plot(results: Sequence[tuple[Setting, float, Result]]) -> Figure:
    """Draws the box AP over the cost, one curve for each method and number of blocks before."""
    figure, axes = plots.panels(len(METRICS), width=10, height=4.0, grid=True)
    for axis, (metric, title) in zip(axes, METRICS.items(), strict=True):
        curves = {}
        for setting, cost, result in results:
            before = setting.expedite and setting.expedite["alpha"]
            name = f"{setting.method}, after {before}" if before else setting.method
            curves.setdefault(name, []).append((cost, 100 * result[metric].mean()))
        for number, (name, points) in enumerate(curves.items()):
            line = "k*" if name == "plain" else f"{'os^vDP*X'[number % 8]}-"
            own = {} if name == "plain" else {"color": plots.color(number)}
            axis.plot(*zip(*points, strict=True), line, ms=5, label=name, **own)
        axis.set(xlabel="10^6 multiply-adds of the backbone", ylabel=f"{title}, %")
    axes[0].legend(frameon=False, fontsize=7)
    return figure


def main(flag_values: flags.FlagValues) -> None:
    """Runs the experiment."""
    workdirs = [Path(workdir) for workdir in flag_values.workdirs]
    runs = {path: load_run(path) for path in workdirs[: 1 if flag_values.quick else None]}
    first = next(iter(runs.values()))
    if first.config.task != "detection" or first.config.dataset != "scene_instances":
        raise UserError(f"{workdirs[0]} is no run of configs/mask_rcnn.py:scenes")
    depth = first.config.model_overrides.depths[2]
    results, rows = [], []
    for setting in settings(depth):
        results.append((setting, mmacs(first, setting), evaluate(runs, setting)))
        _, cost, plain = results[0]
        rows.append(row(setting, (results[-1][1], cost), results[-1][2], plain))
        print(" | ".join(map(str, rows[-1])), flush=True)
    about = f"""
    {len(runs)} runs of Mask R-CNN that differ only in their seed ({first.step} steps each) on the
    200 test scenes of 128 x 128 pixels. This is NOT COCO. The third stage has {depth} blocks on one
    window of 8 x 8 tokens. Nothing is fine-tuned; the temperature is measured on the images. The
    heads cost the same in all rows and are not counted. AP is in %, mean ± standard deviation over
    the runs.
    """
    lines = [
        *pages.heading("A clustered Swin Transformer in Mask R-CNN", __file__, about),
        "", "![AP over the cost](expedited.png)", "", *pages.table(COLUMNS, rows),
    ]  # fmt: skip
    if not flag_values.quick:
        pages.write(__file__, lines, plot(results))


if __name__ == "__main__":
    cli.run(main, FLAGS, required=("workdirs",))
