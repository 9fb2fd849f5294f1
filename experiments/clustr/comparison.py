"""Tests claims of ClusTR on the embedded digits, over several seeds.

    python -m experiments.clustr.comparison

The settings compare clusters with grid pooling (Table 6), several scales with one (Table 7), the
two rules that assign tokens to clusters, and a fixed number of clusters with a number that follows
the content (future work in Section A2 of the paper) and is about the same on average. This is NOT
ImageNet: rotated and shifted digits of 64 x 64 pixels, a small ClusTR, 160 steps. Writes
comparison.md and comparison.png here.
"""

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from experiments import pages
from experiments.runs import ShortRun, observe, test_batches
from experiments.short_runs import (
    SEEDS,
    compare,
    describe,
    make_hard,
    plot_comparison,
    results_table,
)
from tokenvit_jax.recipes.clustr import clustr_digits_config

NETWORK = "ClusTR"
ONE_SCALE = ((64,), (16,), (4,), (1,))
# At most twice the clusters, half of them used on average; one scale of stage 3 has all tokens.
TWICE = ((32, 8), (8, 2), (2, 1), (1,))
ADAPTIVE = "two scales, adaptive"
SETTINGS = {
    "grid pooling, one scale": {"ratios": ONE_SCALE, "aggregation": "grid"},
    "clusters, one scale": {"ratios": ONE_SCALE},
    "clusters, one finer scale": {"ratios": ((16,), (4,), (1,), (1,))},
    "clusters, two scales": {},
    "two scales, rule of the text": {"assign": "parent"},
    ADAPTIVE: {"ratios": TWICE, "adaptive": 0.5},
}


def make_config() -> ConfigDict:
    """Returns the configuration from which all settings start."""
    return make_hard(clustr_digits_config("clustr_t"))


def clusters_used(run: ShortRun) -> dict[str, np.ndarray]:
    """Returns for every clustering which clusters each test image used, (images, clusters) bool.

    Args:
      run: run of an adaptive model, whose clusterings with a threshold are read.
    """
    config = make_config()
    apply = observe(config, run.model)
    batches = []
    for images in test_batches(config):
        _, noted = jax.device_get(apply(run.variables, images))
        flat = flatten_dict(noted, sep="/")
        batches.append({name: used[0] for name, used in flat.items() if "used" in name})
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def adaptive_table(used: list[dict[str, np.ndarray]]) -> list[str]:
    """Returns the lines of the table of the numbers of clusters that the test images used.

    Args:
      used: result of :func:`clusters_used` for every seed.
    """
    columns = ["seed", "block and scale", "maximum", "mean over images", "lowest and highest image"]
    rows = []
    for seed, clusterings in zip(SEEDS, used, strict=True):
        for name, clusters in clusterings.items():
            counts = clusters.sum(1)
            extremes = f"{counts.min()}, {counts.max()}"
            rows.append([seed, name, clusters.shape[1], f"{counts.mean():.1f}", extremes])
    return pages.table(columns, rows)


def page(runs: dict[str, list[ShortRun]], used: list[dict[str, np.ndarray]]) -> list[str]:
    """Returns the lines of the page."""
    return [
        *pages.heading("Clusters, scales and rules", __file__, describe(NETWORK)),
        "",
        *results_table(runs, "keys and values"),
        "",
        "Number of clusters that the adaptive model used on the test images:",
        "",
        *adaptive_table(used),
    ]


if __name__ == "__main__":
    found = compare(make_config, SETTINGS)
    lines = page(found, [clusters_used(run) for run in found[ADAPTIVE]])
    pages.write(__file__, lines, plot_comparison(found, NETWORK))
