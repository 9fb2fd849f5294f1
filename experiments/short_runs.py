"""Compares settings in short trainings on the embedded digits, over several seeds."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from experiments import pages, plots
from experiments.pages import mean_and_std
from experiments.runs import ShortRun, train

SEEDS = (0, 1, 2)
NUM_STEPS = 160
LAST_STEPS = 20  # steps whose mean is the last training loss
CURVE_STEPS = 10  # steps whose mean is a point of a curve


def make_hard(config: ConfigDict) -> ConfigDict:
    """Shortens the digits recipe and rotates and shifts the digits further, in place.

    The plain recipe ends at 98 to 99 % with any attention; this leaves room for differences.
    """
    config.num_steps = NUM_STEPS
    config.augment.rotation = 40.0
    config.augment.translation = 0.2
    return config


def run_all(
    make_config: Callable[[], ConfigDict],
    settings: dict[str, dict],
    run: Callable[[ConfigDict], NamedTuple] = train,
) -> dict[str, list]:
    """Trains with every setting and seed.

    Args:
      make_config: returns the configuration from which all settings start.
      settings: name -> entries of the configuration, such as {"model_overrides.top_k": 12}.
      run: trains with a configuration; the result has the attribute `accuracy`.

    Returns:
      name -> one result of ``run`` per seed.
    """
    runs = {name: [] for name in settings}
    for name, entries in settings.items():
        for seed in SEEDS:
            config = make_config()
            config.seed = seed
            config.update_from_flattened_dict(entries)
            runs[name].append(run(config))
            print(f"{name}, seed {seed}: test accuracy {runs[name][-1].accuracy:.4f}", flush=True)
    return runs


def compare(
    make_config: Callable[[], ConfigDict], settings: dict[str, dict]
) -> dict[str, list[ShortRun]]:
    """Trains with every setting of the model and every seed.

    Args:
      make_config: returns the configuration from which all settings start.
      settings: name -> entries of `model_overrides`.
    """
    entries = {
        name: {f"model_overrides.{key}": value for key, value in overrides.items()}
        for name, overrides in settings.items()
    }
    return run_all(make_config, entries)


def title(network: str) -> str:
    """Returns the title of a plot: the network, the data, the steps and the seeds."""
    seeds = f"{len(SEEDS)} seeds"
    return f"Shrunk {network} on rotated and shifted digits, {NUM_STEPS} steps, {seeds}"


def describe(network: str, num_steps: int = NUM_STEPS) -> str:
    """Returns the sentences on the training and the precision of the results."""
    training = f"A small {network} was trained for {num_steps} steps on rotated and shifted digits"
    precision = "mean ± standard deviation; there are 360 test images, so one image is 0.003."
    return f"{training} with {len(SEEDS)} seeds. Results are {precision}"


def last_loss(run: NamedTuple) -> float:
    """Returns the training loss, averaged over the last steps."""
    return run.loss[-LAST_STEPS:].mean()


def loss_curves(runs: Sequence[NamedTuple]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the middle steps (n,) of groups of steps, and their mean losses (seeds, n)."""
    loss = np.stack([run.loss.reshape(-1, CURVE_STEPS).mean(1) for run in runs])
    return CURVE_STEPS * np.arange(loss.shape[1]) + CURVE_STEPS // 2, loss


def results_table(runs: dict[str, list[ShortRun]], column: str) -> list[str]:
    """Returns the lines of a table of accuracies and losses, mean and spread over the seeds.

    Args:
      runs: result of :func:`compare`.
      column: heading of the names.
    """
    rows = [
        [
            name,
            mean_and_std([run.accuracy for run in group]),
            mean_and_std([run.test_loss for run in group]),
            mean_and_std([last_loss(run) for run in group]),
        ]
        for name, group in runs.items()
    ]
    return pages.table([column, "test accuracy", "test loss", "last training loss"], rows)


def plot_comparison(runs: dict[str, list[ShortRun]], network: str) -> Figure:
    """Draws the training loss over steps, and test accuracy and loss of every seed.

    Args:
      runs: result of :func:`compare`.
      network: name of the trained network, for the title.
    """
    figure, (curve, accuracy, test_loss) = plots.panels(
        3, width=12, height=3.4, width_ratios=(1.3, 1, 1)
    )
    colors = [plots.color(number) for number in range(len(runs))]
    for number, (name, group) in enumerate(runs.items()):
        style = ("-", "--")[number // len(plots.COLORS)]
        plots.draw_band(curve, *loss_curves(group), colors[number], ls=style, label=name)
    curve.set(xlabel="step", title=f"training loss (mean of {CURVE_STEPS} steps)")
    curve.legend(frameon=False, fontsize=8)
    plots.draw_seeds(accuracy, [[100 * r.accuracy for r in g] for g in runs.values()], colors)
    plots.draw_seeds(test_loss, [[r.test_loss for r in g] for g in runs.values()], colors)
    accuracy.set(title="test accuracy, % (line: mean)")
    plots.name_rows(accuracy, list(runs))
    test_loss.set(title="test loss", yticks=range(len(runs)), yticklabels=[])
    figure.suptitle(title(network), fontsize=10)
    return figure
