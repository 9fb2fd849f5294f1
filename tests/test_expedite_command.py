"""The choice of clustering for a budget: what it costs, how similar it is, what is written."""

import copy
import functools
import itertools
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags as flag_values
from PIL import Image
from random_variables import random_variables

from tokenvit_jax import cli, expedite, expedite_search, expedite_similarity, insertion_flags
from tokenvit_jax.benchmark import Program
from tokenvit_jax.config import default_config
from tokenvit_jax.errors import UserError
from tokenvit_jax.evaluate import evaluate
from tokenvit_jax.expedite_search import Candidate, Rated
from tokenvit_jax.heads import MaskTransformer
from tokenvit_jax.models.expedite import Expedite
from tokenvit_jax.models.swin import Swin, SwinSettings, SwinV2, SwinV2Settings
from tokenvit_jax.models.vit import VisionTransformer, ViTSettings
from tokenvit_jax.summary import summarize_model
from tokenvit_jax.tasks import classification
from tokenvit_jax.tasks.segmentation import Segmenter
from tokenvit_jax.training.new_run import write_run
from tokenvit_jax.training.workdir import read_config, write_config

SETTINGS = {"dim": 16, "depth": 3, "num_heads": 2, "patch_size": 4, "position_size": (32, 32)}
VIT = VisionTransformer(ViTSettings(num_classes=10, **SETTINGS, init_std=0.3))
SWIN = {"num_classes": 5, "dims": (8, 12), "num_heads": (2, 3), "depths": (1, 3)}
MODELS = {
    "vit": VIT,
    "segmenter": Segmenter(VIT, MaskTransformer(num_classes=5, depth=1, head_dim=8)),
    "swin": Swin(SwinSettings(**SWIN, window_size=3)),
    "swinv2": SwinV2(SwinV2Settings(**SWIN, window_size=3, pretrained_window_sizes=(3, 3))),
}


def images_of(size):
    return jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)


def tiny_config(**entries):
    config = default_config()
    config.model, config.model_overrides = "deit_ti", dict(SETTINGS)
    config.image_size = 32
    config.data.eval_batch_size = 120
    config.update(entries)
    return config


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command; returns its status, what it printed, and its errors."""

    def run_command(**flags):
        argv = ["expedite", *(f"--{name}={value}" for name, value in flags.items())]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as exit_info:
            cli.run(expedite.main, copy.deepcopy(expedite.FLAGS), required=("workdir", "budget"))
        output = capsys.readouterr()
        return exit_info.value.code, output.out, output.err

    return run_command


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


def test_a_run_is_written_that_is_evaluated_as_with_the_setting_by_hand(run, tmp_path, monkeypatch):
    monkeypatch.setattr(expedite_search, "FRACTIONS", (0.4, 0.7))
    config = tiny_config()
    config.data.normalization = "inception"
    config.ema_decay = 0.9
    variables = random_variables(classification.make_model(config, 10), images_of((32, 32)))
    plain, faster, plot = tmp_path / "plain", tmp_path / "faster", tmp_path / "front.png"
    write_run(plain, config, variables)

    flags = {"workdir": plain, "out": faster, "plot": plot, "budget": 0.75, "num_images": 3}
    status, printed, err = run(**flags)
    assert (status, err) == (0, "")
    assert plot.read_bytes().startswith(b"\x89PNG")
    header, *rows = printed.splitlines()[1:-1]
    assert header.split() == ["MACs", "alpha", "beta", "clusters", "reconstructs", "similarity"]
    rows = [row.split() for row in rows]
    costs, similarities = ([float(row[i]) for row in rows] for i in (0, 5))
    assert costs == sorted(costs) and similarities == sorted(similarities)
    assert rows[[cost <= 0.75 for cost in costs].count(True) - 1][6:] == ["<-", "chosen"]
    (chosen,) = [row for row in rows if row[6:]]

    found = read_config(faster)
    assert found.dataset == "digits" and found.data.normalization == "inception"
    setting = found.model_overrides.expedite
    rows_and_columns = "x".join(map(str, setting.clusters))
    written = [str(setting.alpha), str(setting.beta), rows_and_columns, setting.where]
    assert chosen[1:5] == written

    by_hand = config.copy_and_resolve_references()
    by_hand.model_overrides = {**SETTINGS, "expedite": setting.to_dict()}
    assert evaluate(found, faster) == evaluate(by_hand, plain)


@pytest.mark.parametrize(
    ("entries", "flags", "message"),
    [
        ({}, {"budget": 1.5}, "--budget=1.5 is not valid; valid: between 0 and 1"),
        ({}, {"budget": "nan"}, "--budget=nan is not valid; valid: between 0 and 1"),
        ({}, {"images": "none.jpg"}, "--images: none.jpg: No such file or directory"),
        ({}, {"images": ""}, "--images names no file"),
        (
            {"model": "dgt_t", "model_overrides": {}},
            {},
            "DGT has no blocks on centres; valid: deit",
        ),
        (
            {"model_overrides": {**SETTINGS, "token_reducer": {"keep": (9, 8, 7)}}},
            {},
            "config.model_overrides.token_reducer=",
        ),
        (
            {"model_overrides": {**SETTINGS, "expedite": Expedite(1, 2, (3, 3)).__dict__}},
            {},
            "config.model_overrides.expedite=",
        ),
        ({"model_overrides": {**SETTINGS, "depth": 1}}, {}, "at least 2 blocks"),
    ],
)
def test_mistakes_are_named(run, tmp_path, monkeypatch, entries, flags, message):
    monkeypatch.setattr(expedite_search, "FRACTIONS", (0.5,))
    config = tiny_config()
    config.update({key: value for key, value in entries.items() if key == "model"})
    config.model_overrides = entries.get("model_overrides", SETTINGS)
    write_config(tmp_path, config)
    status, printed, err = run(**{"workdir": tmp_path, "budget": 0.5} | flags)
    assert (status, printed, len(err.splitlines())) == (1, "", 1)
    assert message in err


def test_a_run_is_not_overwritten(run, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    status, _, err = run(workdir=tmp_path, budget=0.5, out=tmp_path)
    assert status == 1 and "holds checkpoints already" in err


# ------------------------------------------------------------------------------------------------
# Candidates and similarity
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "segmenter", "swinv2"])
def test_macs_are_those_that_are_counted(monkeypatch, name):
    monkeypatch.setattr(expedite_search, "FRACTIONS", (0.6,))
    model, size = MODELS[name], (32, 48)
    candidates = expedite_search.list_candidates(model, size)
    settings = [candidate.expedite for candidate in candidates]
    # (5, 7) of 8 x 12 tokens, (2, 2) of windows of 3 x 3.
    assert {setting.clusters for setting in settings} == {(2, 2) if name == "swinv2" else (5, 7)}
    assert {(setting.alpha, setting.beta) for setting in settings} == {(1, 1), (1, 2), (2, 1)}
    for setting in settings:
        ends = setting.alpha + setting.beta == 3 and name != "swinv2"
        assert setting.where == ("logits" if ends else "blocks")
    plain = summarize_model(model, size, name).macs
    for setting, macs in candidates:
        expedited = expedite_search.with_expedite(model, setting)
        assert macs == summarize_model(expedited, size, name).macs / plain


@pytest.mark.parametrize("name", ["segmenter", "swin"])
def test_similarity_is_the_mean_cosine_of_features(name):
    """Of settings in an order in which much of the one before is of use, also where it is not."""
    model, size = MODELS[name], (32, 40)
    backbone = expedite_search.backbone_of(model)
    variables = random_variables(model, images_of(size))
    images = np.random.default_rng(1).standard_normal((2, *size, 3), np.float32)
    params = variables["params"].get("backbone", variables["params"])

    def features(setting):
        host = backbone.clone(expedite=setting)
        apply = jax.jit(functools.partial(host.apply, train=False, method="features"))
        return np.asarray(apply({"params": params}, images)[-1], np.float64)

    plain = features(None)
    settings = [Expedite(1, 1, (2, 2)), Expedite(1, 2, (2, 2)), Expedite(2, 1, (2, 2))]
    if name == "segmenter":
        settings[1] = Expedite(1, 2, (2, 2), "logits")
        settings.append(Expedite(1, 2, (2, 2), temperature=5.0))
    compare = expedite_similarity.Comparison(model, variables, images)
    found = [compare(setting) for setting in settings]
    for setting, value in zip(settings, found, strict=True):
        y = features(setting)
        cosines = (y * plain).sum(-1) / np.linalg.norm(y, axis=-1) / np.linalg.norm(plain, axis=-1)
        assert value == pytest.approx(cosines.mean(), abs=3e-6)
    assert max(found) < 0.999 and min(np.diff(sorted(found))) > 1e-5
    assert expedite_similarity.similarity(model, variables, images, settings[0]) == found[0]


# ------------------------------------------------------------------------------------------------
# Search
# ------------------------------------------------------------------------------------------------

DEPTH = 24


def deep_candidates():
    """Those of a host of 24 blocks, as if a centre cost what a token does."""
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
    rated = expedite_search.search(candidates, budget, smooth_similarity)
    assert len({row.expedite for row in rated}) == len(rated) < 0.05 * len(candidates)
    chosen = expedite_search.choose(rated, budget)
    assert chosen.macs <= budget
    within = [row for row in rated if row.macs <= budget]
    assert chosen.similarity == max(row.similarity for row in within)
    front = expedite_search.front(rated)
    assert chosen in front
    for row in rated:
        assert any(f.macs <= row.macs and f.similarity >= row.similarity for f in front)
    best = max(smooth_similarity(c.expedite) for c in candidates if c.macs <= budget)
    assert chosen.similarity > best - 0.005


@pytest.mark.parametrize(("steepness", "chosen"), [(1.0, 5.0), (0.003, 50.0)])
def test_the_temperature_is_that_of_the_features(steepness, chosen):
    candidates, tried = deep_candidates(), []

    def similarity(setting):
        tried.append(setting)
        return smooth_similarity(setting) - steepness * abs(np.log(setting.temperature / 6.0))

    tuned = expedite_search.tune_temperature(candidates, 0.66, similarity)
    assert {candidate.expedite.temperature for candidate in tuned} == {chosen}
    assert [c.macs for c in tuned] == [c.macs for c in candidates]
    assert len(tried) == len(expedite_search.TEMPERATURES)
    assert len({(s.alpha, s.beta, s.clusters) for s in tried}) == 1


def test_the_nearest_budget_is_named():
    candidates = deep_candidates()
    with pytest.raises(UserError, match=r"--budget=0\.1 cannot be reached") as error:
        expedite_search.search(candidates, 0.1, smooth_similarity)
    nearest, setting = re.search(r"that can is ([\d.]+), with (\S+)", str(error.value)).groups()
    assert setting == "1,23,12x12"
    rated = expedite_search.search(candidates, float(nearest), smooth_similarity)
    assert expedite_search.choose(rated, float(nearest)).expedite == Expedite(1, 23, (12, 12))


def test_latency_is_measured_of_the_most_similar(monkeypatch):
    """As if clustering took a tenth of the time of the plain model."""
    candidates = {c.expedite: c.macs for c in deep_candidates()}

    def time_in_turns(calls, seconds):
        assert seconds and next(iter(calls)) is None
        return {setting: [9.0, candidates.get(setting, 0.9) + 0.1, 0.0] for setting in calls}

    monkeypatch.setattr(expedite_search, "time_in_turns", time_in_turns)
    program = Program(lambda *_: None, None, None, None)
    monkeypatch.setattr(expedite_search, "compile_program", lambda *_: program)
    search = functools.partial(expedite_search.search_latency, deep_candidates())
    given = (smooth_similarity, VIT.clone(depth=DEPTH), {}, np.zeros((1, 32, 32, 3)))
    rated = search(0.6, *given)
    assert 2 <= len(rated) <= 5
    for row in rated:
        assert row.cost == row.latency == pytest.approx(row.macs + 0.1)
    chosen = expedite_search.choose(rated, 0.6, "latency")
    assert chosen.latency <= 0.6 < max(row.latency for row in rated)
    text = expedite.format_front(expedite_search.front(rated), chosen)
    assert text.splitlines()[0].split()[:2] == ["latency", "MACs"]
    with pytest.raises(
        UserError, match=r"--budget=0\.14 with --of=latency was not reached; the near"
    ):
        expedite_search.choose(search(0.14, *given), 0.14, "latency")


def test_equally_similar_settings_are_not_chosen_for_their_cost():
    rated = [Rated(None, 0.5, 0.9), Rated(None, 0.4, 0.9), Rated(None, 0.3, 0.8)]
    assert expedite_search.choose(rated, 0.6) == rated[1]
    assert expedite_search.front(rated) == [rated[2], rated[1]]


# ------------------------------------------------------------------------------------------------
# Images
# ------------------------------------------------------------------------------------------------


def test_images_are_windows_of_the_middle(monkeypatch):
    pixels = np.random.default_rng(0).integers(256, size=(2, 3, 40, 60, 3), dtype=np.uint8)
    sizes = np.array([(36, 60), (40, 48), (40, 60)])
    batches = [{"image": x, "image_size": sizes, "mask": np.array([1, 1, 0])} for x in pixels]
    monkeypatch.setattr(expedite, "eval_dataset", lambda config: batches)
    config = tiny_config(dataset="scenes")
    config.inference.window = 32
    config.data.normalization = "inception"
    found = expedite.load_images(config, None, 3)
    wanted = [pixels[0, 0, 2:34, 14:46], pixels[0, 1, 4:36, 8:40], pixels[1, 0, 2:34, 14:46]]
    np.testing.assert_allclose(found, np.stack(wanted) / 127.5 - 1, atol=1e-6)
    assert len(expedite.load_images(config, None, 9)) == 4


def test_images_come_from_files_too(tmp_path):
    pixels = np.random.default_rng(0).integers(256, size=(32, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    config = tiny_config(dataset="scenes")
    config.data.normalization = "inception"
    (found,) = expedite.load_images(config, [tmp_path / "a.png"], 8)
    np.testing.assert_allclose(found, pixels[:, 8:40] / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize(
    "setting",
    [
        Expedite(3, 9, (4, 5), "logits"),
        Expedite(3, 9, (4, 5), temperature=0.5),
        Expedite(3, 9, (4, 5), "logits", temperature=200.0),
    ],
)
def test_settings_are_written_as_other_commands_read_them(setting):
    flags = flag_values.FlagValues()
    insertion_flags.define(flags)
    flags(["evaluate", f"--expedite={expedite_search.describe(setting)}"])
    (found,) = insertion_flags.insertions(flags, "deit_s").values()
    assert Expedite(**found["expedite"]) == setting
    assert json.dumps(found)
