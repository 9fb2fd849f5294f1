"""Compares heads on one small Swin Transformer, trained on the embedded scenes.

    python -m experiments.segmentation.heads

This is NOT ADE20K: the images have 128 x 128 pixels and five classes, and nothing is pretrained.
Writes heads.md and heads.png here.
"""

from collections.abc import Callable

from matplotlib.figure import Figure
from ml_collections import ConfigDict

from experiments import pages, plots, short_runs
from experiments.pages import mean_and_std
from experiments.runs import ShortRun, make_evaluate, make_model
from tokenvit_jax.measure.macs import summarize_model
from tokenvit_jax.recipes.semantic_fpn import semantic_fpn_config
from tokenvit_jax.recipes.upernet import scenes_config, upernet_config

NUM_STEPS = 400
BATCH_SIZE = 8
HEADS: dict[str, Callable[[], ConfigDict]] = {
    "UperNet": lambda: upernet_config("scenes"),
    "Semantic FPN": lambda: semantic_fpn_config("scenes"),
    "linear": lambda: scenes_config("linear", {}),
}
SCALES = (0.75, 1.0, 1.25)
VIEWS = {
    "one": {},
    "one, and mirrored": {"inference.flip": True},
    "scales {}, {} and {}".format(*SCALES): {"inference.scales": SCALES},
    "the scales, also mirrored": {"inference.scales": SCALES, "inference.flip": True},
}

Runs = dict[str, list[ShortRun]]


def make_config(head: str) -> ConfigDict:
    """Returns the configuration of a short training with a head."""
    config = HEADS[head]()
    config.num_steps = NUM_STEPS
    config.batch_size = BATCH_SIZE
    config.optimizer.warmup_steps = NUM_STEPS // 10
    return config


def compare() -> Runs:
    """Trains with every head and seed; returns the results by head."""
    return {
        head: short_runs.run_all(lambda head=head: make_config(head), {head: {}})[head]
        for head in HEADS
    }


def mious(group: list[ShortRun]) -> list[float]:
    """Returns the mIoU of runs [%]."""
    return [100 * run.metrics["eval/miou"] for run in group]


def heads_table(runs: Runs) -> list[str]:
    """Returns the lines of the results of the heads."""
    rows = []
    for head, group in runs.items():
        config = make_config(head)
        counted = summarize_model(make_model(config), (config.image_size,) * 2, head)
        rows.append([
            head,
            f"{config.optimizer.learning_rate:g}",
            f"{counted.params / 1e3:.0f}",
            f"{counted.macs / 1e6:.1f}",
            mean_and_std(mious(group), 1),
            mean_and_std([run.test_loss for run in group]),
            mean_and_std([short_runs.last_loss(run) for run in group]),
        ])  # fmt: skip
    columns = [
        "head", "learning rate", "parameters, k", "MMACs", "mIoU, %", "test loss",
        "last training loss",
    ]  # fmt: skip
    return pages.table(columns, rows)


def miou_of_views(head: str, run: ShortRun, views: dict) -> float:
    """Returns the mIoU of a run with some views of every test image [%].

    Args:
      head: head of the run.
      run: the run.
      views: entries of the configuration.
    """
    config = make_config(head)
    config.inference.window = "whole"
    config.update_from_flattened_dict(views)
    return 100 * make_evaluate(config, run.model)(run.variables)["eval/miou"]


def views_table(runs: Runs) -> list[str]:
    """Returns the lines of the results with several views, for the first run of every head."""
    rows = [
        [name, *(f"{miou_of_views(head, group[0], views):.1f}" for head, group in runs.items())]
        for name, views in VIEWS.items()
    ]
    return pages.table(["views of an image", *(f"{head}, mIoU" for head in runs)], rows)
