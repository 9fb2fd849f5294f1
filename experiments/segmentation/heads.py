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
from experiments.runs import ShortRun, make_model
from tokenvit_jax.measure.macs import summarize_model
from tokenvit_jax.recipes.semantic_fpn import semantic_fpn_config
from tokenvit_jax.recipes.upernet import scenes_config, upernet_config

NUM_STEPS = 240
IMAGE_SIDE = 64  # of the scenes' 128 pixels, in training and at one scale; labels keep theirs


def _linear(learning_rate: float) -> ConfigDict:
    config = scenes_config("linear", {})
    config.optimizer.learning_rate = learning_rate
    return config


HEADS: dict[str, Callable[[], ConfigDict]] = {
    "UperNet": lambda: upernet_config("scenes"),
    "Semantic FPN": lambda: semantic_fpn_config("scenes"),
    "linear": lambda: _linear(1e-3),
    "linear, higher rate": lambda: _linear(3e-3),
}

Runs = dict[str, list[ShortRun]]


def make_config(head: str) -> ConfigDict:
    """Returns the configuration of a short training with a head."""
    config = HEADS[head]()
    config.num_steps = NUM_STEPS
    config.optimizer.warmup_steps = NUM_STEPS // 10
    config.data.label_size = (config.image_size,) * 2
    config.image_size = IMAGE_SIDE
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
            pages.percentage([run.metrics["eval/miou"] for run in group]),
            mean_and_std([run.test_loss for run in group]),
            mean_and_std([short_runs.last_loss(run) for run in group]),
        ])  # fmt: skip
    columns = [
        "head", "learning rate", "parameters, k", "MMACs", "mIoU, %", "test loss",
        "last training loss",
    ]  # fmt: skip
    return pages.table(columns, rows)


def page(runs: Runs) -> list[str]:
    """Returns the lines of the page."""
    about = f"""
    One small Swin Transformer with different heads was trained from random weights for {NUM_STEPS}
    steps on embedded scenes, resized from 128 x 128 to {IMAGE_SIDE} x {IMAGE_SIDE} pixels, with
    {len(short_runs.SEEDS)} seeds. Results are mean ± standard deviation on the 200 test scenes, at
    the label maps' 128 x 128 pixels. mIoU of background alone is 17.2. MMACs are 10^6 multiply-adds
    of one image. The parameters of UperNet include the auxiliary head, which computes nothing
    outside of training; its training loss includes 0.4 times the auxiliary loss.
    """
    lines = pages.heading("Heads on one backbone", __file__, about)
    return [*lines, "", *heads_table(runs)]


def plot(runs: Runs) -> Figure:
    """Draws the training loss over steps, and the mIoU of every seed."""
    figure, (curve, miou) = plots.panels(2, width=9, height=3.2, width_ratios=(1.2, 1))
    colors = [plots.color(number) for number in range(len(runs))]
    for own, (head, group) in zip(colors, runs.items(), strict=True):
        plots.draw_band(curve, *short_runs.loss_curves(group), own, label=head)
    curve.set(xlabel="step", ylim=(0, 1), title="training loss (mean of 10 steps)")
    curve.legend(frameon=False, fontsize=8)
    plots.draw_seeds(miou, [mious(group) for group in runs.values()], colors)
    plots.name_rows(miou, list(runs))
    miou.set(title="mIoU, % (line: mean)")
    return figure


if __name__ == "__main__":
    found = compare()
    pages.write(__file__, page(found), plot(found))
