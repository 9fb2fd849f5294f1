"""Settings that are worth trying, and their costs."""

import pytest
from small_hosts import MODELS

from tokenvit_jax.expediting import candidates
from tokenvit_jax.measure.macs import summarize_model


@pytest.mark.parametrize("name", ["vit", "segmenter", "swinv2"])
def test_macs_equal_the_counted_ones(monkeypatch, name):
    monkeypatch.setattr(candidates, "FRACTIONS", (0.6,))
    model, size = MODELS[name], (32, 48)
    found = candidates.list_candidates(model, size)
    settings = [candidate.expedite for candidate in found]
    # (5, 7) of 8 x 12 tokens, (2, 2) of windows of 3 x 3.
    assert {setting.clusters for setting in settings} == {(2, 2) if name == "swinv2" else (5, 7)}
    assert {(setting.alpha, setting.beta) for setting in settings} == {(1, 1), (1, 2), (2, 1)}
    for setting in settings:
        ends = setting.alpha + setting.beta == 3 and name != "swinv2"
        assert setting.where == ("logits" if ends else "blocks")
    plain = summarize_model(model, size, name).macs
    for setting, macs in found:
        expedited = candidates.with_expedite(model, setting)
        assert macs == summarize_model(expedited, size, name).macs / plain
