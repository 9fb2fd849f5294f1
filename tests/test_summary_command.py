"""The command that prints parameters and multiply-adds."""

import copy
import json
import subprocess
import sys

import pytest
from exact_counts import EXACT

from tokenvit_jax import cli, summary
from tokenvit_jax.expediting.insertions import parse_keep
from tokenvit_jax.measure import macs
from tokenvit_jax.published import TOKEN_POOLING


def run(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, "argv", ["summary", *args])
    with pytest.raises(SystemExit) as exit_info:
        cli.run(summary.main, copy.deepcopy(summary.FLAGS))
    output = capsys.readouterr()
    return exit_info.value.code, output.out, output.err


@pytest.mark.slow
def test_json_of_several_models():
    """Counts do not depend on kernels, which this process leaves out and the command has."""
    names = ["clustr_t", "deit_ti"]
    command = [sys.executable, "-m", "tokenvit_jax.summary", f"--model={','.join(names)}",
               "--image_size=64x96", "--format=json"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert [set(entry) for entry in result] == [set(macs.Summary._fields)] * len(names)
    assert result[0]["params"] == EXACT["clustr_t"][0]
    expected = [macs.summarize(name, (64, 96))._asdict() for name in names]
    assert result == expected


def test_table(monkeypatch, capsys):
    status, out, _ = run(monkeypatch, capsys, "--model=clustr_t", "--image_size=224")
    assert status == 0
    cells = ["clustr_t", "11,682,417", "11.7", "M", "3.268", "2.145", "2.2"]
    assert out.splitlines()[-1].split() == cells


@pytest.mark.slow
def test_token_reducers(monkeypatch, capsys):
    args = ("--model=deit_s", "--keep=level3", "--keep=" + ",".join(12 * ["0"]))
    status, out, err = run(monkeypatch, capsys, *args, "--method=powerbert,tome", "--format=json")
    assert (status, err) == (0, "")
    found = {entry["name"]: entry["macs"] / 1e9 for entry in json.loads(out)}
    assert list(found)[:3] == ["deit_s", "deit_s powerbert level3", "deit_s tome level3"]
    assert found["deit_s"] == pytest.approx(4.599, abs=1e-3)
    assert found["deit_s powerbert level3"] == pytest.approx(2.268, abs=1e-3)
    # Matching compares one half of the patches with the other by keys of 64 channels, then merges
    # the patches and, before another matching, the keys.
    left, matching = 196, 0
    for keep in TOKEN_POOLING["deit_s"][3].keep[:-1]:  # the last one keeps none
        while left > keep:
            after = max(keep, left - left // 2)
            merged = 384 + 1 + (64 if after > keep else 0)
            matching += (left // 2) * (left - left // 2) * 64 + left * merged
            left = after
    extra = found["deit_s tome level3"] - found["deit_s powerbert level3"]
    assert extra == pytest.approx(matching / 1e9, rel=1e-6)
    status, table, _ = run(monkeypatch, capsys, *args[:2])
    *_, plain, reduced = table.splitlines()
    assert len(plain) == len(reduced) and reduced.startswith("deit_s weighted_kmedoids level3 ")
    # A model without published levels gets the levels of DeiT-S.
    assert parse_keep("level7", "deit_ti") == TOKEN_POOLING["deit_s"][7].keep
    assert parse_keep("level7", "deit_e252") == TOKEN_POOLING["deit_e252"][7].keep


def test_expedited_hosts(monkeypatch, capsys):
    """6 blocks run on 100 instead of 196 tokens; clustering and reconstruction cost extra."""
    args = ("--model=deit_s", "--expedite=4,6,10x10", "--expedite=4,8,10x10,logits")
    status, out, err = run(monkeypatch, capsys, *args, "--format=json")
    assert (status, err) == (0, "")
    found = {entry["name"]: entry["macs"] for entry in json.loads(out)}
    plain, blocks, logits = found.values()
    assert list(found)[1:] == ["deit_s expedite 4,6,10x10", "deit_s expedite 4,8,10x10,logits"]
    tokens = lambda n: 12 * 384**2 * n + 2 * 384 * n**2  # noqa: E731
    one_block = tokens(197) - tokens(101)
    reconstruction = 196 * (100 + 20) * 384
    assert logits - (plain - 8 * one_block) == blocks - reconstruction - (plain - 6 * one_block)
    assert 0 < logits - (plain - 8 * one_block) < 0.03 * plain


@pytest.mark.parametrize(
    ("arg", "status", "message"),
    [
        ("--model=deit_s --expedite=4,6", 1, "--expedite=4,6 is not valid; valid: ALPHA,BETA,ROWS"),
        ("--model=deit_s --expedite=12,1,9x9", 1, "9x9 does not fit the model: expedite.alpha=12"),
        ("--model=dgt_tt", 1, "unknown model 'dgt_tt' (did you mean 'dgt_t'?); valid: clustr_b"),
        (
            "--model=deit_s --keep=level8",
            1,
            "--keep=level8 is not valid; valid: numbers separated by",
        ),
        (
            "--model=deit_s --keep=3,2",
            1,
            "--keep=3,2 does not fit the model: token_reducer.keep=(3, 2) is not valid; valid: 12",
        ),
        ("--model=dgt_t --keep=level3", 1, "model dgt_t has no setting 'token_reducer'"),
        (
            "--model=deit_s --method=tom",
            1,
            "--method=tom is not valid (did you mean 'tome'?); valid:",
        ),
        ("--model=deit_s --method=tome", 1, "--method has no effect without --keep"),
        ("--model=deit_s --carry", 1, "--carry has no effect without --keep"),
        ("--model=deit_s --expedite=4,6,99x9", 1, "--expedite=4,6,99x9 does not fit the model: "),
        ("--image_size=31", 1, "--image_size=31: both sides must be at least 32"),
        ("--image_size=224x20", 1, "--image_size=224x20: both sides must be at least 32"),
        (
            "--image_size=99999999999",
            1,
            "--image_size=99999999999: both sides must be at least 32 and ",
        ),
        ("--image_size=big", 1, "--image_size=big is neither a number nor HEIGHTxWIDTH"),
        ("--format=xml", 2, "--format=xml is not valid; valid: table, json"),
        ("--modle=dgt_t", 2, "Unknown command line flag 'modle'. Did you mean: model ?"),
    ],
)
def test_mistakes(monkeypatch, capsys, arg, status, message):
    found, out, err = run(monkeypatch, capsys, *arg.split())
    assert (found, out) == (status, "")
    assert message in err
    assert len(err.splitlines()) == 1
