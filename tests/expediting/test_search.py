"""The search for the most similar setting within a budget."""

import dataclasses
import functools
import itertools
import re

import numpy as np
import pytest
from small_hosts import VIT

from tokenvit_jax.errors import UserError
from tokenvit_jax.expediting import search
from tokenvit_jax.expediting.candidates import Candidate
from tokenvit_jax.expediting.front import format_front
from tokenvit_jax.expediting.search import Rated
from tokenvit_jax.measure.timing import Program
from tokenvit_jax.models.expedite import Expedite

DEPTH = 24


def deep_candidates():
    """Returns candidates of a host with 24 blocks in which a centre costs as much as a token."""
    return [
        Candidate(setting, (setting.alpha + gamma + setting.beta * (side / 40) ** 2) / DEPTH)
        for alpha, gamma in itertools.product(range(1, DEPTH), range(DEPTH))
        if alpha + gamma < DEPTH
        for side in (12, 16, 19, 23, 27, 31, 34, 38)
        for setting in [Expedite(alpha, DEPTH - alpha - gamma, (side, side))]
    ]


def smooth_similarity(setting):
    gamma = DEPTH - setting.alpha - setting.beta
    away = abs(setting.alpha - 8) + abs(gamma - 2)
    return 1 - 0.01 * away - (1 - setting.clusters[0] / 40) ** 2 * 0.1


@pytest.mark.parametrize("budget", [0.3, 0.66, 0.9])
def test_the_choice_is_within_the_budget_and_most_similar(budget):
    candidates = deep_candidates()
    rated = search.search(candidates, budget, smooth_similarity)
    assert len({row.expedite for row in rated}) == len(rated) < 0.05 * len(candidates)
    chosen = search.choose(rated, budget)
    assert chosen.macs <= budget
    within = [row for row in rated if row.macs <= budget]
    assert chosen.similarity == max(row.similarity for row in within)
    front = search.pareto_front(rated)
    assert chosen in front
    for row in rated:
        assert any(f.macs <= row.macs and f.similarity >= row.similarity for f in front)
    best = max(smooth_similarity(c.expedite) for c in candidates if c.macs <= budget)
    assert chosen.similarity > best - 0.005


@pytest.mark.parametrize("scale", [0.003, 40.0])
@pytest.mark.parametrize(
    ("steepness", "best", "chosen"), [(1.0, 0.006, 0.005), (1.0, 4.0, 5.0), (0.003, 0.006, 0.05)]
)
def test_temperatures_follow_the_tokens(scale, steepness, best, chosen):
    candidates, tried = deep_candidates(), []

    def distance(alpha):
        return scale * alpha

    def similarity(setting):
        tried.append(setting)
        factor = setting.temperature / distance(setting.alpha)
        return smooth_similarity(setting) - steepness * abs(np.log(factor / best))

    tuned = search.set_temperatures(candidates, 0.66, similarity, distance)
    for before, after in zip(candidates, tuned, strict=True):
        wanted = chosen * distance(after.expedite.alpha)
        assert after.expedite.temperature == pytest.approx(wanted, rel=0.005)
        assert dataclasses.replace(after.expedite, temperature="auto") == before.expedite
        assert after.macs == before.macs
    assert len(tried) == len(search.FACTORS)
    assert len({(s.alpha, s.beta, s.clusters) for s in tried}) == 1


def test_the_nearest_budget_is_named():
    candidates = deep_candidates()
    with pytest.raises(UserError, match=r"--budget=0\.1 cannot be reached") as error:
        search.search(candidates, 0.1, smooth_similarity)
    nearest, setting = re.search(r"that can is ([\d.]+), with (\S+)", str(error.value)).groups()
    assert setting == "1,23,12x12"
    rated = search.search(candidates, float(nearest), smooth_similarity)
    assert search.choose(rated, float(nearest)).expedite == Expedite(1, 23, (12, 12))


def test_the_most_similar_candidates_are_timed(monkeypatch):
    """In this test, clustering takes a tenth of the plain model's time."""
    candidates = {c.expedite: c.macs for c in deep_candidates()}

    def time_in_turns(calls, seconds):
        assert seconds and next(iter(calls)) is None
        return {setting: [9.0, candidates.get(setting, 0.9) + 0.1, 0.0] for setting in calls}

    monkeypatch.setattr(search, "time_in_turns", time_in_turns)
    program = Program(lambda *_: None, None, None, None)
    monkeypatch.setattr(search, "compile_program", lambda *_: program)
    search_latency = functools.partial(search.search_latency, deep_candidates())
    given = (smooth_similarity, VIT.clone(depth=DEPTH), {}, np.zeros((1, 32, 32, 3)))
    rated = search_latency(0.6, *given)
    assert 2 <= len(rated) <= 5
    for row in rated:
        assert row.cost == row.latency == pytest.approx(row.macs + 0.1)
    chosen = search.choose(rated, 0.6, "latency")
    assert chosen.latency <= 0.6 < max(row.latency for row in rated)
    text = format_front(search.pareto_front(rated), chosen)
    assert text.splitlines()[0].split()[:2] == ["latency", "MACs"]
    with pytest.raises(
        UserError, match=r"--budget=0\.14 with --of=latency was not reached; the near"
    ):
        search.choose(search_latency(0.14, *given), 0.14, "latency")


def test_the_cheapest_of_equally_similar_settings_is_chosen():
    rated = [Rated(None, 0.5, 0.9), Rated(None, 0.4, 0.9), Rated(None, 0.3, 0.8)]
    assert search.choose(rated, 0.6) == rated[1]
    assert search.pareto_front(rated) == [rated[2], rated[1]]
