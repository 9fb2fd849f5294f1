"""The README's facts: configuration keys exist, and the table of models holds the exact counts."""

import re
from pathlib import Path

import pytest
from exact_counts import EXACT
from flax.traverse_util import flatten_dict
from shipped_configs import load_config

import tokenvit_jax as tv
from tokenvit_jax.published import PUBLISHED
from tokenvit_jax.summary import format_known

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_configuration_keys_exist():
    keys = set(re.findall(r"--config\.([\w.]+)=", README))
    assert len(keys) > 4
    configs = load_config("dgt_t"), load_config("segmenter_l")
    known = {key for config in configs for key in flatten_dict(config.to_dict(), sep=".")}
    assert keys <= known


@pytest.mark.parametrize("name", tv.list_models())
def test_model_row(name):
    (row,) = re.findall(rf"^\| `{name}` \|(.*)\|$", README, re.MULTILINE)
    (params, macs, _), paper = EXACT[name], PUBLISHED.get(name)
    known = (
        [f"{paper.params_m:g} M", format_known(paper.gmacs), f"{paper.top1}"] if paper else [""] * 3
    )
    cells = [f"{params:,}", known[0], f"{macs / 1e9:.3f}", *known[1:]]
    assert [cell.strip() for cell in row.split("|")] == cells


def test_files_that_are_linked_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (Path(__file__).parent.parent / target).exists(), target
