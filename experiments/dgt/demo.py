"""Trains a small Dynamic Group Transformer on handwritten digits and draws what it learned.

    python -m experiments.dgt.demo DIRECTORY

Writes the checkpoint, the learning curve and a picture like Figure 3 of the DGT paper, over real
test images. Exit status 1 where the test accuracy stays below 95 %.
"""

from pathlib import Path

import numpy as np
from absl import flags

from tokenvit_jax import cli
from tokenvit_jax.data import eval_dataset
from tokenvit_jax.errors import UserError
from tokenvit_jax.pictures import tokens
from tokenvit_jax.pictures.curves import plot_learning_curve
from tokenvit_jax.predict import make_predict
from tokenvit_jax.recipes import dgt_digits_config
from tokenvit_jax.train import train
from tokenvit_jax.training.logging import read_metrics

DRAWN_DIGITS = (3, 5, 8)


def first_images(config, digits: tuple[int, ...]) -> np.ndarray:
    """Returns the first test image of each of the digits, (len(digits), S, S, 3) uint8."""
    batch = next(iter(eval_dataset(config)))
    return np.stack([batch["image"][np.argmax(batch["label"] == digit)] for digit in digits])


def main(workdir: Path) -> None:
    config = dgt_digits_config("dgt_t")
    train(config, workdir)

    records = read_metrics(workdir)
    accuracy = max(record.get("eval/accuracy", 0.0) for record in records)
    curve, groups = workdir / "learning_curve.png", workdir / "query_groups.png"
    plot_learning_curve(records).savefig(curve, dpi=150)

    predict = make_predict(config, workdir, "best")
    images = first_images(config, DRAWN_DIGITS)
    probabilities, intermediates = zip(*map(predict, images), strict=True)
    routings = [tokens.finest_routing(found, images.shape[1:3]) for found in intermediates]
    routing = tokens.Routing(
        np.concatenate([r.groups for r in routings]),
        np.concatenate([r.keys for r in routings]),
        routings[0].grid,
    )
    predicted = [p.argmax() for p in probabilities]
    captions = [
        f"digit {digit}, predicted {found}"
        for digit, found in zip(DRAWN_DIGITS, predicted, strict=True)
    ]
    tokens.plot_groups(images, routing, captions).savefig(groups, dpi=150)

    print(f"test accuracy {accuracy:.1%} on 360 images of digits that were not trained on")
    print(f"checkpoint:     {workdir / 'checkpoints'}")
    print(f"learning curve: {curve}")
    print(f"query groups and the keys that each selected: {groups}")
    if accuracy < 0.95:
        raise UserError(f"the test accuracy is {accuracy:.1%}; at least 95 % is expected")


if __name__ == "__main__":
    cli.run(lambda _, workdir: main(Path(workdir)), flags.FlagValues(), positional=("DIRECTORY",))
