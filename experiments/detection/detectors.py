"""Compares detectors and backbones, trained on the embedded scenes with several seeds.

    python -m experiments.detection.detectors --runs=RUNS

Every training has a folder in RUNS; those that are finished are read, interrupted ones go on. This
is NOT COCO: the images have 128 x 128 pixels and four classes, and nothing is pretrained. Writes
detectors.md and detectors.png here.
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
from tokenvit_jax.recipes.detection import scenes_config

FLAGS = flags.FlagValues()
flags.DEFINE_string("runs", None, "folder of the training runs", flag_values=FLAGS)

SEEDS = (0, 1, 2)
NUM_STEPS = 240
DETECTORS = {"mask_rcnn": "Mask R-CNN", "retinanet": "RetinaNet", "htc": "HTC"}
METRICS = {"box_ap": "box AP", "box_ap50": "box AP50", "mask_ap": "mask AP"}
COLUMNS = ["detector", "backbone", "parameters, k", "MMACs", *METRICS.values()]
ONE_SCALE = ((64,), (16,), (4,), (1,))


class Setting(NamedTuple):
    """A network of the comparison.

    Attributes:
      detector: name of the detector.
      backbone: name of the backbone in the table.
      model: model of the configuration; "": the recipe's.
      model_overrides: its settings.
    """

    detector: str
    backbone: str
    model: str = ""
    model_overrides: Mapping[str, Any] = {}


def clustr(detector: str, backbone: str, **overrides: Any) -> Setting:
    """Returns a setting with a small ClusTR of the widths and depths of the recipe's Swin."""
    swin = scenes_config(detector).model_overrides
    sizes = {name: swin[name] for name in ("dims", "depths")}
    return Setting(
        detector, backbone, "clustr_t", {**sizes, "ratios": ONE_SCALE, "drop_path": 0.0} | overrides
    )


def settings() -> dict[str, Setting]:
    """Returns the networks by the names of their folders."""
    return {
        "mask_rcnn_swin": Setting("mask_rcnn", "Swin"),
        "retinanet_swin": Setting("retinanet", "Swin"),
        "htc_swin": Setting("htc", "Swin"),
        "mask_rcnn_clusters": clustr("mask_rcnn", "ClusTR, clusters"),
        "mask_rcnn_grid": clustr("mask_rcnn", "ClusTR, grid pooling", aggregation="grid"),
    }


def make_config(setting: Setting, seed: int = 0) -> ConfigDict:
    """Returns the configuration of a training."""
    config = scenes_config(setting.detector)
    config.seed = seed
    config.num_steps = config.eval_every_steps = NUM_STEPS
    config.optimizer.warmup_steps = NUM_STEPS // 10
    config.checkpoint_every_steps = NUM_STEPS // 2
    if setting.model:
        config.model, config.model_overrides = setting.model, dict(setting.model_overrides)
    return config


def row(setting: Setting, runs: Sequence[dict[str, float]]) -> list[str]:
    """Returns the cells of a network."""
    config = make_config(setting)
    counted = summarize_model(make_model(config), (config.image_size,) * 2, config.model)
    found = [[run[f"eval/{name}"] for run in runs if f"eval/{name}" in run] for name in METRICS]
    return [
        DETECTORS[setting.detector],
        setting.backbone,
        f"{counted.params / 1e3:.0f}",
        f"{counted.macs / 1e6:.0f}",
        *(pages.percentage(values) if values else "" for values in found),
    ]


def plot(runs: Mapping[str, Sequence[dict[str, float]]]) -> Figure:
    """Draws the box AP and the mask AP of every seed."""
    figure, axes = plots.panels(2, width=9, height=2.4)
    named = {
        f"{DETECTORS[setting.detector]}, {setting.backbone}": runs[name]
        for name, setting in settings().items()
    }
    for axis, metric in zip(axes, ("box_ap", "mask_ap"), strict=True):
        groups = {
            name: [100 * run[f"eval/{metric}"] for run in group]
            for name, group in named.items()
            if f"eval/{metric}" in group[0]
        }
        colors = [plots.color(list(named).index(name)) for name in groups]
        plots.draw_seeds(axis, list(groups.values()), colors)
        plots.name_rows(axis, list(groups))
        axis.set(title=f"{METRICS[metric]}, % (line: mean)")
    return figure


def page(runs: Mapping[str, Sequence[dict[str, float]]]) -> list[str]:
    """Returns the lines of the page."""
    config = make_config(settings()["mask_rcnn_swin"])
    about = f"""
    Small networks were trained from random weights for {config.num_steps} steps with
    {config.batch_size} embedded scenes each, with {len(SEEDS)} seeds. A scene has 128 x 128 pixels
    and one to four handwritten digits of four classes. AP [%] is COCO's, over IoU from 0.50 to
    0.95, on the 200 test scenes: mean ± standard deviation over the seeds. MMACs are 10^6
    multiply-adds of one image with all heads.
    """
    rows = [row(setting, runs[name]) for name, setting in settings().items()]
    lines = pages.heading("Detectors and backbones", __file__, about)
    return [*lines, "", "![AP of every seed](detectors.png)", "", *pages.table(COLUMNS, rows)]


def main(flag_values: flags.FlagValues) -> None:
    """Trains what is missing, and writes the page."""
    folder = Path(flag_values.runs)
    runs = {name: [] for name in settings()}
    for seed in SEEDS:  # an interrupted experiment has whole comparisons
        for name, setting in settings().items():
            metrics = trained(make_config(setting, seed), folder / f"{name}_{seed}", "eval/box_ap")
            runs[name].append(metrics)
            print(f"{name}, seed {seed}: box AP {100 * metrics['eval/box_ap']:.1f}", flush=True)
    pages.write(__file__, page(runs), plot(runs))


if __name__ == "__main__":
    cli.run(main, FLAGS, required=("runs",))
