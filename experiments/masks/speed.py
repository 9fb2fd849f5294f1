"""Measures how many of the saved multiply-adds become speed: Mask2Former with Swin-L.

    python -m experiments.masks.speed [--seconds=60]

For ADE20K semantic and COCO panoptic, the network with the plain backbone and with the released
setting of Expedite take turns in one process, with random weights and one image: from the image to
the logits of classes and masks. Nothing else should run on the machine. Writes speed.md here.
"""

from absl import flags

from experiments import pages
from experiments.clustered_speed import measure, table
from experiments.masks.published import EXPEDITE, NETWORKS, Expedited, expedite_of, model_of
from tokenvit_jax import cli
from tokenvit_jax.memory import keep_pages

FLAGS = flags.FlagValues()
flags.DEFINE_float("seconds", 60.0, "measuring time of each program", flag_values=FLAGS)

SIZES = {"ADE20K semantic": (640, 640), "COCO panoptic": (800, 1200)}
ABOUT = """
Swin-L with the released settings of Expedite, against the same network without. "saved" is the
ratio of the multiply-adds of the whole network, "speed" the ratio of the median times of calls in
turns, and the share is their quotient.
"""


def row(setting: Expedited, seconds: float) -> list[str]:
    """Returns the cells of a setting, whose name is also that of the network."""
    network = next(network for network in NETWORKS if network.name == setting.name)
    clustered = model_of(network, expedite_of(setting, setting.location))
    size = SIZES[setting.name]
    return measure(setting.name, model_of(network), clustered, size, seconds, train=False)


def main(flag_values: flags.FlagValues) -> None:
    """Runs the experiment."""
    keep_pages()
    rows = [row(setting, flag_values.seconds) for setting in EXPEDITE if setting.name in SIZES]
    heading = pages.heading("Speed of a clustered Mask2Former", __file__, ABOUT)
    pages.write(__file__, [*heading, "", *table(rows)])


if __name__ == "__main__":
    cli.run(main, FLAGS)
