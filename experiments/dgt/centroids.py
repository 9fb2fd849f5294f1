"""Compares three readings of Eq. 4 of DGT: the weight of the old centroid.

    python -m experiments.dgt.centroids

In the paper's text tau, 0.1 times the learning rate, is the weight of the OLD centroid ("literal"),
so that every step replaces the centroids almost completely. The paper's stated purpose, stable
training, requires the opposite ("swapped"); "constant" is a usual moving average. The experiment is
small: the embedded digits, a small DGT-T, 160 steps. Writes centroids.md and centroids.png here.
"""

import numpy as np
from matplotlib.figure import Figure

from experiments import pages, plots
from experiments.dgt.routing_runs import PROBE_EVERY, RoutingRun, run_all
from experiments.pages import mean_and_std
from experiments.short_runs import describe, last_loss, loss_curves

RULES = {
    "literal (0.1 lr)": {"model_overrides.centroid_rule": "literal"},
    "constant 0.9": {
        "model_overrides.centroid_rule": "constant",
        "model_overrides.centroid_old_weight": 0.9,
    },
    "constant 0.99": {
        "model_overrides.centroid_rule": "constant",
        "model_overrides.centroid_old_weight": 0.99,
    },
    "swapped (1 - 0.1 lr)": {"model_overrides.centroid_rule": "swapped"},
}
ABOUT = """
Churn is the share of the queries of fixed test images that change their group in one step. Overlap
is the share of a group's keys that it still selects one step later. Both are averaged over the
second half of training. Used is the share of the groups with at least one query, at the end.
"""
COLUMNS = [
    "weight of the old centroid",
    "test accuracy",
    "training loss",
    "churn",
    "overlap",
    "used",
]


def page(runs: dict[str, list[RoutingRun]]) -> list[str]:
    """Returns the lines of the page."""
    rows = []
    for name, group in runs.items():
        late = slice(len(group[0].churn) // 2, None)
        cells = [
            [run.accuracy for run in group],
            [last_loss(run) for run in group],
            [run.churn[late].mean() for run in group],
            [run.overlap[late].mean() for run in group],
            [run.used[-1] for run in group],
        ]
        rows.append([name, *map(mean_and_std, cells)])
    return [
        *pages.heading(
            "The rule that updates the centroids", __file__, f"{describe('DGT-T')} {ABOUT}"
        ),
        "",
        *pages.table(COLUMNS, rows),
    ]


def plot(runs: dict[str, list[RoutingRun]]) -> Figure:
    """Draws loss, churn and overlap over the steps."""
    figure, (loss, *probes) = plots.panels(3, width=11, height=3.2)
    for number, (name, group) in enumerate(runs.items()):
        own = plots.color(number)
        plots.draw_band(loss, *loss_curves(group), own, label=name)
        for axis, field in zip(probes, ("churn", "overlap"), strict=True):
            values = np.stack([getattr(run, field) for run in group])
            plots.draw_band(axis, PROBE_EVERY * np.arange(values.shape[1]), values, own)
    titles = ("training loss (mean of 10 steps)", "churn per step", "overlap of keys per step")
    for axis, title in zip((loss, *probes), titles, strict=True):
        axis.set(xlabel="step", title=title)
    loss.legend(frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    found = run_all(RULES)
    pages.write(__file__, page(found), plot(found))
