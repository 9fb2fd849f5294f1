"""Compares methods at equal K: Table 3, Figure 7 and carry in training, on the embedded digits.

    python -m experiments.token_pooling.comparison

This is NOT ImageNet. A small DeiT is trained for 400 steps and tuned for 100 steps with every
method at the same K of every block; runs are paired over three seeds. Writes comparison.md and
comparison.png here.
"""

from collections.abc import Callable, Sequence

from matplotlib.figure import Figure

from experiments import pages, plots
from experiments.pages import mean_and_std, signed_mean_and_std
from experiments.runs import ShortRun
from experiments.short_runs import SEEDS
from experiments.token_pooling import stages

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
Runs = dict[str, list[ShortRun]]


def accuracy(run: ShortRun) -> float:
    """Returns the test accuracy of a run."""
    return run.accuracy


def test_loss(run: ShortRun) -> float:
    """Returns the test loss of a run."""
    return run.test_loss


def results(runs: Runs) -> list[str]:
    """Returns the lines of accuracies and losses, with mean and spread over the seeds."""
    rows = [
        [
            name,
            f"{stages.mmacs(group[0]):.2f}",
            *(mean_and_std([read(run) for run in group]) for read in (accuracy, test_loss)),
        ]
        for name, group in runs.items()
    ]
    return pages.table(["method", "MMACs", "test accuracy", "test loss"], rows)


def differences(runs: Runs) -> list[str]:
    """Returns the lines of the claims: differences between runs with the same seed."""
    rows = [
        [
            f"{first} - {second}",
            *(paired(runs[first], runs[second], read) for read in (accuracy, test_loss)),
        ]
        for first, second in CLAIMS
    ]
    return pages.table(["first - second", "test accuracy", "test loss"], rows)


def paired(
    first: Sequence[ShortRun], second: Sequence[ShortRun], read: Callable[[ShortRun], float]
) -> str:
    """Formats the differences between two settings, paired by seed."""
    pairs = zip(first, second, strict=True)
    return signed_mean_and_std([read(a) - read(b) for a, b in pairs])


def plot(runs: dict[tuple[int, ...], Runs]) -> Figure:
    """Draws accuracy and loss of every seed, one pair of panels for every list of K."""
    figure, axes = plots.panels(2 * len(runs), width=13, height=3.6, sharey=True)
    for number, (keep, group) in enumerate(runs.items()):
        colors = [plots.color(number)] * len(group)
        for axis, read, title in (
            (axes[2 * number], lambda run: 100 * run.accuracy, "test accuracy, %"),
            (axes[2 * number + 1], test_loss, "test loss"),
        ):
            title = f"{title}\n{stages.format_keep(keep)}"
            stages.draw_results(axis, list(group.values()), read, colors, title)
    plots.name_rows(axes[0], list(next(iter(runs.values()))))
    return figure


def train_all() -> dict[tuple[int, ...], Runs]:
    """Returns the runs of every method for every list of K."""
    whole = {ALL: [stages.tune(seed, None) for seed in SEEDS]}
    return {
        keep: whole
        | {
            name: [stages.tune(seed, {"keep": keep} | reducer) for seed in SEEDS]
            for name, reducer in SETTINGS.items()
        }
        for keep in KEEPS
    }


def page(bases: list[ShortRun], runs: dict[tuple[int, ...], Runs]) -> list[str]:
    """Returns the lines of the page."""
    about = f"""
    {stages.ABOUT}, then for {stages.TUNED_STEPS} steps with the method, from the base of the same
    seed. Results are mean ± standard deviation over {len(SEEDS)} seeds. The bases reach an accuracy
    of
    {mean_and_std([run.accuracy for run in bases])} and a loss of
    {mean_and_std([run.test_loss for run in bases])}. The first centres are the tokens with the
    highest scores unless the row says otherwise.
    """
    lines = [
        *pages.heading("Methods at equal numbers of tokens", __file__, about),
        "",
        "![test accuracy and loss of every seed; bars: means](comparison.png)",
    ]
    for keep, group in runs.items():
        lines += ["", f"## {stages.format_keep(keep)}", "", *results(group), ""]
        lines += ["Differences between runs with the same seed:", "", *differences(group)]
    return lines


def main() -> None:
    """Trains the models and writes the page."""
    runs = train_all()
    bases = [stages.train_base(seed) for seed in SEEDS]
    pages.write(__file__, page(bases, runs), plot(runs))


if __name__ == "__main__":
    main()
