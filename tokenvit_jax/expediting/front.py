"""Prints and draws the settings that a search tried."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from tokenvit_jax.expediting.insertions import describe
from tokenvit_jax.expediting.rivals import Rival
from tokenvit_jax.expediting.search import Rated, pareto_front


def format_front(rated: Sequence[Rated], chosen: Rated) -> str:
    """Formats settings as a table that marks the chosen one.

    Args:
      rated: one row each, in this order.
      chosen: one of them.
    """
    timed = chosen.latency is not None
    lines = [
        f"{'latency  ' * timed}{'MACs':>5}{'alpha':>7}{'beta':>6}{'clusters':>10}"
        f"{'reconstructs':>14}{'similarity':>12}"
    ]
    for row in rated:
        expedite, clusters = row.expedite, "x".join(map(str, row.expedite.clusters))
        lines.append(
            (f"{row.latency:7.3f}  " if timed else "")
            + f"{row.macs:5.3f}{expedite.alpha:7}{expedite.beta:6}{clusters:>10}"
            f"{expedite.where:>14}{row.similarity:12.4f}" + "  <- chosen" * (row == chosen)
        )
    return "\n".join(lines)


def format_rivals(rivals: Sequence[Rival], chosen: Rated) -> str:
    """Formats rivals below the chosen setting, and names the better ones in the last line.

    Args:
      rivals: result of :func:`tokenvit_jax.expediting.rivals.rate_rivals`.
      chosen: the setting that they are compared with.
    """
    own = Rival("expedite", describe(chosen.expedite), chosen.macs, chosen.similarity)
    lines = [f"{'MACs':>5}{'similarity':>12}  method"]
    for row in (own, *rivals):
        lines.append(f"{row.macs:5.3f}{row.similarity:12.4f}  {row.name}: {row.setting}")
    better = sorted(
        (row for row in rivals if row.similarity > chosen.similarity),
        key=lambda row: -row.similarity,
    )
    named = ", ".join(f"{row.name} ({row.similarity:.4f})" for row in better)
    own = f"expedite ({chosen.similarity:.4f})"
    lines.append(f"better than {own} at no higher cost: {named or 'none of these'}")
    return "\n".join(lines)


def plot_front(rated: Sequence[Rated], chosen: Rated, budget: float) -> Figure:
    """Draws similarity over cost: all settings, their front, the budget and the choice.

    Args:
      rated: settings that were tried.
      chosen: one of them.
      budget: fraction of the plain model's cost.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    points = [(candidate.cost, candidate.similarity) for candidate in rated]
    best = [(candidate.cost, candidate.similarity) for candidate in pareto_front(rated)]
    axis.plot(*zip(*points, strict=True), "o", color="0.75", markersize=4, label="tried")
    axis.plot(*zip(*best, strict=True), "o-", color="#0072B2", markersize=4, label="front")
    label = describe(chosen.expedite)
    axis.plot(chosen.cost, chosen.similarity, "*", color="#D55E00", markersize=14, label=label)
    axis.axvline(budget, color="0.3", linestyle="--", linewidth=1, label="budget")
    cost = "MACs" if chosen.latency is None else "latency"
    axis.set(
        xlabel=f"{cost}, fraction of the plain model's", ylabel="cosine similarity of features"
    )
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    return figure
