"""The benchmark times what it says, of contenders that compute the same."""

import copy
import json
import subprocess
import sys
import time

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tokenvit_jax import benchmark, benchmark_cases, benchmark_timm, cli
from tokenvit_jax.layers import DynamicGroupAttention

FLOAT32 = jnp.dtype("float32")

TINY = {
    "stem_dim": 4, "dims": (8, 8, 8, 8), "num_heads": (1, 1, 1, 1), "depths": (1, 0, 0, 0),
    "mlp_ratio": 1, "head_dim": 8, "num_groups": 3, "top_k": 5,
}  # fmt: skip

# What a machine for benchmarks may lack.
ABSENT = ("optax", "ml_collections", "orbax", "grain", "tensorflow_datasets", "chex", "matplotlib")
RUN_WITHOUT_THEM = f"""
import sys
for name in {ABSENT}:
    sys.modules[name] = None  # importing it raises ImportError
from tokenvit_jax import benchmark, benchmark_cases, cli
from tokenvit_jax.models.dgt import DGT, DGTSettings
from tokenvit_jax.models.registry import register
register(DGT, {{"tiny": DGTSettings(**{TINY})}})
cli.run(benchmark.main, benchmark.FLAGS)
"""


class SmallModel(nn.Module):
    """Has all the state that a backbone can have."""

    @nn.compact
    def __call__(self, images, train):
        tokens = images.reshape(images.shape[0], -1, 4)
        tokens = DynamicGroupAttention(num_heads=1, num_groups=3, top_k=5)(tokens, train)
        tokens = nn.BatchNorm(use_running_average=not train)(tokens)
        return nn.Dense(10)(tokens.mean(1))


class MeanModel(nn.Module):
    """One linear layer: 3 x width multiply-adds."""

    width: int

    @nn.compact
    def __call__(self, images, train):
        return nn.Dense(self.width)(images.mean((1, 2)))


def run(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, "argv", ["benchmark", *args])
    with pytest.raises(SystemExit) as exit_info:
        cli.run(benchmark.main, copy.deepcopy(benchmark.FLAGS))
    output = capsys.readouterr()
    return exit_info.value.code, output.out, output.err


def test_model_on_a_machine_with_jax_and_flax_only():
    command = [sys.executable, "-c", RUN_WITHOUT_THEM, "--model=tiny", "--image_size=32x64",
               "--batch_size=2", "--dtype=bfloat16", "--format=json"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["environment"]["jax"] == jax.__version__
    assert result["environment"]["backend"] == "cpu"
    [row] = result["results"]
    assert (row["model"], row["image_size"], row["mode"]) == ("tiny", "32x64", "forward")
    assert row["dtype"] == "bfloat16"
    assert row["images_per_second"] == pytest.approx(2e3 / row["median_ms"])
    assert 0 < row["min_ms"] <= row["median_ms"]
    assert min(row["trace_seconds"], row["compile_seconds"], row["temp_mib"]) > 0


def test_training_of_a_model(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "create_model", lambda name, dtype: SmallModel())
    args = ("--model=tiny", "--image_size=32", "--batch_size=4", "--mode=train")
    status, out, err = run(monkeypatch, capsys, *args)
    assert status == 0, err
    _, header, row = out.splitlines()
    row = dict(zip(header.split(), row.split(), strict=True))
    assert (row["mode"], row["batch_size"]) == ("train", "4")
    assert float(row["images_per_second"]) > 0


def test_several_models_against_a_peer(monkeypatch, capsys):
    widths = {"narrow": 1000, "wide": 2000}
    monkeypatch.setattr(benchmark, "list_models", lambda: list(widths))
    monkeypatch.setattr(benchmark, "create_model", lambda name, dtype: MeanModel(widths[name]))
    asked = []

    def timm_peer(*args):
        asked.append(args)
        return benchmark_timm.Peer(lambda: time.sleep(0.001), int(5e9), None)

    monkeypatch.setattr(benchmark_timm, "timm_peer", timm_peer)
    monkeypatch.setattr(benchmark_timm, "environment", lambda: {"timm": "1.2.3"})
    args = ("--model=all", "--against=peer", "--mode=both", "--image_size=32", "--batch_size=2")
    status, out, err = run(monkeypatch, capsys, *args, "--format=json")
    assert status == 0, err
    result = json.loads(out)
    assert result["environment"]["timm"] == "1.2.3"
    assert result["environment"]["jax"] == jax.__version__
    assert asked == [("peer", (32, 32), 2, "float32", mode) for mode in ("forward", "train")]
    rows = result["results"]
    assert [row["model"] for row in rows] == 2 * ["narrow", "wide", "timm/peer"]
    assert [row["mode"] for row in rows] == 3 * ["forward"] + 3 * ["train"]
    for row, peer in zip(rows, 3 * [rows[2]] + 3 * [rows[5]], strict=True):
        macs = {**widths, "timm/peer": 5e9 / 3}[row["model"]] * 3
        assert row["gmacs"] == pytest.approx(macs / 1e9)
        assert row["images_per_second"] == pytest.approx(2e3 / row["median_ms"])
        assert row["gmacs_per_second"] == pytest.approx(row["gmacs"] * row["images_per_second"])
        ratio = row["gmacs_per_second"] / peer["gmacs_per_second"]
        assert row["ratio_to_peer"] == pytest.approx(ratio)
    assert rows[2]["temp_mib"] is None and rows[2]["median_ms"] >= 1


def test_token_reducers_against_the_model_without(monkeypatch, capsys):
    widths = {None: 4000, (3, 2): 1000}

    def create(name, dtype, token_reducer=None):
        return MeanModel(widths[token_reducer and token_reducer["keep"]])

    monkeypatch.setattr(benchmark, "create_model", create)
    args = ("--model=host", "--keep=3,2", "--method=tome", "--image_size=32", "--batch_size=2")
    status, out, err = run(monkeypatch, capsys, *args, "--format=json")
    assert status == 0, err
    plain, reduced = json.loads(out)["results"]
    assert (plain["model"], reduced["model"]) == ("host", "host tome 3,2")
    assert (plain["speedup"], plain["saved"], plain["speedup_over_saved"]) == (1, 1, 1)
    assert reduced["saved"] == pytest.approx(4)
    assert reduced["speedup"] == pytest.approx(plain["median_ms"] / reduced["median_ms"])
    assert reduced["speedup_over_saved"] == pytest.approx(reduced["speedup"] / 4)


def test_training_step_is_gradient_descent():
    model = SmallModel()
    images = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6, 6, 4)), jnp.float32)
    labels = jnp.arange(4)
    variables = jax.jit(lambda x: model.init(jax.random.key(0), x, train=False))(images)

    def loss_fn(params):
        rest = {key: value for key, value in variables.items() if key != "params"}
        logits, _ = model.apply({"params": params, **rest}, images, train=True, mutable=list(rest))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, grads = jax.jit(jax.value_and_grad(loss_fn))(variables["params"])
    after, found = jax.jit(benchmark.train_step_of(model))(variables, images, labels)
    assert found == pytest.approx(float(loss), rel=1e-5)
    expected = jax.tree.map(lambda p, g: p - 1e-3 * g, variables["params"], grads)
    chex.assert_trees_all_close(after["params"], expected, atol=1e-6)
    # The statistics and the centroids moved, too, and the centroids' sums are cleared.
    for name in ("batch_stats", "centroids"):
        changed = jax.tree.map(lambda a, b: bool((a != b).any()), variables[name], after[name])
        assert any(jax.tree.leaves(changed))
    assert not after["centroids"]["DynamicGroupAttention_0"]["sums"].any()


def test_contenders_take_turns():
    order = []

    def call(name, seconds):
        time.sleep(seconds)
        order.append(name)
        return jnp.zeros(())

    calls = {"slow": lambda: call("slow", 0.05), "fast": lambda: call("fast", 0.0)}
    times = benchmark.time_in_turns(calls, seconds=0.2)
    assert len(times["fast"]) == benchmark.MAX_CALLS
    assert benchmark.MIN_CALLS <= len(times["slow"]) <= 4
    assert min(times["slow"]) >= 0.05
    del order[:4]  # two calls each to warm up
    assert len(order) == len(times["slow"]) + len(times["fast"])
    turns = np.flatnonzero(np.array(order) == "slow")
    assert np.diff(turns).min() > 8


def small_cases():
    yield from benchmark_cases.group_attention_cases(2, FLOAT32, ((20, 2), (50, 1)))
    yield from benchmark_cases.depthwise_conv_cases(2, FLOAT32, {"tiny": ((5, 8),)})
    yield from benchmark_cases.dot_product_attention_cases(2, FLOAT32, ((9, 2, 8),))
    yield from benchmark_cases.cluster_density_peaks_cases(2, FLOAT32, ((96, 4),))
    yield from benchmark_cases.kmedoids_cases(2, FLOAT32, ((20, 14, 3),))
    yield from benchmark_cases.kmeans_cases(2, FLOAT32, ((20, 7, 3),))
    yield from benchmark_cases.cluster_superpixels_cases(2, FLOAT32, (((13, 9), (9, 7), 4),))
    yield from benchmark_cases.reconstruct_tokens_cases(2, FLOAT32, (((13, 9), (9, 7), 4),))


@pytest.mark.parametrize("case", small_cases(), ids=lambda case: str(case.shape))
def test_contenders_compute_the_same(case):
    # With no more keys than are selected, attention in groups is dense attention.
    inputs, fns = case.inputs, case.contenders.values()
    if case.num_differentiated:
        inputs = (inputs[0], *inputs)  # the first one as the gradient of the output, too
        fns = [benchmark._forward_backward(fn, case.num_differentiated) for fn in fns]
    expected, *others = (jax.jit(fn)(*inputs) for fn in fns)
    for found in others:
        chex.assert_trees_all_close(found, expected, atol=1e-4)


def test_case_with_a_contender_that_does_not_fit(monkeypatch):
    case = next(benchmark_cases.dot_product_attention_cases(1, FLOAT32, ((64, 2, 8),)))
    row = benchmark.benchmark_case(case, "train", seconds=0.01)
    timings = row["contenders"]
    assert list(timings) == ["einsum", "jax.nn", "heads_first"]
    ratio = timings["einsum"]["median_ms"] / timings["heads_first"]["median_ms"]
    assert row["speedup"] == pytest.approx(ratio)
    assert timings["einsum"]["temp_mib"] * 2**20 >= 2 * 64 * 64 * 4  # the logits of two heads

    limit = timings["einsum"]["temp_mib"] * 2**20
    monkeypatch.setattr(benchmark, "_fits_memory", lambda num_bytes: num_bytes < limit)
    row = benchmark.benchmark_case(case, "train", seconds=0.01)
    assert row["speedup"] is None
    assert row["contenders"]["einsum"]["median_ms"] is None
    assert row["contenders"]["heads_first"]["calls"] >= benchmark.MIN_CALLS


def test_operations_of_equation_7():
    # The ratios to global attention that the paper states for DGT-T, after Eq. 7.
    for length, channels, ratio in ((3136, 64, 0.05), (784, 128, 0.19), (196, 256, 0.75)):
        dense = 2 * length**2 * channels
        assert round(benchmark_cases.equation_6(length, channels) / dense, 2) == ratio


ROWS = [
    {
        "length": length, "heads": 2, "path": "tiles", "eq7": length / 100, "mode": mode,
        "speedup": None if length == 64 else 2.0,
        "contenders": {
            "einsum": {"median_ms": None if length == 64 else 1234.5, "temp_mib": 0.5},
            "heads_first": {"median_ms": 20.0, "temp_mib": 1.0},
            "group": {"median_ms": 10.0, "temp_mib": 2.0},
        },
    }
    for length in (16, 64) for mode in ("forward", "train")
]  # fmt: skip


def test_table():
    header, first, *_, last = benchmark.format_table(ROWS).splitlines()
    assert len(header) == len(first) == len(last)
    assert " ".join(first.split()) == "16 2 tiles 0.16 forward 2 1234 20 10 0.5 1 2"
    assert " ".join(last.split()) == "64 2 tiles 0.64 train - - 20 10 0.5 1 2"


def test_curve():
    time_axis, speedup_axis = benchmark.plot_cost(ROWS).axes
    group = time_axis.lines[-1]
    np.testing.assert_array_equal(group.get_xydata(), [[16, 5.0], [64, 5.0]])  # ms per head
    measured, promised = speedup_axis.lines[1:3]
    np.testing.assert_array_equal(measured.get_ydata(), [2.0, np.nan])
    np.testing.assert_array_equal(promised.get_ydata(), [0.16, 0.64])
    assert len(benchmark.plot_cost(ROWS[::2]).axes[0].lines) == 3  # one mode


def test_operator_command(monkeypatch, capsys, tmp_path):
    cases = lambda batch, dtype: benchmark_cases.group_attention_cases(batch, dtype, ((32, 1),))  # noqa: E731
    monkeypatch.setitem(benchmark_cases.CASES, "group_attention", cases)
    picture = tmp_path / "curve.png"
    status, out, err = run(
        monkeypatch, capsys, "--op=group_attention", "--mode=forward", f"--out={picture}"
    )
    assert status == 0, err
    environment, header, row = out.splitlines()
    assert f"jax {jax.__version__}" in environment
    assert header.split()[:6] == ["length", "heads", "path", "eq7", "mode", "speedup"]
    assert row.split()[:2] == ["32", "1"]
    assert picture.stat().st_size > 1000


def test_operator_without_a_gradient(monkeypatch, capsys):
    def cases(batch, dtype):
        call = lambda x: x + 1  # noqa: E731
        yield benchmark_cases.Case({"length": 3}, (jnp.zeros(3),), 0, {"a": call, "b": call})

    monkeypatch.setitem(benchmark_cases.CASES, "depthwise_conv", cases)
    status, out, err = run(monkeypatch, capsys, "--op=depthwise_conv")
    assert status == 0, err
    _, _, row = out.splitlines()
    assert row.split()[:2] == ["3", "forward"]
    status, out, err = run(monkeypatch, capsys, "--op=depthwise_conv", "--mode=train")
    assert (status, out) == (1, "")
    assert err == "error: --op=depthwise_conv has no gradient; it takes --mode=forward\n"


def test_peer_that_is_not_installed(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    status, out, err = run(monkeypatch, capsys, "--model=dgt_t", "--against=pvt_v2_b2")
    assert (status, out) == (1, "")
    assert "--against needs PyTorch and timm, but torch is not installed: pip install" in err


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        ([], 1, "one of --model=NAME and --op=NAME is needed"),
        (["--model=dgt_t", "--op=depthwise_conv"], 1, "one of --model=NAME and --op=NAME"),
        (["--model=dgt"], 1, "unknown model 'dgt' (did you mean"),
        (["--model=dgt_t", "--image_size=16"], 1, "--image_size=16: both sides must be at least"),
        (["--op=depthwise_conv", "--image_size=64"], 1, "--image_size goes with --model"),
        (["--op=depthwise_conv", "--against=a"], 1, "--against goes with --model"),
        (["--model=dgt_t,dgt"], 1, "unknown model 'dgt' (did you mean"),
        (["--op=depthwise_conv", "--out=a.png"], 1, "--out goes with --op=group_attention"),
        (["--op=kmeans", "--keep=3"], 1, "--keep goes with --model; nothing is inserted"),
        (["--op=conv"], 2, "flag --op=conv: value should be one of <group_attention|"),
        (["--model=dgt_t", "--batch_size=0"], 2, "flag --batch_size=0"),
        (["--model=dgt_t", "--dtype=float16"], 2, "should be one of <float32|bfloat16>"),
    ],
)
def test_mistakes(monkeypatch, capsys, args, status, message):
    found, out, err = run(monkeypatch, capsys, *args)
    assert (found, out, len(err.splitlines())) == (status, "", 1)
    assert message in err
