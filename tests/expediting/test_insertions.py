"""Settings on the command line."""

import json

import pytest
from absl import flags as flag_values

from tokenvit_jax.expediting import insertions
from tokenvit_jax.models.expedite import Expedite
from tokenvit_jax.models.reducers import DYNAMICVIT, METHODS, reads_keep


@pytest.mark.parametrize(
    "setting",
    [
        Expedite(3, 9, (4, 5), "logits"),
        Expedite(3, 9, (4, 5), temperature=0.5),
        Expedite(3, 9, (4, 5), "logits", temperature=200.0),
        Expedite(3, 9, (4, 5), temperature=2.5e-07),
    ],
)
def test_settings_are_written_as_other_commands_read_them(setting):
    flags, checked = flag_values.FlagValues(), []
    insertions.define_flags(flags)
    flags(["evaluate", f"--expedite={insertions.describe(setting)}"])
    (found,) = insertions.from_flags(flags, "deit_s", checked.append).values()
    assert checked == [{}, found]
    assert Expedite(**found["expedite"]) == setting
    assert json.dumps(found)


def test_methods_are_the_reducers_that_keep_given_numbers():
    """All but DynamicViT, whose predictors need training."""
    kept = [m for m in METHODS if reads_keep({"method": m}) and m != DYNAMICVIT]
    assert list(insertions.KEPT_METHODS) == kept
