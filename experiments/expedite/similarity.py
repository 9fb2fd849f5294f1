"""Measures how similar reconstructed features are to the plain model's: Table 1 of Expedite.

    python -m experiments.expedite.similarity --workdir=RUN --swin_workdir=RUN_SWIN [--quick]

RUN is a run of configs/segmenter_ti.py:scenes, RUN_SWIN a run of swin_scenes.py in this folder. The
features are the residual stream after block alpha + beta, before any LayerNorm. Writes
similarity.md and similarity.png here.
"""

from collections.abc import Callable, Iterable

import flax.linen as nn
import jax
import numpy as np
from absl import flags
from matplotlib.figure import Figure

from experiments import pages, plots
from experiments.expedite import evaluation
from experiments.expedite.evaluation import (
    ALPHA,
    BASELINES,
    DEPTH,
    LARGE,
    NOT_ADE20K,
    SMALL,
    Setting,
    expedited,
)
from experiments.expedite.swin import SWIN_ALPHA, SWIN_DEPTH, swin_expedited
from experiments.runs import Run, normalize_images
from tokenvit_jax import cli
from tokenvit_jax.expediting.similarity import mean_cosine

FLAGS = evaluation.define_flags("workdir", "swin_workdir")
# Liang et al. 2022, Table 1: ViT-L/16 on ADE20K, alpha = 10, 28 x 28 centres for 40 x 40 tokens.
PUBLISHED = {12: 0.94, 14: 0.95, 16: 0.96, 18: 0.96, 20: 0.96, 22: 0.96, 24: 0.96}
POOLED = "pooling, bilinear"
Curves = dict[str, dict[int, float]]  # setting -> last block -> similarity
Settings = dict[str, Callable[[int], Setting]]  # as functions of the last block


def tokens_after(trained: Run, images: np.ndarray, last: int, setting: Setting) -> np.ndarray:
    """Returns the tokens after some blocks; in a hierarchical backbone, blocks of the third stage.

    Args:
      trained: the run.
      images: (N, H, W, 3) uint8.
      last: number of blocks; later blocks do not run.
      setting: setting of the backbone.
    """
    backbone = trained.model.backbone
    is_swin = trained.config.model.startswith("swin")
    depths = {"depths": (*backbone.settings.depths[:2], last, 1)} if is_swin else {"depth": last}
    shorter = backbone.clone(**depths, **setting)

    def forward(backbone: nn.Module, images: jax.Array) -> jax.Array:
        images = normalize_images(trained.config, images)
        if is_swin:
            return backbone.features(images, False)[2]
        return backbone.tokens(images, False)[:, 1:]

    variables = {"params": trained.variables["params"]["backbone"]}
    return evaluation.map_scenes(jax.jit(nn.apply(forward, shorter)), variables, images)


def measure(trained: Run, images: np.ndarray, lasts: Iterable[int], settings: Settings) -> Curves:
    """Returns the similarity after every block.

    Args:
      trained: the run.
      images: (N, H, W, 3) uint8.
      lasts: blocks after which tokens are reconstructed.
      settings: settings by name.
    """
    curves = {name: {} for name in settings}
    for last in lasts:
        plain = tokens_after(trained, images, last, {})
        for name, make in settings.items():
            features = tokens_after(trained, images, last, make(last))
            curves[name][last] = float(mean_cosine(features, plain))
            print(f"{name}, after block {last}: {curves[name][last]:.3f}", flush=True)
    return curves


def segmenter_settings() -> Settings:
    """Returns the settings of the Segmenter."""

    def make(side, **changes):
        return lambda last: expedited(side, beta=last - ALPHA, where="blocks", **changes)

    return settings_of(make, LARGE, SMALL)


def swin_settings() -> Settings:
    """Returns the settings of the Swin Transformer."""

    def make(side, **changes):
        return lambda last: swin_expedited(side, beta=last - SWIN_ALPHA, **changes)

    return settings_of(make, 6, 5)


def settings_of(make: Callable, large: int, small: int) -> Settings:
    """Returns settings of two sizes, and a baseline of the larger one."""
    return {
        f"{large} x {large}": make(large),
        f"{small} x {small}": make(small),
        f"{large} x {large}, {POOLED}": make(large, **BASELINES[POOLED]),
    }


def table(curves: Curves) -> list[str]:
    """Returns the lines of a table with one column per block."""
    rows = ([name, *(f"{value:.3f}" for value in curve.values())] for name, curve in curves.items())
    return pages.table(["alpha + beta", *next(iter(curves.values()))], rows)


def plot(panels: dict[str, Curves]) -> Figure:
    """Draws the similarity over the last block."""
    figure, axes = plots.panels(len(panels), width=10.4, height=3.8, grid=True)
    for axis, (title, curves) in zip(axes, panels.items(), strict=True):
        for number, (name, curve) in enumerate(curves.items()):
            style = "o--" if POOLED in name else "o-"
            axis.plot(
                list(curve), list(curve.values()), style, color=plots.color(number), label=name
            )
        axis.set(title=title, xlabel="alpha + beta", ylabel="cosine similarity")
        axis.set_xticks(list(next(iter(curves.values()))))
        axis.legend(frameon=False, fontsize=8)
    return figure


def page(steps: tuple[int, int], segmenter: Curves, swin: Curves) -> list[str]:
    """Returns the lines of the page.

    Args:
      steps: training steps of the Segmenter and of the Swin Transformer.
      segmenter: similarity in the Segmenter.
      swin: similarity in the Swin Transformer.
    """
    about = f"""
    The runs were trained for {steps[0]} and {steps[1]} steps. {NOT_ADE20K} The tables show the
    cosine between the tokens after block alpha + beta, reconstructed there, and the plain model's
    tokens, before LayerNorm, averaged over positions and test scenes.
    """
    return [
        *pages.heading("Similarity of reconstructed features", __file__, about),
        "",
        "![similarity by block](similarity.png)",
        "",
        f"## Segmenter, alpha = {ALPHA} of {DEPTH}, 16 x 16 tokens",
        "",
        *table(segmenter),
        "",
        f"## Swin Transformer, third stage, alpha = {SWIN_ALPHA} of {SWIN_DEPTH}, 8 x 8 tokens",
        "",
        *table(swin),
        "",
        "## Published: Segmenter ViT-L/16, ADE20K, alpha = 10 of 24, 40 x 40 tokens",
        "",
        *table({"28 x 28": PUBLISHED}),
    ]


def main(flag_values: flags.FlagValues) -> None:
    """Runs the experiment."""
    images = evaluation.test_scenes(flag_values.quick).images
    segmenter = evaluation.load(flag_values.workdir)
    swin = evaluation.load(flag_values.swin_workdir, swin=True)
    segmenter_lasts, swin_lasts = range(ALPHA + 1, DEPTH + 1), range(SWIN_ALPHA + 1, SWIN_DEPTH + 1)
    curves = {
        "Segmenter": measure(segmenter, images, segmenter_lasts, segmenter_settings()),
        "Swin Transformer, third stage": measure(swin, images, swin_lasts, swin_settings()),
    }
    if not flag_values.quick:
        lines = page((segmenter.step, swin.step), *curves.values())
        pages.write(__file__, lines, plot(curves))


if __name__ == "__main__":
    cli.run(main, FLAGS, required=("workdir", "swin_workdir"))
