"""How similar reconstructed features are to those of the plain model: Table 1 of Expedite.

    python -m experiments.expedite.similarity --workdir=RUN --swin_workdir=RUN_SWIN [--quick]

RUN: of configs/segmenter_ti.py:scenes; RUN_SWIN: of swin_scenes.py of this folder. The features are
the residual stream after block alpha + beta, before any LayerNorm. Writes similarity.md and
similarity.png here.
"""

from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from absl import flags
from matplotlib.figure import Figure

from experiments.expedite import common
from experiments.expedite.common import ALPHA, LARGE, SMALL, Setting, Trained, expedited
from experiments.expedite.swin import SWIN_ALPHA, swin_expedited
from tokenvit_jax import cli
from tokenvit_jax.expediting.similarity import mean_cosine
from tokenvit_jax.pictures.draw import COLORS
from tokenvit_jax.training.step import normalize

FLAGS = common.define_flags("workdir", "swin_workdir")
DEPTH, SWIN_DEPTH = 8, 6
# Liang et al. 2022, Table 1: ViT-L/16 on ADE20K, alpha = 10, 28 x 28 of 40 x 40.
PUBLISHED = {12: 0.94, 14: 0.95, 16: 0.96, 18: 0.96, 20: 0.96, 22: 0.96, 24: 0.96}
BILINEAR = {"iterations": 0, "mode": "bilinear"}
Curves = dict[str, dict[int, float]]  # setting -> last block -> similarity


def tokens_after(trained: Trained, images: np.ndarray, last: int, setting: Setting) -> np.ndarray:
    """Returns the tokens after some blocks, of the third stage where there are stages.

    Args:
      trained: the run.
      images: (N, H, W, 3) uint8.
      last: how many blocks; the others are left out.
      setting: of the backbone.
    """
    backbone, name = trained.model.backbone, trained.config.model
    is_swin = name.startswith("swin")
    depths = {"depths": (*backbone.depths[:2], last, 1)} if is_swin else {"depth": last}
    shorter = backbone.clone(**depths, **setting)

    def forward(backbone: nn.Module, images: jax.Array) -> jax.Array:
        images = normalize(images, trained.config.data.normalization)
        if is_swin:
            return backbone.features(images, False)[2]
        return backbone.tokens(images, False)[:, 1:]

    variables = {"params": trained.variables["params"]["backbone"]}
    return common.map_scenes(jax.jit(nn.apply(forward, shorter)), variables, images)


def measure(
    trained: Trained, images: np.ndarray, lasts: Iterable[int], settings: dict[str, Any]
) -> Curves:
    """Returns the similarity after every block.

    Args:
      trained: the run.
      images: (N, H, W, 3) uint8.
      lasts: blocks after which tokens are reconstructed.
      settings: name -> function of the last block that returns a setting.
    """
    curves = {name: {} for name in settings}
    for last in lasts:
        plain = tokens_after(trained, images, last, {})
        for name, make in settings.items():
            features = tokens_after(trained, images, last, make(last))
            curves[name][last] = float(mean_cosine(features, plain))
            print(f"{name}, after block {last}: {curves[name][last]:.3f}", flush=True)
    return curves


def segmenter_settings() -> dict[str, Any]:
    """Returns the settings of the Segmenter as functions of the last block."""

    def make(side, **changes):
        return lambda last: expedited(side, beta=last - ALPHA, where="blocks", **changes)

    return {
        f"{LARGE} x {LARGE}": make(LARGE),
        f"{SMALL} x {SMALL}": make(SMALL),
        f"{LARGE} x {LARGE}, pooling, bilinear": make(LARGE, **BILINEAR),
    }


def swin_settings() -> dict[str, Any]:
    """Returns the settings of the Swin Transformer as functions of the last block."""

    def make(side, **changes):
        return lambda last: swin_expedited(side, beta=last - SWIN_ALPHA, **changes)

    return {
        "6 x 6": make(6),
        "5 x 5": make(5),
        "6 x 6, pooling, bilinear": make(6, **BILINEAR),
    }


def table(curves: Curves) -> list[str]:
    """Returns the lines of a table, blocks across."""
    lasts = list(next(iter(curves.values())))
    lines = [common.row(["alpha + beta", *lasts]), common.row(["---"] * (1 + len(lasts)))]
    for name, curve in curves.items():
        lines.append(common.row([name, *(f"{value:.3f}" for value in curve.values())]))
    return lines


def plot(panels: dict[str, Curves]) -> Figure:
    """Draws the similarity over the last block."""
    figure, axes = common.axes(len(panels))
    for axis, (title, curves) in zip(axes, panels.items(), strict=True):
        for color, (name, curve) in zip(COLORS, curves.items(), strict=False):
            style = "o--" if "pooling" in name else "o-"
            axis.plot(list(curve), list(curve.values()), style, color=color, label=name)
        axis.set(title=title, xlabel="alpha + beta", ylabel="cosine similarity")
        axis.set_xticks(list(next(iter(curves.values()))))
        axis.legend(frameon=False, fontsize=8)
    return figure


def main(flag_values: flags.FlagValues) -> None:
    """Runs the experiment."""
    images = common.test_scenes(flag_values.quick).images
    segmenter = common.load(flag_values.workdir)
    swin = common.load(flag_values.swin_workdir, swin=True)
    segmenter_lasts, swin_lasts = range(ALPHA + 1, DEPTH + 1), range(SWIN_ALPHA + 1, SWIN_DEPTH + 1)
    of_segmenter = measure(segmenter, images, segmenter_lasts, segmenter_settings())
    of_swin = measure(swin, images, swin_lasts, swin_settings())
    lines = [
        "# Similarity of reconstructed features",
        "",
        *common.paragraph(
            "Written by `python -m experiments.expedite.similarity`, after steps "
            f"{segmenter.step} and {swin.step}. {common.NOT_ADE20K} Cosine of the tokens after "
            "block alpha + beta, reconstructed there, and those of the plain model, before "
            "LayerNorm; mean over places and test scenes."
        ),
        "",
        "![similarity by block](similarity.png)",
        "",
        f"## Segmenter, alpha = {ALPHA} of {DEPTH}, centres of 16 x 16 tokens",
        "",
        *table(of_segmenter),
        "",
        f"## Swin Transformer, third stage, alpha = {SWIN_ALPHA} of {SWIN_DEPTH}, of 8 x 8 tokens",
        "",
        *table(of_swin),
        "",
        "## Published: Segmenter ViT-L/16, ADE20K, alpha = 10 of 24, 28 x 28 of 40 x 40",
        "",
        *table({"28 x 28": PUBLISHED}),
    ]
    if not flag_values.quick:
        panels = {"Segmenter": of_segmenter, "Swin Transformer, third stage": of_swin}
        common.write("similarity", lines, plot(panels))


if __name__ == "__main__":
    cli.run(main, FLAGS, required=("workdir", "swin_workdir"))
