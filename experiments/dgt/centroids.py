"""Which weight should the old centroid have in Eq. 4 of DGT? Three readings, measured.

    python -m experiments.dgt.centroids

The text of the paper makes tau, 0.1 times the learning rate, the weight of the OLD centroid
("literal"), which replaces the centroids almost wholly at every step; its stated purpose, stable
training, wants the opposite ("swapped"); "constant" is a usual moving average. Small-scale: the
embedded digits, a shrunk DGT-T, a few hundred steps. Writes centroids.md and centroids.png here.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from experiments.dgt.routing_runs import PROBE_EVERY, run_all
from experiments.short_runs import mean_and_spread
from tokenvit_jax.pictures.draw import COLORS

SEEDS = (0, 1, 2)
RULES = {
    "literal (0.1 lr)": {"centroids.rule": "literal"},
    "constant 0.9": {"centroids.rule": "constant", "centroids.old_weight": 0.9},
    "constant 0.99": {"centroids.rule": "constant", "centroids.old_weight": 0.99},
    "swapped (1 - 0.1 lr)": {"centroids.rule": "swapped"},
}
FOLDER = Path(__file__).parent


def table(runs: dict) -> str:
    lines = [
        f"Shrunk DGT-T on turned and shifted digits, {len(SEEDS)} seeds, mean ± standard",
        "deviation; written by `python -m experiments.dgt.centroids`. Churn: queries of fixed test",
        "images that change their group in one step. Overlap: keys that a group still selects a",
        "step later. Used: groups with at least one query. Churn and overlap over the second half",
        "of training.",
        "",
        "| weight of the old centroid | test accuracy | training loss | churn | overlap | used |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, group in runs.items():
        late = slice(len(group[0].churn) // 2, None)
        cells = [
            [r.accuracy for r in group],
            [r.loss[-20:].mean() for r in group],
            [r.churn[late].mean() for r in group],
            [r.overlap[late].mean() for r in group],
            [r.used[-1] for r in group],
        ]
        lines.append(f"| {name} | " + " | ".join(map(mean_and_spread, cells)) + " |")
    return "\n".join(lines) + "\n"


def plot(runs: dict):
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    labels = ("training loss (mean of 10 steps)", "churn per step", "overlap of keys per step")
    for color, (name, group) in zip(COLORS, runs.items(), strict=False):
        loss = np.stack([r.loss.reshape(-1, 10).mean(1) for r in group])
        for axis, values, every in (
            (axes[0], loss, 10),
            (axes[1], np.stack([r.churn for r in group]), PROBE_EVERY),
            (axes[2], np.stack([r.overlap for r in group]), PROBE_EVERY),
        ):
            steps = every * np.arange(values.shape[1])
            axis.plot(steps, values.mean(0), color=color, label=name)
            axis.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.15, lw=0)
    for axis, label in zip(axes, labels, strict=True):
        axis.set(xlabel="step", title=label)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    results = run_all(RULES, SEEDS)
    (FOLDER / "centroids.md").write_text(table(results))
    plot(results).savefig(FOLDER / "centroids.png", dpi=120)
    print(table(results))
