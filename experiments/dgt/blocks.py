"""Replaces DGT's block by Swin's, CSWin's and CMT's, like Table 4(c) of DGT, on a small scale.

    python -m experiments.dgt.blocks

The paper trains DGT-T on ImageNet. This is NOT that experiment: it uses the embedded digits, a
small DGT-T, 100 steps and 360 test images (one image is 0.3 points). Writes blocks.md here.
"""

import numpy as np
from ml_collections import ConfigDict

from experiments import pages, short_runs
from experiments.pages import mean_and_std, signed_mean_and_std
from experiments.runs import ShortRun, make_model
from tokenvit_jax.measure.macs import summarize_model
from tokenvit_jax.recipes.dgt import OTHER_BLOCKS, dgt_digits_config

NUM_STEPS = 100
OWN = "dgt"
# Block -> top-1 on ImageNet that the paper reports for DGT-T with it [%].
PUBLISHED = {OWN: 83.8, "swin": 82.8, "cswin": 83.0, "cmt": 83.4}
# Even numbers of heads in every stage, which CSWin halves.
HEADS = {"num_heads": (2, 2, 4, 8)}


def make_config(block: str) -> ConfigDict:
    """Returns the configuration of the small network with a block."""
    config = short_runs.make_hard(dgt_digits_config("dgt_t", block))
    config.num_steps = NUM_STEPS
    config.model_overrides.update(HEADS)
    return config


def compare() -> dict[str, list[ShortRun]]:
    """Trains the network with every block and seed; returns the results by block."""
    return {
        block: short_runs.run_all(lambda block=block: make_config(block), {block: {}})[block]
        for block in (OWN, *OTHER_BLOCKS)
    }


def table(runs: dict[str, list[ShortRun]]) -> list[str]:
    """Returns the lines of the results; differences are between runs with the same seed."""
    own = np.array([run.accuracy for run in runs[OWN]])
    rows = []
    for block, group in runs.items():
        config = make_config(block)
        counted = summarize_model(make_model(config), (config.image_size,) * 2, block)
        accuracy = [run.accuracy for run in group]
        rows.append([
            block,
            f"{counted.params / 1e3:.1f}",
            f"{counted.macs / 1e6:.2f}",
            mean_and_std(accuracy),
            "" if block == OWN else signed_mean_and_std(accuracy - own),
            mean_and_std([run.test_loss for run in group]),
            mean_and_std([short_runs.last_loss(run) for run in group]),
            f"{PUBLISHED[block]:.1f}",
        ])  # fmt: skip
    columns = [
        "block", "parameters, k", "MMACs", "test accuracy", "- DGT, same seed", "test loss",
        "last training loss", "published, ImageNet",
    ]  # fmt: skip
    return pages.table(columns, rows)


def page(runs: dict[str, list[ShortRun]]) -> list[str]:
    """Returns the lines of the page."""
    stages = "{}, {}, {} and {}".format(*make_config(OWN).model_overrides["depths"])
    about = f"""
    {short_runs.describe("DGT-T", NUM_STEPS)} All blocks have the same stem, head, widths and
    numbers of blocks ({stages} in the four stages) and attention heads. The last column is the
    paper's Table 4(c): the top-1 accuracy in percent of the full DGT-T on ImageNet. That experiment
    was not repeated.
    """
    return [*pages.heading("Blocks in place of DGT's", __file__, about), "", *table(runs)]


if __name__ == "__main__":
    pages.write(__file__, page(compare()))
