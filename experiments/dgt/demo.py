"""Trains a small Dynamic Group Transformer on handwritten digits and draws its query groups.

    python -m experiments.dgt.demo DIRECTORY

Writes the checkpoint, the learning curve and a picture like Figure 3 of the DGT paper, on real test
images. The exit status is 1 if the test accuracy is below 95 %.
"""

from pathlib import Path

import numpy as np
from absl import flags
from matplotlib.figure import Figure

from experiments.runs import load_run, observe, test_images
from tokenvit_jax import cli
from tokenvit_jax.errors import UserError
from tokenvit_jax.pictures import tokens
from tokenvit_jax.pictures.curves import plot_learning_curve
from tokenvit_jax.recipes.dgt import dgt_digits_config
from tokenvit_jax.train import train
from tokenvit_jax.training.train_log import read_metrics

DRAWN_DIGITS = (3, 5, 8)
MIN_ACCURACY = 0.95


def draw_groups(workdir: Path) -> Figure:
    """Draws the query groups and the keys of each group on the first image of some digits.

    Args:
      workdir: folder of the run, whose checkpoint with the best accuracy is read.
    """
    run = load_run(workdir, "best")
    images, labels = test_images(run.config)
    images = np.stack([images[np.argmax(labels == digit)] for digit in DRAWN_DIGITS])
    logits, intermediates = observe(run.config, run.model)(run.variables, images)
    routing = tokens.finest_routing(intermediates, images.shape[1:3])
    captions = [
        f"digit {digit}, predicted {predicted}"
        for digit, predicted in zip(DRAWN_DIGITS, logits.argmax(-1), strict=True)
    ]
    return tokens.plot_groups(images, routing, captions)


def main(workdir: Path) -> None:
    """Trains the model, writes the pictures and prints their paths."""
    train(dgt_digits_config("dgt_t"), workdir)
    records = read_metrics(workdir)
    accuracy = max(record.get("eval/accuracy", 0.0) for record in records)
    curve, groups = workdir / "learning_curve.png", workdir / "query_groups.png"
    plot_learning_curve(records).savefig(curve, dpi=150)
    draw_groups(workdir).savefig(groups, dpi=150)

    print(f"test accuracy {accuracy:.1%} on 360 images of digits that were not trained on")
    print(f"checkpoint:     {workdir / 'checkpoints'}")
    print(f"learning curve: {curve}")
    print(f"query groups and the keys that each selected: {groups}")
    if accuracy < MIN_ACCURACY:
        raise UserError(
            f"the test accuracy is {accuracy:.1%}; at least {MIN_ACCURACY:.0%} is expected"
        )


if __name__ == "__main__":
    cli.run(lambda _, workdir: main(Path(workdir)), flags.FlagValues(), positional=("DIRECTORY",))
