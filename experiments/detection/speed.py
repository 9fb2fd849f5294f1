"""Measures how many of the saved multiply-adds become speed: Swin v2-L of HTC++.

    python -m experiments.detection.speed [--seconds=60]

The backbone with windows of 32 x 32 tokens, plain and with Expedite's setting of HTC++, takes turns
in one process, with random weights and one image: from the image to the four maps. Nothing else
should run on the machine. Writes speed.md here.
"""

from absl import flags

import tokenvit_jax as tv
from experiments import pages
from experiments.clustered_speed import measure, table
from experiments.detection.counts import EXPEDITE, OVERRIDES
from tokenvit_jax import cli
from tokenvit_jax.memory import keep_pages

FLAGS = flags.FlagValues()
flags.DEFINE_float("seconds", 60.0, "measuring time of each program", flag_values=FLAGS)

MODEL, SIZE = "swinv2_l", (1024, 1024)
ABOUT = """
The backbone of HTC++ with Expedite's setting, 23 x 23 centres of 32 x 32 tokens after 8 blocks of
the third stage, against the same backbone without. "saved" is the ratio of its multiply-adds,
"speed" the ratio of the median times of calls in turns, and the share is their quotient.
"""


def main(flag_values: flags.FlagValues) -> None:
    """Runs the experiment."""
    keep_pages()
    plain = tv.create_model(MODEL, num_classes=0, **OVERRIDES[MODEL])
    clustered = plain.clone(expedite=EXPEDITE)
    cells = measure(MODEL, plain, clustered, SIZE, flag_values.seconds, method="features")
    heading = pages.heading("Speed of a clustered Swin v2-L", __file__, ABOUT)
    pages.write(__file__, [*heading, "", *table([cells])])


if __name__ == "__main__":
    cli.run(main, FLAGS)
