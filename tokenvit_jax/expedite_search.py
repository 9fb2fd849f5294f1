"""Which tokens to cluster where, for a budget: candidates, how good they are, and the search.

MACs are known beforehand, as they are linear in the number of blocks on centres. More centres make
features more similar, so that for given blocks only the largest map of centres within the budget is
of interest. Of a deep host every second to fourth block comes first, and then the neighbours of the
best until none is better. A few settings are added that do not depend on the budget, for an
overview. The temperature is chosen before, for a setting in the middle. A budget of latency is
searched as several budgets of multiply-adds, and the best of each is timed.
"""

import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tokenvit_jax.benchmark import compile_program, time_in_turns
from tokenvit_jax.errors import UserError
from tokenvit_jax.models import swin, vit
from tokenvit_jax.models.backbone import backbone_of, variable_shapes
from tokenvit_jax.models.expedite import Expedite
from tokenvit_jax.summary import count_macs

# Sides of the maps of centres, as parts of those of the map of tokens.
FRACTIONS = np.linspace(0.3, 0.95, 8)
# Blocks in whose number a search is coarse at first: at most this part of all.
COARSE = 8
# What squared distances of features are divided by, whose scale differs from model to model.
# Those farther from the paper's come later.
TEMPERATURES = (50.0, 20.0, 200.0, 5.0, 2.0, 0.5)
# By how much features have to be more similar for another temperature than the paper's: on scenes a
# gain of 0.003 came with a loss of mIoU (experiments/expedite/settings.md).
CLEARLY = 0.01
# Parts of a budget of latency that are searched as budgets of MACs: clustering takes more time than
# its MACs tell, and attention, which it makes short, does, too.
PLAUSIBLE = (1.1, 1.0, 0.9, 0.8, 0.7)
SECONDS = 2.0  # to spend on timing each of them


class Candidate(NamedTuple):
    """A setting and its MACs, as a part of those of the plain model."""

    expedite: Expedite
    macs: float


class Rated(NamedTuple):
    """A candidate that was tried out.

    expedite: the setting. macs: its MACs, as a part of those of the plain model. similarity: of its
    features to those of the plain model, at most 1. latency: as a part, too; None: not measured.
    """

    expedite: Expedite
    macs: float
    similarity: float
    latency: float | None = None

    @property
    def cost(self) -> float:
        """The latency where it was measured, else the MACs."""
        return self.macs if self.latency is None else self.latency


def describe(expedite: Expedite) -> str:
    """Returns a setting as --expedite of other commands takes it: 10,14,28x28,logits."""
    text = f"{expedite.alpha},{expedite.beta},{'x'.join(map(str, expedite.clusters))}"
    text += ",logits" * (expedite.where == "logits")
    if expedite.temperature != Expedite.temperature:
        text += f",temperature={expedite.temperature:g}"
    return text


# ------------------------------------------------------------------------------------------------
# Candidates
# ------------------------------------------------------------------------------------------------


class Host(NamedTuple):
    """What of a backbone can be expedited.

    first: blocks before those that can be. depth: number of these. grids: maps of centres (h, w),
    smallest first. ends: whether what runs to the last of them reconstructs "logits", not "blocks".
    """

    first: int
    depth: int
    grids: list[tuple[int, int]]
    ends: bool


def with_expedite(model: nn.Module, expedite: Expedite | None) -> nn.Module:
    """Returns a model whose host is expedited so."""
    backbone = backbone_of(model).clone(expedite=expedite)
    return backbone if model is backbone_of(model) else model.clone(backbone=backbone)


def describe_host(backbone: nn.Module, image_size: tuple[int, int]) -> Host:
    """Returns what of a backbone can be expedited for images of a size.

    Args:
      backbone: of :func:`backbone_of`.
      image_size: height and width, pixels.

    Raises:
      UserError: it has no map of tokens that is clustered, its tokens are reduced already, or there
        are too few of them or of blocks.
    """
    name, settings = type(backbone).__name__, getattr(backbone, "settings", None)
    if not isinstance(backbone, vit.VisionTransformer | swin.Swin):
        raise UserError(f"{name} has no blocks on centres; valid: deit, vit, swin and swinv2")
    for setting in ("token_reducer", "expedite"):
        if getattr(settings, setting, None) is not None:
            raise UserError(
                f"config.model_overrides.{setting}={getattr(settings, setting)} reduces the tokens "
                "already; valid: the run of a plain model"
            )
    if isinstance(backbone, swin.Swin):
        stage = settings.expedited_stage
        first, depth = sum(settings.depths[:stage]), settings.depths[stage]
        grid = tuple(-(-size // backbone.strides[stage]) for size in image_size)
        window, _ = swin.windows_of(grid, settings.window_size, False)
        host = Host(first, depth, [(side, side) for side in range(2, min(window))], ends=False)
    else:
        grid = settings.grid(*image_size)
        grids = {tuple(max(1, round(part * size)) for size in grid) for part in FRACTIONS}
        host = Host(0, settings.depth, sorted(grids - {grid}), ends=True)
    if host.depth < 2 or not host.grids:
        raise UserError(
            f"{name} with {host.depth} blocks on a map of {grid[0]} x {grid[1]} tokens, or on "
            "windows of it, has nothing to expedite; valid: at least 2 blocks, larger images"
        )
    return host


def list_candidates(model: nn.Module, image_size: tuple[int, int]) -> list[Candidate]:
    """Returns all settings that are worth trying for a model, with their MACs.

    Clustering begins after any block. A plain host reconstructs what its head gives where centres
    go on to its last block, as the published Segmenter does, and else blocks; the maps of centres
    have about 0.3 to 0.95 of the rows and columns of that of tokens. In a Swin Transformer, windows
    have any number of centres; its later stages need all tokens.

    MACs are linear in the number of blocks on centres: few settings are counted.

    Args:
      model: classifier or segmentation model.
      image_size: height and width, pixels.

    Raises:
      UserError: the model cannot be expedited, see :func:`describe_host`.
    """
    host = describe_host(backbone_of(model), image_size)
    images = jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32)
    variables = variable_shapes(model, images)

    @functools.cache
    def count(expedite):
        expedited = with_expedite(model, expedite)
        return count_macs(lambda *args: expedited.apply(*args, False), variables, images)

    plain, found = count(None), []
    for clusters in host.grids:
        by_where = _settings_by_beta(host, clusters)
        # What a block adds does not depend on what is reconstructed.
        widest = max(by_where, key=len)
        few, many = min(widest), max(widest)
        added = (count(widest[many][0]) - count(widest[few][0])) // max(many - few, 1)
        for settings in by_where:
            first = min(settings)
            base = count(settings[first][0])
            for beta, expedites in settings.items():
                macs = (base + (beta - first) * added) / plain
                found += [Candidate(expedite, macs) for expedite in expedites]
    return found


def _settings_by_beta(host, clusters):
    """Settings of one map, those with the same `where` by their number of blocks on centres."""
    by_beta = {"blocks": {}, "logits": {}}
    for alpha in range(1, host.depth):
        for beta in range(1, host.depth - alpha + 1):
            where = "logits" if host.ends and alpha + beta == host.depth else "blocks"
            expedite = Expedite(alpha, beta, clusters, where)
            by_beta[where].setdefault(beta, []).append(expedite)
    return [settings for settings in by_beta.values() if settings]


# ------------------------------------------------------------------------------------------------
# Search
# ------------------------------------------------------------------------------------------------


def tune_temperature(
    candidates: Sequence[Candidate], budget: float, similarity_of: Callable[[Expedite], float]
) -> list[Candidate]:
    """Returns all candidates with the paper's temperature, or one that is clearly better.

    Of the temperatures at which features are nearly as similar as they can be, the one nearest to
    the paper's is taken. The setting that is compared is in the middle of those that come close to
    the budget.

    Args:
      candidates: of :func:`list_candidates`.
      budget: part of the cost of the plain model.
      similarity_of: such as :class:`Comparison`.
    """
    near = sorted(candidates, key=lambda candidate: abs(candidate.macs - budget))[:COARSE]
    middle = sorted(near, key=lambda candidate: candidate.expedite.alpha)[len(near) // 2].expedite
    found = {t: similarity_of(dataclasses.replace(middle, temperature=t)) for t in TEMPERATURES}
    least = max(found.values()) - CLEARLY
    chosen = next(temperature for temperature in TEMPERATURES if found[temperature] >= least)
    return [
        c._replace(expedite=dataclasses.replace(c.expedite, temperature=chosen)) for c in candidates
    ]


def search(
    candidates: Sequence[Candidate], budget: float, similarity_of: Callable[[Expedite], float]
) -> list[Rated]:
    """Tries out the candidates that may be the most similar within a budget, and a few others.

    Args:
      candidates: of :func:`list_candidates`.
      budget: part of the MACs of the plain model.
      similarity_of: such as :class:`Comparison`.

    Returns:
      What was tried, no setting twice; :func:`choose` picks the best.

    Raises:
      UserError: nothing is within the budget.
    """
    affordable = [candidate for candidate in candidates if candidate.macs <= budget]
    if not affordable:
        least = min(candidates, key=lambda candidate: candidate.macs)
        raise UserError(
            f"--budget={budget} cannot be reached; the nearest that can is {_up(least.macs)}, with "
            f"{describe(least.expedite)}"
        )
    # By the blocks on all tokens before and after the centres: the most centres.
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
    """Every second map of centres, which go on to the last block, from two places on."""
    alphas = {max(1, depth // 4), max(1, depth // 2)}
    ends = [c for c in candidates if c.expedite.alpha + c.expedite.beta == depth]
    grids = sorted({candidate.expedite.clusters for candidate in candidates})[::2]
    return [c for c in ends if c.expedite.alpha in alphas and c.expedite.clusters in grids]


def _rate(candidates, similarity_of, rated):
    """Adds what is not there yet, in an order in which :class:`Comparison` computes little."""
    for expedite, macs in sorted(
        candidates, key=lambda c: (c.expedite.alpha, c.expedite.clusters, c.expedite.beta)
    ):
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
    """Times the candidates that are most similar within budgets of MACs near that of latency.

    The model takes turns with them; latencies are medians.

    Args:
      candidates: of :func:`list_candidates`.
      budget: part of the time of the plain model.
      similarity_of: such as :class:`Comparison`.
      model: classifier or segmentation model.
      variables: of it.
      images: (B, H, W, 3), normalised; what is timed.

    Returns:
      What was timed.

    Raises:
      UserError: no candidate has so few MACs.
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
    """Returns the most similar of those within a budget; of equal ones the cheapest.

    Args:
      rated: what was tried.
      budget: highest `Rated.cost`.
      of: what that is of, for the message.

    Raises:
      UserError: none is within the budget.
    """
    rated = list(rated)
    within = [candidate for candidate in rated if candidate.cost <= budget]
    if not within:
        least = min(rated, key=lambda candidate: candidate.cost)
        raise UserError(
            f"--budget={budget} with --of={of} was not reached; the nearest that can be is "
            f"{_up(least.cost)}, with {describe(least.expedite)}"
        )
    return max(within, key=lambda candidate: (candidate.similarity, -candidate.cost))


def front(rated: Iterable[Rated]) -> list[Rated]:
    """Returns those of which no other is as cheap and as similar, cheapest first."""
    found = []
    for candidate in sorted(rated, key=lambda candidate: (candidate.cost, -candidate.similarity)):
        if not found or candidate.similarity > found[-1].similarity:
            found.append(candidate)
    return found


def _up(cost):
    """Rounded so that it is a budget that can be reached."""
    return math.ceil(cost * 1000) / 1000
