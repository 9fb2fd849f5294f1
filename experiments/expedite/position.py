"""Varies where tokens are clustered and reconstructed: Figures 4 and 5 of Expedite, on scenes.

    python -m experiments.expedite.position --workdir=RUN [--quick]

RUN is a run of configs/segmenter_ti.py:scenes. Writes position.md and position.png here.
"""

from absl import flags
from matplotlib.figure import Figure

from experiments import pages, plots
from experiments.expedite import evaluation
from experiments.expedite.evaluation import (
    ALPHA,
    DEPTH,
    LARGE,
    SMALL,
    TEMPERATURE,
    Bench,
    Result,
    Setting,
    expedited,
)
from tokenvit_jax import cli

FLAGS = evaluation.define_flags("workdir")
SIDES = (SMALL, LARGE)
Results = dict[tuple[int, int], Result]  # settings by side and block


def vary_alpha(bench: Bench) -> Results:
    """Clusters after every block, and reconstructs the logits."""
    settings = {
        (side, alpha): expedited(side, alpha=alpha) for side in SIDES for alpha in range(1, DEPTH)
    }
    return evaluate(bench, "alpha", settings)


def vary_beta(bench: Bench) -> Results:
    """Clusters after block ALPHA, and reconstructs the tokens after every later block."""
    settings = {
        (side, last): expedited(side, beta=last - ALPHA, where="blocks")
        for side in SIDES
        for last in range(ALPHA + 1, DEPTH + 1)
    }
    return evaluate(bench, "alpha + beta", settings)


def evaluate(bench: Bench, label: str, settings: dict[tuple[int, int], Setting]) -> Results:
    """Evaluates settings by side and block.

    Args:
      bench: evaluates the settings.
      label: name of the block.
      settings: settings by side and block.
    """
    names = {key: f"{label} {key[1]}, {key[0]} x {key[0]}" for key in settings}
    results = bench.evaluate_all({names[key]: setting for key, setting in settings.items()})
    return {key: results[name] for key, name in names.items()}


def named(results: Results) -> dict[str, Result]:
    """Returns results by the names of their rows."""
    return {f"{block}, {side} x {side}": result for (side, block), result in results.items()}


def plot(bench: Bench, panels: dict[str, Results]) -> Figure:
    """Draws mIoU over the block of clustering, and over the block of reconstruction."""
    figure, axes = plots.panels(len(panels), width=10.4, height=3.8, grid=True)
    for axis, (label, results) in zip(axes, panels.items(), strict=True):
        for number, side in enumerate(SIDES):
            own = {block: result for (size, block), result in results.items() if size == side}
            # Error bars show the spread of the difference to the plain model.
            errors = [evaluation.spread(result, bench.plain) for result in own.values()]
            axis.errorbar(
                list(own), [result.miou for result in own.values()], errors,
                fmt="o-", color=plots.color(number), capsize=3, label=f"{side} x {side} centres",
            )  # fmt: skip
        axis.axhline(bench.plain.miou, color="black", lw=0.8, ls=":", label="plain")
        axis.set(xlabel=label, ylabel="mIoU, %", xticks=list(own))
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def main(flag_values: flags.FlagValues) -> None:
    """Runs the experiment."""
    trained = evaluation.load(flag_values.workdir)
    bench = Bench(trained, evaluation.test_scenes(flag_values.quick))
    by_alpha, by_beta = vary_alpha(bench), vary_beta(bench)
    logits = {f"logits, {side} x {side}": by_alpha[side, ALPHA] for side in SIDES}
    blocks = {f"blocks, {side} x {side}": by_beta[side, DEPTH] for side in SIDES}
    title, about = "Where to cluster and to reconstruct", f"Temperature {TEMPERATURE:g}."
    lines = [
        *evaluation.heading(title, __file__, trained, about),
        "![mIoU over both positions](position.png)",
        "",
        "## alpha: blocks before the clustering; the logits are reconstructed",
        "",
        *bench.table(named(by_alpha), "alpha, centres"),
        "",
        f"## alpha + beta: blocks before the reconstruction of the tokens; alpha = {ALPHA}",
        "",
        *bench.table(named(by_beta), "alpha + beta, centres"),
        "",
        "## Logits or tokens reconstructed after the last block",
        "",
        *bench.table(logits | blocks, "where, centres"),
    ]
    if not flag_values.quick:
        panels = {"alpha": by_alpha, f"alpha + beta, alpha = {ALPHA}": by_beta}
        pages.write(__file__, lines, plot(bench, panels))


if __name__ == "__main__":
    cli.run(main, FLAGS, required=("workdir",))
