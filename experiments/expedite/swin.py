"""Clusters within the windows of a Swin Transformer, on scenes.

    python -m experiments.expedite.swin --workdir=RUN_SWIN [--quick]

RUN_SWIN is a run of swin_scenes.py in this folder. The map of the expedited stage is one window of
8 x 8 tokens. To test the mask of shifted windows, four scenes are joined to one image, so that this
stage sees four windows. Writes swin.md and swin.png here.
"""

from typing import Any

import flax.linen as nn
import jax
from absl import flags

from experiments import pages
from experiments.expedite import evaluation
from experiments.expedite.evaluation import BASELINES, Bench, Result, Scenes, Setting, clustered
from experiments.runs import Run
from tokenvit_jax import cli

FLAGS = evaluation.define_flags("workdir")
SWIN_DEPTH = 6  # blocks of the third stage
SIDES = (7, 6, 5, 4)
MIDDLE = (6, 5)
ALPHAS = (1, 2)
SWIN_ALPHA = 2
TEMPERATURES = (0.5, 2, 5, 20, 50)
SWIN_TEMPERATURE = 2.0  # the best on training scenes
MASKS = {"mask of this shift": False, "released mask": True}
ABOUT = f"""
The third stage has six blocks. Unless a row says otherwise, alpha is {SWIN_ALPHA}, beta is
{SWIN_DEPTH - SWIN_ALPHA} and the temperature is {SWIN_TEMPERATURE:g}. The features are the map
after this stage.
"""


def swin_expedited(side: int, **changes: Any) -> Setting:
    """Returns the setting that clusters every window to side x side, until the end of the stage.

    Args:
      side: rows and columns of the centres of a window.
      **changes: other attributes of `Expedite`.
    """
    default = {"alpha": SWIN_ALPHA, "temperature": SWIN_TEMPERATURE}
    return clustered(SWIN_DEPTH, side, default, changes)


def third_map(backbone: nn.Module, images: jax.Array) -> jax.Array:
    """Returns the map of the expedited stage."""
    return backbone.features(images, False)[2]


def mosaics(scenes: Scenes) -> Scenes:
    """Joins each group of four scenes to one image of twice the height and width."""

    def join(x):
        number, height, width, *rest = x.shape
        x = x.reshape(number // 4, 2, 2, height, width, *rest).swapaxes(2, 3)
        return x.reshape(number // 4, 2 * height, 2 * width, *rest)

    return Scenes(*map(join, scenes))


def choose_temperature(trained: Run, number: int) -> list[str]:
    """Returns the lines of all temperatures.

    Args:
      trained: the run.
      number: number of scenes of the training split to evaluate.
    """
    bench = Bench(trained, evaluation.read_scenes("train", number), third_map)
    settings = {f"{value:g}": swin_expedited(6, temperature=value) for value in TEMPERATURES}
    return bench.table(bench.evaluate_all(settings), "temperature")


def compare_masks(trained: Run, scenes: Scenes) -> list[str]:
    """Returns the lines of both masks of shifted windows, on mosaics of the scenes."""
    bench = Bench(trained, mosaics(scenes), third_map)
    settings = {
        f"{side} x {side}, {name}": swin_expedited(side) | {"released_mask": released}
        for side in MIDDLE
        for name, released in MASKS.items()
    }
    results = bench.evaluate_all(settings)
    changes = {
        side: evaluation.difference(*(results[f"{side} x {side}, {name}"] for name in MASKS))
        for side in MIDDLE
    }
    listed = ", ".join(f"{side} x {side} {change}" for side, change in changes.items())
    text = f"mIoU with the mask of this shift minus mIoU with the released mask: {listed}."
    return [*bench.table(results, "centres, mask"), "", *pages.paragraph(text)]


def vary_alpha(bench: Bench) -> dict[str, Result]:
    """Evaluates all sizes with clustering after each of ALPHAS."""
    return bench.evaluate_all(
        {
            f"{side} x {side}, alpha {alpha}": swin_expedited(side, alpha=alpha)
            for alpha in ALPHAS
            for side in SIDES
        }
    )


def vary_beta(bench: Bench) -> dict[str, Result]:
    """Evaluates every number of blocks on centres."""
    return bench.evaluate_all(
        {
            f"6 x 6, beta {beta}": swin_expedited(6, beta=beta)
            for beta in range(1, SWIN_DEPTH - SWIN_ALPHA + 1)
        }
    )


def evaluate_baselines(bench: Bench) -> dict[str, Result]:
    """Evaluates the baselines at two sizes."""
    return bench.evaluate_all(
        {
            f"{side} x {side}, {name}": swin_expedited(side, **changes)
            for name, changes in BASELINES.items()
            for side in MIDDLE
        }
    )


def curves(by_alpha: dict[str, Result], baselines: dict[str, Result]) -> dict[str, list[Result]]:
    """Returns the results of each method over the sizes."""
    own = {
        f"alpha {alpha}": [by_alpha[f"{side} x {side}, alpha {alpha}"] for side in SIDES]
        for alpha in ALPHAS
    }
    others = {
        f"{name}, alpha {SWIN_ALPHA}": [baselines[f"{side} x {side}, {name}"] for side in MIDDLE]
        for name in BASELINES
    }
    return own | others


def main(flag_values: flags.FlagValues) -> None:
    """Runs the experiment."""
    trained = evaluation.load(flag_values.workdir, swin=True)
    scenes = evaluation.test_scenes(flag_values.quick)
    temperatures = choose_temperature(trained, len(scenes.images))
    bench = Bench(trained, scenes, third_map)
    by_alpha, by_beta, baselines = vary_alpha(bench), vary_beta(bench), evaluate_baselines(bench)
    lines = [
        *evaluation.heading("Windows of a Swin Transformer", __file__, trained, ABOUT),
        "![mIoU and similarity over the cost](swin.png)",
        "",
        "## Temperature, on scenes of the training split; 6 x 6 centres for 8 x 8 tokens",
        "",
        *temperatures,
        "",
        "## Centres of a window, and alpha",
        "",
        *bench.table(by_alpha, "centres, alpha"),
        "",
        "## beta",
        "",
        *bench.table(by_beta, "centres, beta"),
        "",
        "## Baselines",
        "",
        *bench.table(baselines, "centres, baseline"),
        "",
        "## The mask of shifted windows: four scenes in an image of 256 x 256 pixels",
        "",
        *compare_masks(trained, scenes),
    ]
    if not flag_values.quick:
        found = curves(by_alpha, baselines)
        figure = evaluation.plot_over_cost(bench, found, "similarity of the third map")
        pages.write(__file__, lines, figure)


if __name__ == "__main__":
    cli.run(main, FLAGS, required=("workdir",))
