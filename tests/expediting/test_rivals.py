"""Other methods at the cost of a setting of Expedite."""

import functools

import jax
import numpy as np
import pytest
import tiny_masks
from random_variables import random_variables
from small_hosts import MODELS, images_of

from tokenvit_jax.expediting import rivals
from tokenvit_jax.expediting.candidates import Candidate, macs_of, with_expedite
from tokenvit_jax.expediting.front import format_rivals
from tokenvit_jax.expediting.search import Rated
from tokenvit_jax.expediting.similarity import Comparison
from tokenvit_jax.models.expedite import Expedite
from tokenvit_jax.tasks import create_task

SIZE = (48, 40)


@pytest.mark.slow
def test_rivals_cost_at_most_as_much(monkeypatch):
    assert rivals.REDUCERS == ("tome", "weighted_kmedoids", "act")
    monkeypatch.setattr(rivals, "REDUCERS", ("tome",))
    model = MODELS["vit"].clone(depth=2)
    setting = Expedite(1, 1, (6, 5))
    plain = macs_of(model, SIZE)
    chosen = Candidate(setting, macs_of(with_expedite(model, setting), SIZE) / plain)
    variables = random_variables(model, images_of(SIZE))
    images = np.random.default_rng(1).standard_normal((1, *SIZE, 3), np.float32)
    compare = Comparison(model, variables, images)
    found = rivals.rate_rivals(model, variables, images, chosen, compare.of_features)
    names = ["smaller image", "adaptive pooling", "tome, carry"]
    assert [row.name for row in found] == names
    for row in found:
        assert chosen.macs - 0.25 < row.macs <= chosen.macs
        assert 0 < row.similarity < 0.999

    pooled = Expedite(1, 1, (6, 5), iterations=0, mode="bilinear")
    assert found[1].similarity == pytest.approx(compare(pooled), abs=1e-5)
    height, width = map(int, found[0].setting.split()[0].split("x"))
    assert found[0].macs == macs_of(model, (height, width)) / plain
    resized = jax.image.resize(images, (1, height, width, 3), "bilinear")
    features = functools.partial(model.apply, train=False, method="features")
    (y,) = jax.jit(features)(variables, resized)
    y = jax.image.resize(y, (1, 12, 10, y.shape[-1]), "bilinear")
    assert found[0].similarity == pytest.approx(compare.of_features(y), abs=1e-5)


def test_act_has_equally_many_prototypes_in_every_block(monkeypatch):
    kept = lambda model, *_: sum(model.settings.token_reducer.keep)  # noqa: E731
    monkeypatch.setattr(rivals, "macs_of", kept)
    model = MODELS["vit"].clone(depth=2)
    assert rivals.reduced_tokens(model, SIZE, "act", 11) == (5, 5)
    assert rivals.reduced_tokens(model, SIZE, "act", 1) is None
    assert not rivals.best_reducer("act", (5, 5))["carry"]


@pytest.mark.slow
def test_rivals_of_a_swin():
    model = MODELS["swin"]
    assert not rivals.allows_reducers(model)
    height, width = rivals.smaller_image(model, (64, 96), 0.7 * macs_of(model, (64, 96)))
    assert height % 8 == width % 8 == 0 and 32 <= height < 64 and 32 <= width < 96
    assert rivals.smaller_image(model, (64, 96), 1) is None


def test_the_first_option_within_the_budget_is_found():
    for length in range(5):
        options = [10 * cost for cost in range(length, 0, -1)]
        found = rivals.largest_within(options, 25, lambda cost: cost)
        assert found == max((cost for cost in options if cost <= 25), default=None)


def test_tokens_fall_linearly_and_at_most_by_half():
    assert rivals.linear_keep(100, 4, 60) == (90, 80, 70, 60)
    assert rivals.linear_keep(100, 3, 1) == (67, 34, 17)
    assert rivals.linear_keep(5, 3, 1) == (4, 2, 1)


def test_better_rivals_are_named():
    chosen = Rated(Expedite(1, 2, (3, 3), temperature=0.5), 0.6, 0.9)
    rows = [
        rivals.Rival("a", "1x1 pixels", 0.59, 0.8),
        rivals.Rival("b", "--keep=1", 0.6, 0.95),
        rivals.Rival("c", "--keep=2", 0.6, 0.97),
    ]
    lines = format_rivals(rows, chosen).splitlines()
    assert lines[1].split() == ["0.600", "0.9000", "expedite:", "1,2,3x3,temperature=0.5"]
    assert lines[-1] == ("better than expedite (0.9000) at no higher cost: c (0.9700), b (0.9500)")
    assert format_rivals(rows[:1], chosen).endswith("at no higher cost: none of these")


@pytest.mark.slow
def test_a_smaller_image_for_masks_has_whole_cells_of_the_coarsest_map():
    model = create_task(tiny_masks.get_config()).make_model()
    macs = {size: macs_of(model, size) for size in ((64, 96), (64, 64), (32, 96))}
    assert rivals.smaller_image(model, (64, 96), macs[64, 64]) == (64, 64)
    assert rivals.smaller_image(model, (64, 96), macs[64, 64] - 1) in ((32, 96), (32, 64))
