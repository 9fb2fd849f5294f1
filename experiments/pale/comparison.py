"""Tests claims of the Pale Transformer on the embedded digits, over several seeds.

    python -m experiments.pale.comparison

The settings compare modes of attention (Table 8) and position encodings (Table 9). This is NOT
ImageNet: rotated and shifted digits of 64 x 64 pixels, a small Pale-T, 160 steps. Writes
comparison.md and comparison.png here.
"""

from ml_collections import ConfigDict

from experiments import pages
from experiments.runs import ShortRun
from experiments.short_runs import compare, describe, make_hard, plot_comparison, results_table
from tokenvit_jax.recipes.pale import pale_digits_config

NETWORK = "Pale-T"
SETTINGS = {
    "axial": {"pale_sizes": (1, 1, 1, 1)},
    "cross-shaped": {"mode": "cross"},
    "pale, sequential": {"mode": "sequential"},
    "pale, vanilla": {"mode": "vanilla"},
    "pale, parallel": {},
    "pale, parallel, APE": {"position": "ape"},
    "pale, parallel, no position": {"position": "none"},
}


def make_config() -> ConfigDict:
    """Returns the configuration from which all settings start."""
    return make_hard(pale_digits_config("pale_t"))


def page(runs: dict[str, list[ShortRun]]) -> list[str]:
    """Returns the lines of the page."""
    return [
        *pages.heading("Modes of attention and position encodings", __file__, describe(NETWORK)),
        "",
        *results_table(runs, "attention"),
    ]


if __name__ == "__main__":
    found = compare(make_config, SETTINGS)
    pages.write(__file__, page(found), plot_comparison(found, NETWORK))
