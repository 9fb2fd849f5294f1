"""Replaces DGT's block by Swin's, CSWin's and CMT's, like Table 4(c) of DGT, on a small scale.

    python -m experiments.dgt.blocks

The paper trains DGT-T on ImageNet. This is NOT that experiment: it uses the embedded digits, a
small DGT-T, 160 steps and 360 test images (one image is 0.3 points). Writes blocks.md here.
"""

from experiments import pages, short_runs
from tokenvit_jax.recipes.dgt import OTHER_BLOCKS, dgt_digits_config

BLOCKS = ("dgt", *OTHER_BLOCKS)
# Even numbers of heads in every stage, which CSWin halves.
HEADS = {"num_heads": (2, 2, 4, 8)}
PAPER = "Swin 82.8, CSWin 83.0, CMT 83.4, DGT 83.8 % top-1"


def make_config(block):
    """Returns the configuration of the small network with a block."""
    config = short_runs.make_hard(dgt_digits_config("dgt_t", block))
    config.model_overrides.update(HEADS)
    return config


def compare():
    """Trains the network with every block and seed; returns the results by block."""
    return {
        block: short_runs.run_all(lambda block=block: make_config(block), {block: {}})[block]
        for block in BLOCKS
    }


def page(runs):
    """Returns the lines of the page."""
    about = (
        f"{short_runs.describe('DGT-T')} All blocks have the same widths, depths and heads. This "
        f"is not the paper's Table 4(c), which is on ImageNet ({PAPER})."
    )
    return [
        *pages.heading("Blocks in place of DGT's", __file__, about),
        "",
        *short_runs.results_table(runs, "block"),
    ]


if __name__ == "__main__":
    pages.write(__file__, page(compare()))
