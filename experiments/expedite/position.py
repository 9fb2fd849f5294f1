"""Where tokens are clustered and reconstructed: Figures 4 and 5 of Expedite, on scenes.

    python -m experiments.expedite.position --workdir=RUN [--quick]

RUN: of configs/segmenter_ti.py:scenes. Writes position.md and position.png here.
"""

from absl import flags
from matplotlib.figure import Figure

from experiments.expedite import common
from experiments.expedite.common import ALPHA, LARGE, SMALL, Bench, Result, expedited
from tokenvit_jax import cli
from tokenvit_jax.pictures.draw import COLORS

FLAGS = common.define_flags("workdir")
DEPTH = 8
SIDES = (SMALL, LARGE)
Results = dict[tuple[int, int], Result]  # side, block -> what was found


def vary_alpha(bench: Bench) -> Results:
    """Clusters after every block, and reconstructs the logits."""
    settings = {
        f"alpha {alpha}, {side} x {side}": ((side, alpha), expedited(side, alpha=alpha))
        for side in SIDES
        for alpha in range(1, DEPTH)
    }
    return evaluate(bench, settings)


def vary_beta(bench: Bench) -> Results:
    """Clusters after block ALPHA, and reconstructs the tokens after every later one."""
    settings = {
        f"alpha + beta {last}, {side} x {side}": (
            (side, last),
            expedited(side, beta=last - ALPHA, where="blocks"),
        )
        for side in SIDES
        for last in range(ALPHA + 1, DEPTH + 1)
    }
    return evaluate(bench, settings)


def evaluate(bench: Bench, settings: dict[str, tuple]) -> Results:
    """Evaluates settings, each with its key."""
    results = bench.evaluate_all({name: setting for name, (_, setting) in settings.items()})
    return {key: results[name] for name, (key, _) in settings.items()}


def named(results: Results) -> dict[str, Result]:
    """Returns results by the names of rows."""
    return {f"{block}, {side} x {side}": result for (side, block), result in results.items()}


def plot(bench: Bench, panels: dict[str, Results]) -> Figure:
    """Draws mIoU over the block of clustering, and over that of reconstruction."""
    figure, axes = common.axes(len(panels))
    for axis, (label, results) in zip(axes, panels.items(), strict=True):
        for side, color in zip(SIDES, COLORS, strict=False):
            own = {block: result for (size, block), result in results.items() if size == side}
            # Error bars: of the difference to the plain model.
            errors = [common.spread(result, bench.plain) for result in own.values()]
            axis.errorbar(
                list(own), [result.miou for result in own.values()], errors,
                fmt="o-", color=color, capsize=3, label=f"{side} x {side} centres",
            )  # fmt: skip
        axis.axhline(bench.plain.miou, color="black", lw=0.8, ls=":", label="plain")
        axis.set(xlabel=label, ylabel="mIoU, %", xticks=list(own))
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def main(flag_values: flags.FlagValues) -> None:
    """Runs the experiment."""
    trained = common.load(flag_values.workdir)
    bench = Bench(trained, common.test_scenes(flag_values.quick))
    by_alpha, by_beta = vary_alpha(bench), vary_beta(bench)
    logits = {f"logits, {side} x {side}": by_alpha[side, ALPHA] for side in SIDES}
    blocks = {f"blocks, {side} x {side}": by_beta[side, DEPTH] for side in SIDES}
    lines = [
        *common.heading("Where to cluster and to reconstruct", "position", trained),
        *common.paragraph(f"Temperature {common.TEMPERATURE:g}."),
        "",
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
        "## What is reconstructed after the last block",
        "",
        *bench.table(logits | blocks, "where, centres"),
    ]
    if not flag_values.quick:
        panels = {"alpha": by_alpha, f"alpha + beta, alpha = {ALPHA}": by_beta}
        common.write("position", lines, plot(bench, panels))


if __name__ == "__main__":
    cli.run(main, FLAGS, required=("workdir",))
