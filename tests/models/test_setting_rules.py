"""Every setting of every model, part and head has a rule, and meaningless values are refused."""

import dataclasses
import random

import jax.numpy as jnp
import numpy as np
import pytest
from random_settings import (
    HEADS,
    OWNERS,
    PARTS,
    PLAUSIBLE,
    SMALL_PARTS,
    Trial,
    draw_trial,
    fields_of,
    meaningless_values,
    run_trial,
    small_settings,
)

import tokenvit_jax as tv
from tokenvit_jax.errors import UserError
from tokenvit_jax.models import model_settings
from tokenvit_jax.models.settings import rules_of

CLASSES = {type(model_settings(name)) for name in tv.list_models()}
FAMILIES = ("vit_ti", "dgt_t", "clustr_t", "pale_t", "swin_t", "swinv2_t")


@pytest.mark.parametrize("cls", [*CLASSES, *PARTS.values(), *HEADS.values()], ids=str)
def test_every_setting_has_a_rule(cls):
    names = {field.name for field in dataclasses.fields(cls)} - {"parent", "name"}
    assert rules_of(cls).keys() == names
    assert names <= PLAUSIBLE.keys() | PARTS.keys() | {"num_heads"}  # random settings try all


@pytest.mark.parametrize("owner", [*FAMILIES, *HEADS])
def test_meaningless_values_are_refused(owner):
    for name in fields_of(owner):
        for value in meaningless_values(owner, name):
            trial = Trial(owner, small_settings(owner) | {name: value}, [name], True)
            assert run_trial(trial) == ("refused", ""), (name, value)


@pytest.mark.parametrize("part", PARTS)
def test_meaningless_values_of_parts_are_refused(part):
    for name in fields_of(part):
        for value in meaningless_values(part, name):
            settings = {part: SMALL_PARTS[part] | {name: value}}
            trial = Trial("vit_ti", small_settings("vit_ti") | settings, [f"{part}.{name}"], True)
            assert run_trial(trial) == ("refused", ""), (name, value)


def test_random_settings():
    """The short form of tests/stress/test_model_settings.py, without tracing."""
    rng = random.Random(0)
    for trial in (draw_trial(rng) for _ in range(100)):
        assert not run_trial(trial, trace=False)[1], trial


@pytest.mark.parametrize("name", [None, "", 3, [], {}, "vit", "vit_ti\n", float("nan")])
def test_names_of_no_model_are_refused(name):
    with pytest.raises(UserError, match=r"^unknown model .*; valid: clustr_b, .*$"):
        tv.create_model(name)


def test_values_of_json_and_numpy_become_plain():
    model = tv.create_model(
        "swin_t", dims=[8, 8, np.int64(8), 8], num_heads=[1] * 4, drop_path=np.float32(0.5),
        remat=np.bool_(True), dtype="bfloat16", expedite={"alpha": 1, "beta": 1, "clusters": [2, 2]}
    )  # fmt: skip
    settings = model.settings
    assert settings.dims == (8, 8, 8, 8) and settings.expedite.clusters == (2, 2)
    assert [type(x) for x in (settings.dims[2], settings.drop_path, settings.remat)] == [
        int, float, bool
    ]  # fmt: skip
    assert settings.dtype == jnp.bfloat16
    hash(model)


def test_all_published_models_and_shipped_sizes_are_valid():
    for name in OWNERS:
        if name not in HEADS:
            assert tv.create_model(name).settings == model_settings(name)
