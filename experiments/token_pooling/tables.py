"""Compares multiply-adds of Token Pooling with Tables 2 to 5 and Supplement D of its paper.

    python -m experiments.token_pooling.tables

Nothing is trained: accuracies are the paper's. Writes tables.md and tables.png here.
"""

import functools
import itertools
from collections.abc import Iterable

import numpy as np
from matplotlib.figure import Figure

import tokenvit_jax as tv
from experiments import pages, plots
from experiments.costs import IMAGENET_SIZE, count_macs
from tokenvit_jax.published import TOKEN_POOLING, TOKEN_POOLING_BASES, TOKEN_POOLING_KMEANS

PATCHES, DEPTH = 196, 12
ABOUT = """
GMACs are for one image of 224 x 224 pixels. Accuracies are the paper's, on ImageNet; none is
measured here. K-Medoids counts the distances between all pairs, N^2 M, in the layers that drop
tokens. "As published" also counts them in the layers with K = N, in which nothing is done here.
K-Means counts five rounds, K N M each. A weighted clustering costs as much as an unweighted one.
"""
CONVOLUTIONS = """
One, two or three layers of 2 x 2 with stride 2 change the map from 14 to 7 to 3 to 1; three layers
are evenly spaced. The table shows the GMACs of the cheapest and the most expensive placement,
first for all placements, then by the block of the first layer.
"""


@functools.cache
def gmacs(name: str, method: str = "", keep: tuple = (), blocks: tuple = ()) -> float:
    """Counts 10^9 multiply-adds of an image of 224 x 224; method "" means without reduction."""
    reducer = {"method": method, "keep": keep, "blocks": blocks} if method else None
    return count_macs(tv.create_model(name, token_reducer=reducer), IMAGENET_SIZE) / 1e9


def idle(name: str, keep: tuple[int, ...]) -> float:
    """Counts the distances (10^9) in the layers with K = N, in which nothing is done here."""
    left = np.minimum.accumulate((PATCHES, *keep))
    dim = tv.create_model(name).settings.dim
    return sum(n**2 * dim for n, k in itertools.pairwise(left) if n == k) / 1e9


def levels(name: str) -> list[str]:
    """Returns the lines of Table 3, 4 or 5."""
    means = ["K-Means", "published"] if name == "deit_s" else []
    columns = ["level", "PoWER-BERT", "published", "K-Medoids", "as published", "published"]
    columns += [*means, "top-1 PoWER-BERT", "top-1 K-Medoids", "top-1 weighted"]
    rows = []
    for number, level in enumerate(TOKEN_POOLING[name]):
        medoids = gmacs(name, "kmedoids", level.keep)
        cells = [number, three(gmacs(name, "powerbert", level.keep)), level.powerbert_gmacs]
        cells += [three(medoids), three(medoids + idle(name, level.keep)), level.kmedoids_gmacs]
        if means:
            cells += [three(gmacs(name, "kmeans", level.keep)), TOKEN_POOLING_KMEANS[number]]
        cells += [level.powerbert_top1, level.kmedoids_top1, level.weighted_kmedoids_top1]
        rows.append(cells)
    return pages.table(columns, rows)


def bases() -> list[str]:
    """Returns the lines of the models without reduction."""
    rows = (
        [f"`{name}`", three(gmacs(name)), published, top1]
        for name, (published, top1) in TOKEN_POOLING_BASES.items()
    )
    return pages.table(["model", "GMACs", "published", "published top-1"], rows)


def placements() -> dict[int, list[tuple[int, ...]]]:
    """Returns number of layers -> their blocks in Supplement D; three are evenly spaced."""
    found = {n: list(itertools.combinations(range(1, DEPTH + 1), n)) for n in (1, 2, 3)}
    found[3] = [(a, b, c) for a, b, c in found[3] if b - a == c - b]
    return found


def convolutions() -> list[str]:
    """Returns the lines of the costs of convolution in DeiT-S, by number and by first block."""
    firsts = range(1, DEPTH + 1)
    rows = []
    for number, places in placements().items():
        costs = {blocks: gmacs("deit_s", "convolution", (), blocks) for blocks in places}
        by_first = [
            span(cost for blocks, cost in costs.items() if blocks[0] == first) for first in firsts
        ]
        rows.append([number, len(places), span(costs.values()), *by_first])
    return pages.table(["layers", "placements", "GMACs", *firsts], rows)


def span(costs: Iterable[float]) -> str:
    """Formats the lowest and the highest cost; "" if there is none."""
    ends = sorted({f"{cost:.2f}" for cost in costs}, key=float)
    return " - ".join(dict.fromkeys([ends[0], ends[-1]])) if ends else ""


def three(cost: float) -> str:
    """Formats a cost with three decimals."""
    return f"{cost:.3f}"


def plot() -> Figure:
    """Draws the paper's accuracy over the cost counted here."""
    figure, axes = plots.panels(
        len(TOKEN_POOLING_BASES), width=12, height=3.8, grid=True, sharey=True
    )
    methods = {
        "PoWER-BERT": ("powerbert", "powerbert_top1"),
        "K-Medoids": ("kmedoids", "kmedoids_top1"),
        "weighted K-Medoids": ("weighted_kmedoids", "weighted_kmedoids_top1"),
    }
    for axis, (name, (_, top1)) in zip(axes, TOKEN_POOLING_BASES.items(), strict=True):
        for number, (label, (method, entry)) in enumerate(methods.items()):
            costs = [gmacs(name, method, level.keep) for level in TOKEN_POOLING[name]]
            accuracy = [getattr(level, entry) for level in TOKEN_POOLING[name]]
            axis.plot(costs, accuracy, "o-", color=plots.color(number), markersize=4, label=label)
        axis.plot(gmacs(name), top1, "k*", markersize=9, label="all tokens")
        axis.set(title=name, xlabel="GMACs, counted here")
    axes[0].set(ylabel="top-1 on ImageNet, %, from the paper")
    axes[0].legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def page() -> list[str]:
    """Returns the lines of the page."""
    lines = [
        *pages.heading("Token Pooling: the tables of the paper", __file__, ABOUT),
        "",
        "## Models without reduction (Table 2)",
        "",
        *bases(),
    ]
    for number, name in enumerate(TOKEN_POOLING_BASES, 3):
        lines += ["", f"## Table {number} (`{name}`)", "", *levels(name)]
    return [
        *lines,
        "",
        "![the paper's accuracy over the cost](tables.png)",
        "",
        "## Convolution in DeiT-S (Supplement D)",
        "",
        *pages.paragraph(CONVOLUTIONS),
        "",
        *convolutions(),
    ]


if __name__ == "__main__":
    pages.write(__file__, page(), plot())
