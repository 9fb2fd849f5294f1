"""Draws superpixels of test scenes with at least three digits, and their segmentations.

    python -m experiments.expedite.pictures --workdir=RUN [--quick]

RUN is a run of configs/segmenter_ti.py:scenes. Writes pictures.png here.
"""

from pathlib import Path

import numpy as np
from absl import flags
from matplotlib.figure import Figure

from experiments.expedite import evaluation
from experiments.expedite.evaluation import LARGE, SMALL, Bench, Scenes, expedited
from experiments.runs import normalize_images
from tokenvit_jax import cli
from tokenvit_jax.pictures.draw import color_labels
from tokenvit_jax.pictures.tokens import superpixels

FLAGS = evaluation.define_flags("workdir")
NUM_SCENES = 4
MIN_CLASSES = 4  # number of labels: three digits and the background
SCALE = 4  # screen pixels per pixel of a scene, so that borders are thin


def borders(image: np.ndarray, assignment: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Draws white borders of superpixels over an image.

    Args:
      image: (H, W, 3) uint8.
      assignment: superpixel of each token (N,) int, row by row.
      grid: rows and columns of tokens.

    Returns:
      (SCALE H, SCALE W, 3) uint8.
    """
    height, width = (SCALE * side for side in image.shape[:2])
    regions = assignment.reshape(grid).repeat(height // grid[0], 0).repeat(width // grid[1], 1)
    image = image.repeat(SCALE, 0).repeat(SCALE, 1)
    below, right = regions[1:] != regions[:-1], regions[:, 1:] != regions[:, :-1]
    for near in (image[:-1], image[1:]):
        near[below] = 255
    for near in (image[:, :-1], image[:, 1:]):
        near[right] = 255
    return image


def columns(bench: Bench) -> dict[str, list[np.ndarray]]:
    """Returns the pictures of all scenes by title."""
    (images, labels), trained = bench.scenes, bench.trained
    count = trained.model.head.num_classes
    variables = {"params": trained.variables["params"]["backbone"]}
    normalized = normalize_images(trained.config, images)

    def colored(maps):
        return [color_labels(*pair, count) for pair in zip(images, maps, strict=True)]

    found = {
        "scene": list(images),
        "label": colored(labels),
        "plain": colored(bench.run({}).classes),
    }
    for side in (LARGE, SMALL):
        setting = expedited(side)
        clusters, grid = superpixels(bench.model(setting).backbone, variables, normalized)
        pairs = zip(images, np.asarray(clusters), strict=True)
        found[f"{side} x {side} superpixels"] = [borders(*pair, grid) for pair in pairs]
        share = bench.mmacs(setting) / bench.plain.mmacs
        found[f"with them, {share:.0%} of MACs"] = colored(bench.run(setting).classes)
    return found


def plot(found: dict[str, list[np.ndarray]]) -> Figure:
    """Draws the pictures, one row for every scene."""
    rows = len(next(iter(found.values())))
    figure = Figure(figsize=(1.5 * len(found), 1.55 * rows + 0.2), layout="constrained")
    panels = figure.subplots(rows, len(found), squeeze=False)
    for column, (title, pictures) in enumerate(found.items()):
        panels[0, column].set_title(title, fontsize=8)
        for axis, picture in zip(panels[:, column], pictures, strict=True):
            axis.imshow(picture)
            axis.axis("off")
    return figure


def main(flag_values: flags.FlagValues) -> None:
    """Runs the experiment."""
    images, labels = evaluation.test_scenes(flag_values.quick)
    several = [i for i, label in enumerate(labels) if len(np.unique(label)) >= MIN_CLASSES]
    chosen = Scenes(images[several[:NUM_SCENES]], labels[several[:NUM_SCENES]])
    figure = plot(columns(Bench(evaluation.load(flag_values.workdir), chosen)))
    if not flag_values.quick:
        figure.savefig(Path(__file__).with_suffix(".png"), dpi=90)


if __name__ == "__main__":
    cli.run(main, FLAGS, required=("workdir",))
