"""Searches for the setting of Expedite within a budget that keeps features most similar.

More centres make features more similar. Therefore, for given blocks, only the largest map of
centres within the budget is tried. In a deep host every second to fourth block is tried first, then
the neighbours of the best setting until none is better. A few settings that do not depend on the
budget are added for an overview. The factor of the temperature is chosen beforehand, for a setting
in the middle. A latency budget is searched as several budgets of multiply-adds (MACs), and the best
setting of each is timed.
"""

import functools
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from tokenvit_jax.errors import UserError
from tokenvit_jax.expediting.candidates import Candidate, with_expedite
from tokenvit_jax.expediting.insertions import describe
from tokenvit_jax.expediting.rivals import Rival, rate_rivals
from tokenvit_jax.expediting.similarity import Comparison, measured
from tokenvit_jax.measure.timing import compile_program, time_in_turns
from tokenvit_jax.models.expedite import FACTOR, Expedite
from tokenvit_jax.progress import progress

# A coarse search tries at most this many positions among the blocks of a host.
COARSE = 8
# Temperatures that are tried, divided by the distance of neighbouring tokens: the default one, then
# the others by their distance from it. They span a factor of 10^4.
FACTORS = (
    FACTOR, 0.02, 0.1, 0.01, 0.2, 0.005, 0.5, 0.002, 1.0, 0.001, 2.0, 0.0005, 5.0,
)  # fmt: skip
# Features must be more similar by this margin to justify another factor than the default one: on
# scenes a gain of 0.003 came with a loss of mIoU (experiments/expedite/settings.md).
CLEARLY = 0.01
# Fractions of a latency budget that are searched as budgets of MACs. Clustering takes more time
# than its MACs suggest, and so does the attention that clustering shortens.
PLAUSIBLE = (1.1, 1.0, 0.9, 0.8, 0.7)
SECONDS = 2.0  # time to spend on each setting that is timed


class Rated(NamedTuple):
    """A candidate that was tried.

    Attributes:
      expedite: the setting.
      macs: its MACs, as a fraction of the plain model's.
      similarity: cosine between its features and the plain model's, at most 1.
      latency: its time, as a fraction of the plain model's; None if it was not measured.
    """

    expedite: Expedite
    macs: float
    similarity: float
    latency: float | None = None

    @property
    def cost(self) -> float:
        """Returns the latency if it was measured, otherwise the MACs."""
        return self.macs if self.latency is None else self.latency


class Found(NamedTuple):
    """Result of a search.

    Attributes:
      rated: the settings that were tried.
      chosen: the most similar one within the budget.
      rivals: other methods at most at the cost of the chosen setting.
    """

    rated: list[Rated]
    chosen: Rated
    rivals: list[Rival]


def check_budget(budget: float) -> None:
    """Raises UserError unless a budget is between 0 and 1."""
    if not 0 < budget < 1:
        raise UserError(f"--budget={budget} is not valid; valid: between 0 and 1")


def search_budget(
    candidates: Sequence[Candidate],
    budget: float,
    of: str,
    model: nn.Module,
    variables: Any,
    images: jax.Array,
) -> Found:
    """Chooses the setting within a budget with the most similar features, and rates its rivals.

    Args:
      candidates: result of :func:`tokenvit_jax.expediting.candidates.list_candidates`.
      budget: fraction of the plain model's cost, between 0 and 1.
      of: "macs" | "latency", the cost that the budget limits; latency is measured on one image.
      model: classifier, segmentation or depth model.
      variables: variables of the model.
      images: images on which features are compared, normalised (B, H, W, 3).

    Raises:
      UserError: no candidate is within the budget.
    """
    similarity_of = Comparison(model, variables, images)
    candidates = set_temperatures(candidates, budget, similarity_of, similarity_of.distance)
    if of == "macs":
        rated = search(candidates, budget, similarity_of)
    else:
        rated = search_latency(candidates, budget, similarity_of, model, variables, images[:1])
    chosen = choose(rated, budget, of)
    rivals = rate_rivals(model, variables, images, chosen, similarity_of.of_features)
    return Found(rated, chosen, rivals)


def set_temperatures(
    candidates: Sequence[Candidate],
    budget: float,
    similarity_of: Callable[[Expedite], float],
    distance_of: Callable[[int], float],
) -> list[Candidate]:
    """Returns all candidates with temperatures that follow the scale of their tokens.

    A temperature is a factor times the distance of neighbouring tokens after `alpha` blocks. The
    factor is the nearest to the default one among all of `FACTORS` whose similarity is within
    `CLEARLY` of the best. Factors are compared for one setting: the median by `alpha` of the
    candidates closest to the budget.

    Args:
      candidates: result of :func:`tokenvit_jax.expediting.candidates.list_candidates`.
      budget: fraction of the plain model's cost.
      similarity_of: function from a setting to its similarity, such as :class:`Comparison`.
      distance_of: function from `alpha` to a distance, such as :meth:`Comparison.distance`.
    """
    near = sorted(candidates, key=lambda candidate: abs(candidate.macs - budget))[:COARSE]
    middle = sorted(near, key=lambda candidate: candidate.expedite.alpha)[len(near) // 2].expedite
    distance_of = functools.cache(distance_of)
    found = {
        factor: similarity_of(measured(middle, distance_of(middle.alpha), factor))
        for factor in progress(FACTORS, "trying temperatures", "temperature")
    }
    least = max(found.values()) - CLEARLY
    factor = next(factor for factor in FACTORS if found[factor] >= least)
    return [
        candidate._replace(
            expedite=measured(candidate.expedite, distance_of(candidate.expedite.alpha), factor)
        )
        for candidate in candidates
    ]


def search(
    candidates: Sequence[Candidate], budget: float, similarity_of: Callable[[Expedite], float]
) -> list[Rated]:
    """Tries the candidates that may be the most similar within a budget, and a few others.

    Args:
      candidates: result of :func:`tokenvit_jax.expediting.candidates.list_candidates`.
      budget: fraction of the plain model's MACs.
      similarity_of: function from a setting to its similarity, such as :class:`Comparison`.

    Returns:
      The settings that were tried, each once; :func:`choose` picks the best.

    Raises:
      UserError: no candidate is within the budget.
    """
    affordable = [candidate for candidate in candidates if candidate.macs <= budget]
    if not affordable:
        least = min(candidates, key=lambda candidate: candidate.macs)
        raise UserError(
            f"--budget={budget} cannot be reached; the nearest that can is "
            f"{_round_up(least.macs)}, with {describe(least.expedite)}"
        )
    # (blocks on all tokens before the centres, and after) -> the candidate with the most centres.
    depth = max(candidate.expedite.alpha + candidate.expedite.beta for candidate in candidates)
    most = {}
    for candidate in sorted(affordable, key=lambda candidate: candidate.macs):
        expedite = candidate.expedite
        most[expedite.alpha, depth - expedite.alpha - expedite.beta] = candidate

    stride = max(1, depth // COARSE)
    wanted = [most[place] for place in most if (place[0] - 1) % stride == place[1] % stride == 0]
    wanted, rated = (wanted or list(most.values())) + _overview(candidates, depth), {}
    while True:
        _rate(wanted, similarity_of, rated)
        best = choose(rated.values(), budget).expedite
        at = best.alpha, depth - best.alpha - best.beta
        steps = itertools.product((-stride, 0, stride), repeat=2)
        places = [(at[0] + before, at[1] + after) for before, after in steps]
        wanted = [most[place] for place in places if place in most]
        if all(candidate.expedite in rated for candidate in wanted):
            if stride == 1:
                return list(rated.values())
            stride //= 2


def _overview(candidates, depth):
    """Returns settings that cluster from 1/4 or 1/2 of the depth to the end, every second map."""
    alphas = {max(1, depth // 4), max(1, depth // 2)}
    ends = [c for c in candidates if c.expedite.alpha + c.expedite.beta == depth]
    grids = sorted({candidate.expedite.clusters for candidate in candidates})[::2]
    return [c for c in ends if c.expedite.alpha in alphas and c.expedite.clusters in grids]


def _rate(candidates, similarity_of, rated):
    """Rates new candidates, in the order that costs :class:`Comparison` the least computation."""
    candidates = sorted(
        candidates, key=lambda c: (c.expedite.alpha, c.expedite.clusters, c.expedite.beta)
    )
    for expedite, macs in progress(candidates, "trying settings", "setting"):
        if expedite not in rated:
            rated[expedite] = Rated(expedite, macs, similarity_of(expedite))


def search_latency(
    candidates: Sequence[Candidate],
    budget: float,
    similarity_of: Callable[[Expedite], float],
    model: nn.Module,
    variables: Any,
    images: jax.Array,
) -> list[Rated]:
    """Times the candidates that are most similar within MACs budgets near a latency budget.

    The plain model and the candidates take turns; latencies are medians.

    Args:
      candidates: result of :func:`tokenvit_jax.expediting.candidates.list_candidates`.
      budget: fraction of the plain model's time.
      similarity_of: function from a setting to its similarity, such as :class:`Comparison`.
      model: classifier, segmentation or depth model.
      variables: variables of the model.
      images: the batch that is timed, normalised (B, H, W, 3).

    Returns:
      The settings that were timed.

    Raises:
      UserError: all candidates have too many MACs.
    """
    least, best = min(candidate.macs for candidate in candidates), {}
    similarity_of = functools.cache(similarity_of)
    for macs in [part * budget for part in PLAUSIBLE if part * budget >= least] or [budget]:
        found = choose(search(candidates, macs, similarity_of), macs)
        best[found.expedite] = found
    variables = jax.device_put(variables)

    def call_of(expedite):
        apply = functools.partial(with_expedite(model, expedite).apply, train=False)
        program = compile_program(apply, variables, images)
        return functools.partial(program.call, variables, images)

    times = time_in_turns(
        {expedite: call_of(expedite) for expedite in (None, *best)}, seconds=SECONDS
    )
    medians = {expedite: statistics.median(seconds) for expedite, seconds in times.items()}
    return [best[e]._replace(latency=medians[e] / medians[None]) for e in best]


def choose(rated: Iterable[Rated], budget: float, of: str = "macs") -> Rated:
    """Returns the most similar setting within a budget; among equals, the cheapest.

    Args:
      rated: settings that were tried.
      budget: highest allowed `Rated.cost`.
      of: "macs" | "latency", the cost that the budget limits, for the message.

    Raises:
      UserError: no setting is within the budget.
    """
    rated = list(rated)
    within = [candidate for candidate in rated if candidate.cost <= budget]
    if not within:
        least = min(rated, key=lambda candidate: candidate.cost)
        raise UserError(
            f"--budget={budget} with --of={of} was not reached; the nearest that can be is "
            f"{_round_up(least.cost)}, with {describe(least.expedite)}"
        )
    return max(within, key=lambda candidate: (candidate.similarity, -candidate.cost))


def pareto_front(rated: Iterable[Rated]) -> list[Rated]:
    """Returns the Pareto front (no other setting is as cheap and as similar), cheapest first."""
    found = []
    for candidate in sorted(rated, key=lambda candidate: (candidate.cost, -candidate.similarity)):
        if not found or candidate.similarity > found[-1].similarity:
            found.append(candidate)
    return found


def _round_up(cost):
    """Rounds a cost up to 3 digits, so that it can be reached as a budget."""
    return math.ceil(cost * 1000) / 1000
