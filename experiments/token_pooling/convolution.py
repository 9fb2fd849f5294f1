"""Convolution downsampling against Token Pooling: Supplement D and Figure 9, on the digits.

    python -m experiments.token_pooling.convolution

This is NOT ImageNet. One small DeiT is tuned with every placement of one and of two convolutions,
and with selections and clusterings of several lists of K, for the same number of steps. Writes
convolution.md and convolution.png here.
"""

import itertools
from pathlib import Path

from matplotlib.figure import Figure

from experiments.short_runs import Run
from experiments.token_pooling import stages
from tokenvit_jax.pictures.draw import COLORS

SEED = 0
NUM_STEPS = 60
LASTS = (0.5, 0.1, 0.02)  # part of the patches that leaves the last block
STEEP = (8, 4, 2, 1, 0, 0)
METHODS = ("powerbert", "weighted_kmedoids")
CONVOLUTION = "convolution"
FOLDER = Path(__file__).parent
Runs = dict[str, dict[str, Run]]


def train_all() -> Runs:
    """Returns method -> setting -> run."""
    blocks = range(1, stages.DEPTH + 1)
    placements = [places for n in (1, 2) for places in itertools.combinations(blocks, n)]
    runs = {CONVOLUTION: {}}
    for places in placements:
        runs[CONVOLUTION][f"blocks {', '.join(map(str, places))}"] = stages.tune(
            SEED, {"method": CONVOLUTION, "blocks": places}, num_steps=NUM_STEPS
        )
    keeps = [stages.shrinking_keep(stages.NUM_PATCHES, stages.DEPTH, last) for last in LASTS]
    for method in METHODS:
        runs[stages.LABELS[method]] = {
            f"K = {', '.join(map(str, keep))}": stages.tune(
                SEED, {"method": method, "keep": keep}, num_steps=NUM_STEPS
            )
            for keep in (*keeps, STEEP)
        }
    return runs


def front(runs: dict[str, Run]) -> set[str]:
    """Returns the settings whose loss no cheaper setting reaches."""
    best, found = float("inf"), set()
    for name, run in sorted(runs.items(), key=lambda item: stages.mmacs(item[1])):
        if run.test_loss < best:
            best = run.test_loss
            found.add(name)
    return found


def table(runs: Runs) -> list[str]:
    """Returns the lines of all settings, cheapest first; those of the front are marked."""
    lines = [
        "| method | setting | MMACs | test accuracy | test loss | front |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for method, group in runs.items():
        best = front(group)
        for name, run in sorted(group.items(), key=lambda item: stages.mmacs(item[1])):
            cells = f"{stages.mmacs(run):.2f} | {run.accuracy:.3f} | {run.test_loss:.3f}"
            lines.append(f"| {method} | {name} | {cells} | {'x' if name in best else ''} |")
    return lines


def plot(runs: Runs, whole: Run) -> Figure:
    """Draws accuracy and loss over the cost; lines: the settings on the front of the loss."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    for axis, field in zip(figure.subplots(1, 2), ("accuracy", "test_loss"), strict=True):
        for color, (method, group) in zip(COLORS, runs.items(), strict=False):
            points = {name: (stages.mmacs(run), getattr(run, field)) for name, run in group.items()}
            axis.plot(*zip(*points.values(), strict=True), "o", color=color, alpha=0.4, ms=4)
            line = sorted(points[name] for name in front(group))
            axis.plot(*zip(*line, strict=True), "-", color=color, label=method)
        axis.plot(stages.mmacs(whole), getattr(whole, field), "k*", label="all patches")
        axis.set(xlabel="MMACs", title=field.replace("_", " "))
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[1].legend(frameon=False, fontsize=8)
    return figure


def main() -> None:
    runs = train_all()
    whole = stages.tune(SEED, None, num_steps=NUM_STEPS)
    lines = [
        "# Convolution downsampling",
        "",
        "Written by `python -m experiments.token_pooling.convolution`.",
        f"{stages.NOT_IMAGENET} A DeiT",
        f"of 6 blocks and 64 patches, 400 steps, then {NUM_STEPS} steps with the method; one seed;",
        f"one image is 0.003. All patches: {stages.mmacs(whole):.2f} MMACs, accuracy",
        f"{whole.accuracy:.3f}, loss {whole.test_loss:.3f}. Convolution: all placements of one and",
        "two layers of 2 x 2 with stride 2, map 8 -> 4 -> 2. Front: no cheaper setting of the",
        "method has a lower loss.",
        "",
        "![accuracy and loss over the cost](convolution.png)",
        "",
        *table(runs),
    ]
    text = "\n".join(lines) + "\n"
    (FOLDER / "convolution.md").write_text(text)
    plot(runs, whole).savefig(FOLDER / "convolution.png", dpi=120)
    print(text)


if __name__ == "__main__":
    main()
