"""Compares backbones for poses, trained on the embedded figures with several seeds.

    python -m experiments.pose.comparison --runs=RUNS

Every training has a folder in RUNS; those that are finished are read, interrupted ones go on. These
are NOT people: the figures are drawn, and nothing is pretrained. Writes comparison.md and
comparison.png here.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from experiments import pages, plots
from experiments.runs import make_model
from experiments.trained_runs import trained
from tokenvit_jax import cli
from tokenvit_jax.measure.macs import summarize_model
from tokenvit_jax.recipes.pose import figures_config

FLAGS = flags.FlagValues()
flags.DEFINE_string("runs", None, "folder of the training runs", flag_values=FLAGS)

SEEDS = (0, 1, 2)
NUM_STEPS = 500
PARTS = {"": "all", "body_": "body", "foot_": "feet", "face_": "face", "hand_": "hands"}
COLUMNS = ["backbone", "parameters, k", "MMACs", *PARTS.values()]

Runs = Mapping[str, Sequence[Mapping[str, float]]]


class Setting(NamedTuple):
    """A network of the comparison.

    Attributes:
      name: its name in the table.
      overrides: settings of the backbone besides the recipe's.
    """

    name: str
    overrides: Mapping[str, Any] = {}


SETTINGS = {
    "clusters": Setting("ClusTR, clusters"),
    "grid": Setting("ClusTR, grid pooling", {"aggregation": "grid"}),
}


def make_config(setting: Setting, seed: int = 0) -> ConfigDict:
    """Returns the configuration of a training."""
    config = figures_config()
    config.seed = seed
    config.num_steps = config.eval_every_steps = NUM_STEPS
    config.checkpoint_every_steps = NUM_STEPS // 2
    config.model_overrides = {**config.model_overrides, **setting.overrides}
    return config


def cells(runs: Sequence[Mapping[str, float]]) -> list[str]:
    """Returns average precision and recall of all keypoints and of each part, over seeds."""
    found = {
        prefix: [[run[f"eval/{prefix}{number}"] for run in runs] for number in ("ap", "ar")]
        for prefix in PARTS
    }
    return [" / ".join(map(pages.percentage, both)) for both in found.values()]


def row(setting: Setting, runs: Sequence[Mapping[str, float]]) -> list[str]:
    """Returns the cells of a network."""
    config = make_config(setting)
    counted = summarize_model(make_model(config), config.image_size, config.model)
    counts = [f"{counted.params / 1e3:.0f}", f"{counted.macs / 1e6:.0f}"]
    return [setting.name, *counts, *cells(runs)]


def plot(runs: Runs) -> Figure:
    """Draws the average precision of every seed."""
    figure, axes = plots.panels(len(PARTS), width=11, height=1.9, sharey=True)
    colors = [plots.color(number) for number in range(len(SETTINGS))]
    for axis, (prefix, part) in zip(axes, PARTS.items(), strict=True):
        groups = [[100 * run[f"eval/{prefix}ap"] for run in runs[name]] for name in SETTINGS]
        plots.draw_seeds(axis, groups, colors)
        axis.margins(y=0.4)
        axis.set(title=f"AP, {part} [%]")
    plots.name_rows(axes[0], [setting.name for setting in SETTINGS.values()])
    return figure


def page(runs: Runs) -> list[str]:
    """Returns the lines of the page."""
    config = make_config(SETTINGS["clusters"])
    about = f"""
    Small networks were trained from random weights for {config.num_steps} steps with
    {config.batch_size} crops of {" x ".join(map(str, config.image_size))} pixels each, with
    {len(SEEDS)} seeds: the recipe `configs/pose.py:figures`, which has twice as many steps and the
    head `mta`. The columns of the parts have the average precision / recall [%] on the 120 test
    figures, mean ± standard deviation over the seeds; "hands" is the mean of both. MMACs are 10^6
    multiply-adds of one crop, with those of the clustering; an evaluation needs two crops, of which
    one is mirrored. These are drawn figures, NOT people.
    """
    rows = [row(setting, runs[name]) for name, setting in SETTINGS.items()]
    lines = pages.heading("Backbones on drawn figures", __file__, about)
    return [*lines, "", "![AP of every seed](comparison.png)", "", *pages.table(COLUMNS, rows)]


def main(flag_values: flags.FlagValues) -> None:
    """Trains what is missing, and writes the page."""
    folder = Path(flag_values.runs)
    runs: dict[str, list] = {name: [] for name in SETTINGS}
    for seed in SEEDS:  # an interrupted experiment has whole comparisons
        for name, setting in SETTINGS.items():
            metrics = trained(make_config(setting, seed), folder / f"{name}_{seed}", "eval/ap")
            runs[name].append(metrics)
            print(f"{name}, seed {seed}: AP {100 * metrics['eval/ap']:.1f}", flush=True)
    pages.write(__file__, page(runs), plot(runs))


if __name__ == "__main__":
    cli.run(main, FLAGS, required=("runs",))
