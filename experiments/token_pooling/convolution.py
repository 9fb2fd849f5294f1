"""Compares convolution with Token Pooling: Supplement D and Figure 9, on the embedded digits.

    python -m experiments.token_pooling.convolution

This is NOT ImageNet. One small DeiT is tuned with every placement of one and of two convolutions,
and with selections and clusterings for several lists of K, for the same number of steps. Writes
convolution.md and convolution.png here.
"""

import itertools

from matplotlib.figure import Figure

from experiments import pages, plots
from experiments.runs import ShortRun
from experiments.token_pooling import stages

SEED = 0
NUM_STEPS = 60
LASTS = (0.5, 0.1, 0.02)  # share of the patches that leave the last block
STEEP = (8, 4, 2, 1, 0, 0)
METHODS = ("powerbert", "weighted_kmedoids")
CONVOLUTION = "convolution"
Runs = dict[str, dict[str, ShortRun]]


def train_all() -> Runs:
    """Returns method -> setting -> run."""
    blocks = range(1, stages.DEPTH + 1)
    placements = [places for n in (1, 2) for places in itertools.combinations(blocks, n)]
    reducers = {
        CONVOLUTION: {
            f"blocks {', '.join(map(str, places))}": {"method": CONVOLUTION, "blocks": places}
            for places in placements
        }
    }
    keeps = [stages.shrinking_keep(stages.NUM_PATCHES, stages.DEPTH, last) for last in LASTS]
    for method in METHODS:
        reducers[stages.LABELS[method]] = {
            stages.format_keep(keep): {"method": method, "keep": keep} for keep in (*keeps, STEEP)
        }
    return {
        method: {
            name: stages.tune(SEED, reducer, num_steps=NUM_STEPS)
            for name, reducer in settings.items()
        }
        for method, settings in reducers.items()
    }


def by_cost(runs: dict[str, ShortRun]) -> dict[str, ShortRun]:
    """Returns the runs of a method, the cheapest first."""
    return dict(sorted(runs.items(), key=lambda item: stages.mmacs(item[1])))


def front(runs: dict[str, ShortRun]) -> set[str]:
    """Returns the settings with a lower loss than every cheaper setting."""
    best, found = float("inf"), set()
    for name, run in by_cost(runs).items():
        if run.test_loss < best:
            best = run.test_loss
            found.add(name)
    return found


def table(runs: Runs) -> list[str]:
    """Returns the lines of all settings, the cheapest first; the front is marked."""
    rows = []
    for method, group in runs.items():
        best = front(group)
        for name, run in by_cost(group).items():
            results = [f"{stages.mmacs(run):.2f}", f"{run.accuracy:.3f}", f"{run.test_loss:.3f}"]
            rows.append([method, name, *results, "x" if name in best else ""])
    return pages.table(["method", "setting", "MMACs", "test accuracy", "test loss", "front"], rows)


def plot(runs: Runs, whole: ShortRun) -> Figure:
    """Draws accuracy and loss over the cost; lines join the settings on the front of the loss."""
    figure, axes = plots.panels(2, width=11, height=3.8)
    for axis, field in zip(axes, ("accuracy", "test_loss"), strict=True):
        for number, (method, group) in enumerate(runs.items()):
            own = plots.color(number)
            points = {name: (stages.mmacs(run), getattr(run, field)) for name, run in group.items()}
            axis.plot(*zip(*points.values(), strict=True), "o", color=own, alpha=0.4, ms=4)
            line = sorted(points[name] for name in front(group))
            axis.plot(*zip(*line, strict=True), "-", color=own, label=method)
        axis.plot(stages.mmacs(whole), getattr(whole, field), "k*", label="all patches")
        axis.set(xlabel="MMACs", title=field.replace("_", " "))
    axes[1].legend(frameon=False, fontsize=8)
    return figure


def page(runs: Runs, whole: ShortRun) -> list[str]:
    """Returns the lines of the page."""
    about = f"""
    {stages.ABOUT}, then for {NUM_STEPS} steps with the method, with one seed. With all patches, the
    model has {stages.mmacs(whole):.2f} MMACs, accuracy {whole.accuracy:.3f} and loss
    {whole.test_loss:.3f}. Convolution has all placements of one and two layers of 2 x 2 with stride
    2, which change the map from 8 to 4 to 2. A setting is on the front if no cheaper setting of the
    method has a lower loss.
    """
    return [
        *pages.heading("Convolution downsampling", __file__, about),
        "",
        "![accuracy and loss over the cost](convolution.png)",
        "",
        *table(runs),
    ]


def main() -> None:
    """Trains the models and writes the page."""
    runs = train_all()
    whole = stages.tune(SEED, None, num_steps=NUM_STEPS)
    pages.write(__file__, page(runs, whole), plot(runs, whole))


if __name__ == "__main__":
    main()
