"""Tables 2 to 5 and Supplement D of Token Pooling: multiply-adds beside the published ones.

    python -m experiments.token_pooling.tables

Nothing is trained: accuracies are the paper's. Writes tables.md and tables.png here.
"""

import functools
import itertools
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import tokenvit_jax as tv
from tokenvit_jax.measure.macs import summarize_model
from tokenvit_jax.pictures.draw import COLORS
from tokenvit_jax.published import TOKEN_POOLING, TOKEN_POOLING_BASES, TOKEN_POOLING_KMEANS

# Table 2: 10^9 multiply-adds and top-1 of the models without reduction, trained for as long.
PATCHES, DEPTH = 196, 12
FOLDER = Path(__file__).parent


@functools.cache
def gmacs(name: str, method: str = "", keep: tuple = (), blocks: tuple = ()) -> float:
    """Counts 10^9 multiply-adds of an image of 224 x 224; method "": without reduction."""
    reducer = {"method": method, "keep": keep, "blocks": blocks} if method else None
    model = tv.create_model(name, token_reducer=reducer)
    return summarize_model(model, (224, 224), name).macs / 1e9


def idle(name: str, keep: tuple[int, ...]) -> float:
    """Counts the distances (10^9) of the layers that keep all N: here nothing is done there."""
    left = np.minimum.accumulate((PATCHES, *keep))
    dim = tv.create_model(name).dim
    return sum(n**2 * dim for n, k in itertools.pairwise(left) if n == k) / 1e9


def levels(name: str) -> list[str]:
    """Returns the lines of Table 3, 4 or 5."""
    means = ["K-Means", "published"] if name == "deit_s" else []
    header = ["level", "PoWER-BERT", "published", "K-Medoids", "as published", "published"]
    header += [*means, "top-1 PoWER-BERT", "top-1 K-Medoids", "top-1 weighted"]
    lines = [row(header), row(["---"] * len(header))]
    for number, level in enumerate(TOKEN_POOLING[name]):
        medoids = gmacs(name, "kmedoids", level.keep)
        cells = [number, three(gmacs(name, "powerbert", level.keep)), level.powerbert_gmacs]
        cells += [three(medoids), three(medoids + idle(name, level.keep)), level.kmedoids_gmacs]
        if means:
            cells += [three(gmacs(name, "kmeans", level.keep)), TOKEN_POOLING_KMEANS[number]]
        cells += [level.powerbert_top1, level.kmedoids_top1, level.weighted_kmedoids_top1]
        lines.append(row(cells))
    return lines


def bases() -> list[str]:
    """Returns the lines of the models without reduction."""
    lines = ["| model | GMACs | published | published top-1 |", "| --- | --- | --- | --- |"]
    for name, (published, top1) in TOKEN_POOLING_BASES.items():
        lines.append(row([f"`{name}`", three(gmacs(name)), published, top1]))
    return lines


def placements() -> dict[int, list[tuple[int, ...]]]:
    """Returns the blocks of Supplement D by their number: three of them are equally far apart."""
    found = {n: list(itertools.combinations(range(1, DEPTH + 1), n)) for n in (1, 2, 3)}
    found[3] = [(a, b, c) for a, b, c in found[3] if b - a == c - b]
    return found


def convolutions() -> list[str]:
    """Returns the lines of the costs of convolution in DeiT-S, by number and by first block."""
    columns = [str(first) for first in range(1, DEPTH + 1)]
    lines = [row(["layers", "placements", "GMACs", *columns]), row(["---"] * (3 + DEPTH))]
    for number, places in placements().items():
        costs = {blocks: gmacs("deit_s", "convolution", (), blocks) for blocks in places}
        by_first = [
            span(cost for blocks, cost in costs.items() if blocks[0] == first)
            for first in range(1, DEPTH + 1)
        ]
        lines.append(row([number, len(places), span(costs.values()), *by_first]))
    return lines


def span(costs: Iterable[float]) -> str:
    """Formats the lowest and the highest cost; nothing if there is none."""
    ends = sorted({f"{cost:.2f}" for cost in costs}, key=float)
    return " - ".join(dict.fromkeys([ends[0], ends[-1]])) if ends else ""


def three(cost: float) -> str:
    return f"{cost:.3f}"


def row(cells: Iterable) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def plot() -> Figure:
    """Draws the paper's accuracy over the cost counted here."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    axes = figure.subplots(1, len(TOKEN_POOLING_BASES), sharey=True)
    methods = {
        "PoWER-BERT": ("powerbert", "powerbert_top1"),
        "K-Medoids": ("kmedoids", "kmedoids_top1"),
        "weighted K-Medoids": ("weighted_kmedoids", "weighted_kmedoids_top1"),
    }
    for axis, (name, (_, top1)) in zip(axes, TOKEN_POOLING_BASES.items(), strict=True):
        for color, (label, (method, entry)) in zip(COLORS, methods.items(), strict=False):
            costs = [gmacs(name, method, level.keep) for level in TOKEN_POOLING[name]]
            accuracy = [getattr(level, entry) for level in TOKEN_POOLING[name]]
            axis.plot(costs, accuracy, "o-", color=color, markersize=4, label=label)
        axis.plot(gmacs(name), top1, "k*", markersize=9, label="all tokens")
        axis.set(title=name, xlabel="GMACs, counted here")
        axis.grid(color="0.92")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set(ylabel="top-1 on ImageNet, %, of the paper")
    axes[0].legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def main() -> None:
    lines = [
        "# Token Pooling: the tables of the paper",
        "",
        "Written by `python -m experiments.token_pooling.tables`. GMACs of one image of",
        "224 x 224. Accuracies are the paper's, on ImageNet; none is measured here. K-Medoids:",
        "distances of all pairs, N^2 M, in the layers that drop tokens; as published: in those",
        "with K = N too, in which nothing is done here. K-Means: five rounds, K N M each. A",
        "weighted clustering costs as much as the plain one.",
        "",
        "## Models without reduction (Table 2)",
        "",
        *bases(),
    ]
    for number, name in enumerate(TOKEN_POOLING_BASES, 3):
        lines += ["", f"## Table {number} (`{name}`)", "", *levels(name)]
    lines += [
        "",
        "![the paper's accuracy over the cost](tables.png)",
        "",
        "## Convolution in DeiT-S (Supplement D)",
        "",
        "One, two and three layers of 2 x 2 with stride 2, map 14 -> 7 -> 3 -> 1; three are",
        "equally far apart. GMACs from the cheapest placement to the dearest, of all and by the",
        "block of the first layer.",
        "",
        *convolutions(),
    ]
    text = "\n".join(lines) + "\n"
    (FOLDER / "tables.md").write_text(text)
    plot().savefig(FOLDER / "tables.png", dpi=120)
    print(text)


if __name__ == "__main__":
    main()
