"""Counting parameters and multiply-adds, and the command that prints them."""

import copy
import json
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from exact_counts import EXACT
from jax import lax

from tokenvit_jax import cli, insertion_flags, list_models, ops, summary
from tokenvit_jax.published import PUBLISHED, TOKEN_POOLING


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def run(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, "argv", ["summary", *args])
    with pytest.raises(SystemExit) as exit_info:
        cli.run(summary.main, copy.deepcopy(summary.FLAGS))
    output = capsys.readouterr()
    return exit_info.value.code, output.out, output.err


@pytest.mark.parametrize("name", list_models())
def test_every_model(name):
    result = summary.summarize(name, (224, 224))
    assert (result.params, result.macs, result.macs_as_published) == EXACT[name]
    paper = PUBLISHED.get(name)
    if paper is None:
        return
    assert result.params / 1e6 == pytest.approx(paper.params_m, abs=0.8)  # some are whole millions
    if paper.gmacs is not None:
        # Papers round, and some of their tools count normalisation.
        assert result.macs_as_published / 1e9 == pytest.approx(paper.gmacs, abs=0.07)


def test_products_and_convolutions():
    einsum = lambda q, k: jnp.einsum("bqhd,bkhd->bhqk", q, k)  # noqa: E731
    assert summary.count_macs(einsum, array(2, 5, 3, 8), array(2, 7, 3, 8)) == 2 * 3 * 5 * 7 * 8

    def grouped(x, kernel):
        return lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=4,
        )  # fmt: skip

    macs = summary.count_macs(grouped, array(2, 9, 6, 12), array(3, 3, 3, 8))
    assert macs == 2 * 5 * 3 * 8 * (3 * 3 * 3)


def test_an_operator_counts_by_its_formula():
    q, centroids = array(2, 196, 3, 8), array(3, 5, 8)
    for path in ("dense", "tiles"):
        attend = lambda q, c, path=path: ops.group_attention(q, q, q, c, top_k=20, path=path)  # noqa: E731
        assert summary.count_macs(attend, q, centroids) == 2 * 196 * 24 * (2 * 20 + 2 * 5)
    everything = lambda q, c: ops.group_attention(q, q, q, c, top_k=196)  # noqa: E731
    assert summary.count_macs(everything, q, centroids) == 2 * 2 * 196**2 * 24
    assert summary.count_macs(ops.dot_product_attention, q, q, q) == 2 * 2 * 196**2 * 24
    assert summary.count_macs(ops.depthwise_conv, array(2, 5, 6, 4), array(3, 3, 4)) == 240 * 9


@jax.custom_vjp
def square_product(x):
    return x @ x


square_product.defvjp(lambda x: (x @ x, x), lambda x, dy: (dy @ x.T + x.T @ dy,))


def test_counts_inside_control_flow():
    product = lambda x: x @ x  # noqa: E731
    one = 4**3
    cases = {
        "jit": (jax.jit(product), one),
        "remat": (jax.checkpoint(product), one),
        "custom_vjp": (square_product, one),
        "scan": (lambda x: lax.scan(lambda c, _: (c @ c, None), x, None, length=5)[0], 5 * one),
        "fori": (lambda x: lax.fori_loop(0, 3, lambda _, c: c @ c, x), 3 * one),
        "map": (lambda x: lax.map(lambda r: r @ x, x), 4 * 4 * 4),
        "cond": (lambda x: lax.cond(x[0, 0] > 0, product, lambda x: x @ x @ x, x), 2 * one),
        "vmap": (lambda x: jax.vmap(product)(jnp.stack([x, x])), 2 * one),
    }
    counts = {name: summary.count_macs(fn, array(4, 4)) for name, (fn, _) in cases.items()}
    assert counts == {name: expected for name, (_, expected) in cases.items()}


def test_what_a_paper_leaves_out():
    def fn(x):
        with jax.named_scope("rare"):
            x = x @ x
        return ops.dot_product_attention(*[x.reshape(1, 4, 1, 4)] * 3) @ x

    x = array(4, 4)
    attention, one = 2 * 4 * 4 * 4, 4**3
    assert summary.count_macs(fn, x) - summary.count_macs(fn, x, leave_out=("rare",)) == one
    attention_left_out = summary.count_macs(fn, x, leave_out=("dot_product_attention",))
    assert summary.count_macs(fn, x) - attention_left_out == attention


def test_a_loop_of_unknown_length():
    elementwise = lambda x: lax.while_loop(lambda c: c.sum() < 9, lambda c: c + 1, x)  # noqa: E731
    assert summary.count_macs(elementwise, array(4, 4)) == 0
    with pytest.raises(ValueError, match="while loop, of unknown length"):
        summary.count_macs(
            lambda x: lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ c, x), array(4, 4)
        )


def test_linen_layers():
    model = nn.Sequential([nn.Conv(6, (3, 3), (2, 2)), nn.LayerNorm(), nn.Dense(5)])
    x = array(1, 8, 10, 3)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    assert summary.count_macs(model.apply, variables, x) == 4 * 5 * (6 * 27 + 5 * 6)


def test_json_of_several_models():
    command = [sys.executable, "-m", "tokenvit_jax.summary", "--model=clustr_t,deit_ti",
               "--image_size=64x96", "--format=json"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert [set(entry) for entry in result] == [set(summary.Summary._fields)] * 2
    assert [entry["name"] for entry in result] == ["clustr_t", "deit_ti"]
    assert result[0]["params"] == EXACT["clustr_t"][0]
    assert result[0]["macs"] == summary.summarize("clustr_t", (64, 96)).macs


def test_table(monkeypatch, capsys):
    status, out, _ = run(monkeypatch, capsys, "--model=clustr_t", "--image_size=224")
    assert status == 0
    cells = ["clustr_t", "11,682,417", "11.7", "M", "3.268", "2.145", "2.2"]
    assert out.splitlines()[-1].split() == cells


def test_token_reducers(monkeypatch, capsys):
    args = ("--model=deit_s", "--keep=level3", "--keep=" + ",".join(12 * ["0"]))
    status, out, err = run(monkeypatch, capsys, *args, "--method=powerbert,tome", "--format=json")
    assert (status, err) == (0, "")
    found = {entry["name"]: entry["macs"] / 1e9 for entry in json.loads(out)}
    assert list(found)[:3] == ["deit_s", "deit_s powerbert level3", "deit_s tome level3"]
    assert found["deit_s"] == pytest.approx(4.599, abs=1e-3)
    assert found["deit_s powerbert level3"] == pytest.approx(2.268, abs=1e-3)
    # Half of the patches with the other half, by keys of 64 channels; then their weighted sums.
    left, matching = 196, 0
    for keep in TOKEN_POOLING["deit_s"][3].keep[:-1]:  # the last one keeps none
        while left > keep:
            matching += (left // 2) * (left - left // 2) * 64 + left * (384 + 64 + 1)
            left = max(keep, left - left // 2)
    extra = found["deit_s tome level3"] - found["deit_s powerbert level3"]
    assert extra == pytest.approx(matching / 1e9, rel=1e-6)
    status, table, _ = run(monkeypatch, capsys, *args[:2])
    *_, plain, reduced = table.splitlines()
    assert len(plain) == len(reduced) and reduced.startswith("deit_s weighted_kmedoids level3 ")
    # Without levels of its own a model has those of DeiT-S.
    assert insertion_flags._keep("level7", "deit_ti") == TOKEN_POOLING["deit_s"][7].keep
    assert insertion_flags._keep("level7", "deit_e252") == TOKEN_POOLING["deit_e252"][7].keep


def test_expedited_hosts(monkeypatch, capsys):
    """What is saved: 6 blocks on 100 tokens instead of 196, less the two operators."""
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
        ("--model=deit_s --expedite=12,1,9x9", 1, "expedite.alpha=12 is not valid; valid: 0 to 11"),
        ("--model=dgt_tt", 1, "unknown model 'dgt_tt' (did you mean 'dgt_t'?); valid: clustr_b"),
        (
            "--model=deit_s --keep=level8",
            1,
            "--keep=level8 is not valid; valid: numbers separated by",
        ),
        (
            "--model=deit_s --keep=3,2",
            1,
            "token_reducer.keep=(3, 2) is not valid; valid: 12 numbers",
        ),
        ("--model=dgt_t --keep=level3", 1, "model dgt_t has no setting 'token_reducer'"),
        ("--model=deit_s --method=mean", 1, "--method=mean is not valid; valid: kmeans, weighted"),
        ("--image_size=31", 1, "--image_size=31: both sides must be at least 32"),
        ("--image_size=224x20", 1, "--image_size=224x20: both sides must be at least 32"),
        ("--image_size=big", 1, "--image_size=big is neither a number nor HEIGHTxWIDTH"),
        ("--format=xml", 2, "flag --format=xml: value should be one of <table|json>"),
        ("--modle=dgt_t", 2, "Unknown command line flag 'modle'. Did you mean: model ?"),
    ],
)
def test_mistakes(monkeypatch, capsys, arg, status, message):
    found, out, err = run(monkeypatch, capsys, *arg.split())
    assert (found, out) == (status, "")
    assert message in err
    assert len(err.splitlines()) == 1
