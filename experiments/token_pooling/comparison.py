"""Methods at equal K: Table 3, Figure 7 and carry in training, on the embedded digits.

    python -m experiments.token_pooling.comparison

This is NOT ImageNet. A small DeiT is trained for 400 steps and tuned for 100 with every method at
the same K of every block; paired over three seeds. Writes comparison.md and comparison.png here.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments.short_runs import Run, mean_and_spread
from experiments.token_pooling import stages
from tokenvit_jax.pictures.draw import COLORS

SEEDS = (0, 1, 2)
KEEPS = ((16, 8, 4, 2, 1, 0), (8, 4, 2, 1, 0, 0))
ALL = "all patches"
RANDOM_INITIAL = "weighted K-Medoids, random first centres"
CARRY = "weighted K-Medoids, carry"
SETTINGS = {label: {"method": method} for method, label in stages.LABELS.items()}
SETTINGS[RANDOM_INITIAL] = {"method": "weighted_kmedoids", "initial": "random"}
SETTINGS[CARRY] = {"method": "weighted_kmedoids", "carry": True}
# Table 3, the order of the baselines, Figure 7, Supplement E, and two more clusterings.
CLAIMS = (
    ("weighted K-Medoids", "K-Medoids"),
    ("weighted K-Means", "K-Means"),
    ("K-Medoids", "PoWER-BERT"),
    ("weighted K-Medoids", "PoWER-BERT"),
    ("PoWER-BERT", "importance selection"),
    ("importance selection", "random selection"),
    ("weighted K-Medoids", RANDOM_INITIAL),
    (CARRY, "weighted K-Medoids"),
    ("weighted K-Medoids", "weighted K-Means"),
    ("weighted K-Medoids", "Token Merging"),
)
FOLDER = Path(__file__).parent
Runs = dict[str, list[Run]]


def results(runs: Runs) -> list[str]:
    """Returns the lines of accuracies and losses, mean and spread over the seeds."""
    lines = ["| method | MMACs | test accuracy | test loss |", "| --- | --- | --- | --- |"]
    for name, group in runs.items():
        accuracy = mean_and_spread([run.accuracy for run in group])
        loss = mean_and_spread([run.test_loss for run in group])
        lines.append(f"| {name} | {stages.mmacs(group[0]):.2f} | {accuracy} | {loss} |")
    return lines


def differences(runs: Runs) -> list[str]:
    """Returns the lines of the claims: differences of the same seed."""
    lines = ["| first - second | test accuracy | test loss |", "| --- | --- | --- |"]
    for first, second in CLAIMS:
        accuracy = paired(runs, first, second, lambda run: run.accuracy)
        loss = paired(runs, first, second, lambda run: run.test_loss)
        lines.append(f"| {first} - {second} | {accuracy} | {loss} |")
    return lines


def paired(runs: Runs, first: str, second: str, read: Callable[[Run], float]) -> str:
    pairs = zip(runs[first], runs[second], strict=True)
    return stages.spread([read(a) - read(b) for a, b in pairs])


def plot(runs: dict[tuple, Runs]) -> Figure:
    """Draws accuracy and loss of every seed, one pair of panels for every list of K."""
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    panels = figure.subplots(1, 2 * len(runs), sharey=True)
    for number, (keep, group) in enumerate(runs.items()):
        accuracy, loss = panels[2 * number : 2 * number + 2]
        for axis, read, title in (
            (accuracy, lambda run: 100 * run.accuracy, "test accuracy, %"),
            (loss, lambda run: run.test_loss, "test loss"),
        ):
            for place, seeds in enumerate(group.values()):
                values = [read(run) for run in seeds]
                axis.plot(values, [place] * len(values), "o", color=COLORS[number], alpha=0.6)
                axis.plot(np.mean(values), place, "|", color="black", markersize=12)
            axis.set_title(f"{title}\nK = {', '.join(map(str, keep))}", fontsize=9)
            axis.grid(axis="x", color="0.92")
            axis.spines[["top", "right"]].set_visible(False)
    names = list(next(iter(runs.values())))
    panels[0].set_yticks(range(len(names)), names, fontsize=8)
    panels[0].invert_yaxis()
    return figure


def main() -> None:
    whole = {ALL: [stages.tune(seed, None) for seed in SEEDS]}
    runs = {
        keep: whole
        | {
            name: [stages.tune(seed, {"keep": keep} | reducer) for seed in SEEDS]
            for name, reducer in SETTINGS.items()
        }
        for keep in KEEPS
    }
    bases = [stages.train_base(seed) for seed in SEEDS]
    lines = [
        "# Methods at equal numbers of tokens",
        "",
        "Written by `python -m experiments.token_pooling.comparison`.",
        f"{stages.NOT_IMAGENET} A DeiT",
        "of 6 blocks and 64 patches, 400 steps, then 100 steps with the method, from the base of",
        f"the same seed; {len(SEEDS)} seeds, mean ± standard deviation; one image is 0.003. Bases:",
        f"accuracy {mean_and_spread([run.accuracy for run in bases])}, loss",
        f"{mean_and_spread([run.test_loss for run in bases])}. First centres are the highest",
        "scores where nothing else is said.",
        "",
        "![test accuracy and loss of every seed; bars: means](comparison.png)",
    ]
    for keep, group in runs.items():
        lines += ["", f"## K = {', '.join(map(str, keep))}", "", *results(group), ""]
        lines += ["Differences of the same seed:", "", *differences(group)]
    text = "\n".join(lines) + "\n"
    (FOLDER / "comparison.md").write_text(text)
    plot(runs).savefig(FOLDER / "comparison.png", dpi=120)
    print(text)


if __name__ == "__main__":
    main()
