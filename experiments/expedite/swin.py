"""Clustering within the windows of a Swin Transformer, on scenes.

    python -m experiments.expedite.swin --workdir=RUN_SWIN [--quick]

RUN_SWIN: of swin_scenes.py of this folder. The map of the expedited stage is one window of 8 x 8
tokens; for the mask of shifted windows four scenes are put together to an image, of which that
stage sees four windows. Writes swin.md and swin.png here.
"""

from typing import Any

import flax.linen as nn
import jax
from absl import flags
from matplotlib.figure import Figure

from experiments.expedite import common
from experiments.expedite.common import Bench, Result, Scenes, Setting
from tokenvit_jax import cli
from tokenvit_jax.pictures.draw import COLORS

FLAGS = common.define_flags("workdir")
DEPTH = 6  # blocks of the third stage
SIDES = (7, 6, 5, 4)
MIDDLE = (6, 5)
ALPHAS = (1, 2)
SWIN_ALPHA = 2
TEMPERATURES = (0.5, 2, 5, 20, 50)
SWIN_TEMPERATURE = 2.0  # the best on training scenes
MASKS = {"mask of this shift": False, "released mask": True}
BASELINES = {
    "pooling, reconstruction": {"iterations": 0},
    "clustering, bilinear": {"mode": "bilinear"},
    "pooling, bilinear": {"iterations": 0, "mode": "bilinear"},
}


def swin_expedited(side: int, **changes: Any) -> Setting:
    """Returns the setting that clusters every window to side x side, till the end of the stage.

    Args:
      side: rows and columns of the centres of a window.
      **changes: other attributes of `Expedite`.
    """
    changed = {"alpha": SWIN_ALPHA, "temperature": SWIN_TEMPERATURE} | changes
    beta = {"beta": DEPTH - changed["alpha"]}
    return {"expedite": beta | changed | {"clusters": (side, side)}}


def third_map(backbone: nn.Module, images: jax.Array) -> jax.Array:
    """Returns the map of the expedited stage."""
    return backbone.features(images, False)[2]


def mosaics(scenes: Scenes) -> Scenes:
    """Puts four scenes together to an image of twice the height and width."""

    def join(x):
        number, height, width, *rest = x.shape
        x = x.reshape(number // 4, 2, 2, height, width, *rest).swapaxes(2, 3)
        return x.reshape(number // 4, 2 * height, 2 * width, *rest)

    return Scenes(*map(join, scenes))


def plot(bench: Bench, curves: dict[str, list[Result]]) -> Figure:
    """Draws mIoU and similarity over the cost."""
    figure, axes = common.axes(2)
    for axis, field, label in zip(
        axes, ("miou", "similarity"), ("mIoU, %", "similarity of the third map"), strict=True
    ):
        for color, (name, results) in zip(COLORS, curves.items(), strict=False):
            points = [(result.mmacs, getattr(result, field)) for result in results]
            axis.plot(*zip(*points, strict=True), "o-", color=color, label=name)
        axis.plot(bench.plain.mmacs, getattr(bench.plain, field), "k*", ms=9, label="plain")
        axis.set(xlabel="10^6 multiply-adds", ylabel=label)
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def main(flag_values: flags.FlagValues) -> None:
    """Runs the experiment."""
    trained = common.load(flag_values.workdir, swin=True)
    scenes = common.test_scenes(flag_values.quick)
    tuning = Bench(trained, common.read_scenes("train", len(scenes.images)), third_map)
    tuned = tuning.evaluate_all(
        {f"{value:g}": swin_expedited(6, temperature=value) for value in TEMPERATURES}
    )
    bench = Bench(trained, scenes, third_map)
    by_alpha = {
        f"{side} x {side}, alpha {alpha}": swin_expedited(side, alpha=alpha)
        for alpha in ALPHAS
        for side in SIDES
    }
    by_beta = {
        f"6 x 6, beta {beta}": swin_expedited(6, beta=beta)
        for beta in range(1, DEPTH - SWIN_ALPHA + 1)
    }
    baselines = {
        f"{side} x {side}, {name}": swin_expedited(side, **changes)
        for name, changes in BASELINES.items()
        for side in MIDDLE
    }
    found, betas, others = map(bench.evaluate_all, (by_alpha, by_beta, baselines))
    whole = Bench(trained, mosaics(scenes), third_map)
    masks = whole.evaluate_all(
        {
            f"{side} x {side}, {name}": swin_expedited(side) | {"released_mask": released}
            for side in MIDDLE
            for name, released in MASKS.items()
        }
    )
    lines = [
        *common.heading("Windows of a Swin Transformer", "swin", trained),
        *common.paragraph(
            f"Six blocks of the third stage, alpha = {SWIN_ALPHA}, beta = {DEPTH - SWIN_ALPHA} and "
            f"temperature {SWIN_TEMPERATURE:g} where nothing else is said; similarity of the map "
            "of that stage."
        ),
        "",
        "![mIoU and similarity over the cost](swin.png)",
        "",
        "## Temperature, on scenes of the training split; 6 x 6 of 8 x 8",
        "",
        *tuning.table(tuned, "temperature"),
        "",
        "## Centres of a window, and alpha",
        "",
        *bench.table(found, "centres, alpha"),
        "",
        "## beta",
        "",
        *bench.table(betas, "centres, beta"),
        "",
        "## Baselines",
        "",
        *bench.table(others, "centres, baseline"),
        "",
        "## The mask of shifted windows: four scenes in an image of 256 x 256",
        "",
        *whole.table(masks, "centres, mask"),
        "",
        "mIoU with the mask of this shift, less that with the released one: "
        + ", ".join(
            f"{side} x {side} "
            + common.difference(*(masks[f"{side} x {side}, {name}"] for name in MASKS))
            for side in MIDDLE
        )
        + ".",
    ]
    curves = {
        f"alpha {alpha}": [found[f"{side} x {side}, alpha {alpha}"] for side in SIDES]
        for alpha in ALPHAS
    } | {
        f"{name}, alpha {SWIN_ALPHA}": [others[f"{side} x {side}, {name}"] for side in MIDDLE]
        for name in BASELINES
    }
    if not flag_values.quick:
        common.write("swin", lines, plot(bench, curves))


if __name__ == "__main__":
    cli.run(main, FLAGS, required=("workdir",))
