"""Expedite and what it is compared with, at equal costs: Tables 3 to 5 and Figure 6, on scenes.

    python -m experiments.expedite.baselines --workdir=RUN [--quick]

RUN: of configs/segmenter_ti.py:scenes. A rival that has a cost of its own gets the cheapest of its
settings that costs at least as much as Expedite. Writes baselines.md and baselines.png here.
"""

import bisect
from collections.abc import Sequence

import numpy as np
from absl import flags
from matplotlib.figure import Figure

from experiments.expedite import common
from experiments.expedite.common import Bench, Result, Setting, expedited
from tokenvit_jax import cli
from tokenvit_jax.models.reducers import evit_keep, tome_keep
from tokenvit_jax.pictures.draw import COLORS

FLAGS = common.define_flags("workdir")
SIDES = (4, 6, 8, 11, 13)  # of the map of centres
PATCHES, DEPTH = 256, 8
# As in the paper after 1 / 4, 1 / 2 and 3 / 4 of the blocks.
EVIT_BLOCKS = (3, 5, 7)
EXPEDITE = "Expedite"
BASELINES = {
    "pooling, reconstruction": {"iterations": 0},
    "clustering, bilinear": {"mode": "bilinear"},
    "pooling, bilinear": {"iterations": 0, "mode": "bilinear"},
}
MARKERS = "os^vDP*X"


def rivals() -> dict[str, list[Setting]]:
    """Returns the settings of methods with costs of their own, from the cheapest on."""
    images = [(rows, columns) for rows in range(3, 17) for columns in (rows - 1, rows)]
    smaller = {"alpha": 0, "beta": DEPTH, "mode": "bilinear", "where": "logits"}
    evit = [evit_keep(PATCHES, DEPTH, rate, EVIT_BLOCKS) for rate in np.arange(0.02, 1, 0.01)]
    tome = [tome_keep(PATCHES, DEPTH, merged) for merged in range(64, 0, -1)]
    merge = [{"method": "tome", "keep": keep} for keep in tome]
    return {
        "smaller image": [{"expedite": smaller | {"clusters": size}} for size in images],
        "EViT": [{"token_reducer": {"method": "evit", "keep": keep}} for keep in evit],
        "ToMe": [{"token_reducer": reducer} for reducer in merge],
        "ToMe, carry": [{"token_reducer": reducer | {"carry": True}} for reducer in merge],
    }


def settings_like(bench: Bench, side: int) -> dict[str, Setting]:
    """Returns a setting of each method whose cost is that of Expedite with side x side centres."""
    own = expedited(side)
    budget = bench.mmacs(own)
    baselines = {name: expedited(side, **changes) for name, changes in BASELINES.items()}
    chosen = {
        name: settings[bisect.bisect_left(settings, budget, key=bench.mmacs)]
        for name, settings in rivals().items()
    }
    return {EXPEDITE: own} | baselines | chosen


def describe(setting: Setting) -> str:
    """Formats what the cost of a setting depends on."""
    if "expedite" in setting:
        return "{} x {}".format(*setting["expedite"]["clusters"])
    return ", ".join(map(str, setting["token_reducer"]["keep"]))


def table(bench: Bench, settings: dict[str, Setting], results: dict[str, Result]) -> list[str]:
    """Returns the lines of one budget."""
    lines = [
        "| method | centres, image or tokens | MACs | of plain | mIoU | - plain | similarity |"
        " - Expedite |",
        "| --- |" + " --- |" * 7,
    ]
    for name, result in results.items():
        to_expedite = common.difference(result, results[EXPEDITE])
        cells = [name, describe(settings[name]), bench.cells(result), to_expedite]
        lines.append(common.row(cells))
    return lines


def plot(bench: Bench, results: Sequence[dict[str, Result]]) -> Figure:
    """Draws mIoU and similarity over the cost."""
    figure, axes = common.axes(2)
    for axis, field, label in zip(
        axes, ("miou", "similarity"), ("mIoU, %", "cosine similarity of the features"), strict=True
    ):
        for number, (name, marker) in enumerate(zip(results[0], MARKERS, strict=True)):
            points = [(group[name].mmacs, getattr(group[name], field)) for group in results]
            color = COLORS[number % len(COLORS)]
            axis.plot(*zip(*points, strict=True), marker + "-", color=color, ms=5, label=name)
        axis.plot(bench.plain.mmacs, getattr(bench.plain, field), "k*", ms=9, label="plain")
        axis.set(xlabel="10^6 multiply-adds", ylabel=label)
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def main(flag_values: flags.FlagValues) -> None:
    """Runs the experiment."""
    trained = common.load(flag_values.workdir)
    bench = Bench(trained, common.test_scenes(flag_values.quick))
    lines = [
        *common.heading("Expedite and baselines at equal costs", "baselines", trained),
        *common.paragraph(
            f"Plain: {bench.plain.mmacs:.1f}, mIoU {bench.plain.miou:.2f}. alpha = {common.ALPHA} "
            f"of 8 blocks, temperature {common.TEMPERATURE:g}; EViT in blocks 3, 5 and 7, ToMe "
            "(Token Merging) in all blocks, both restored from the token that stands for a patch. "
            "A method with costs of its own gets the cheapest setting that costs no less than "
            "Expedite."
        ),
        "",
        "![mIoU and similarity over the cost](baselines.png)",
    ]
    found = []
    for side in SIDES:
        settings = settings_like(bench, side)
        found.append(bench.evaluate_all(settings))
        lines += ["", f"## {side} x {side}", "", *table(bench, settings, found[-1])]
    if not flag_values.quick:
        common.write("baselines", lines, plot(bench, found))


if __name__ == "__main__":
    cli.run(main, FLAGS, required=("workdir",))
