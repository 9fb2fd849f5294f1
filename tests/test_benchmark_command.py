"""The command that times models and operators."""

import copy
import importlib.machinery
import json
import subprocess
import sys
import time
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from stateful_model import StatefulModel

from tokenvit_jax import benchmark, cli
from tokenvit_jax.measure import models, operators, page, torch_peers
from tokenvit_jax.models.backbone import Trainable
from tokenvit_jax.tasks import TASKS

TINY = {
    "stem_dim": 4, "dims": (8, 8, 8, 8), "num_heads": (1, 1, 1, 1), "depths": (1, 0, 0, 0),
    "mlp_ratio": 1, "head_dim": 8, "num_groups": 3, "top_k": 5,
}  # fmt: skip

# Packages that a machine for benchmarks may lack.
ABSENT = ("optax", "ml_collections", "orbax", "grain", "tensorflow_datasets", "chex", "matplotlib")
RUN_WITHOUT_THEM = f"""
import sys
for name in {ABSENT}:
    sys.modules[name] = None  # importing it raises ImportError
from tokenvit_jax import benchmark, cli
from tokenvit_jax.models.dgt import DGT, DGTSettings
from tokenvit_jax.models.registry import register
register(DGT, {{"tiny": DGTSettings(**{TINY})}})
cli.run(benchmark.main, benchmark.FLAGS)
"""


class MeanModel(Trainable):
    """One linear layer with 3 x width multiply-adds."""

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


@pytest.mark.slow
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
    monkeypatch.setattr(models, "create_model", lambda name, dtype: StatefulModel())
    args = ("--model=tiny", "--image_size=32", "--batch_size=4", "--mode=train")
    status, out, err = run(monkeypatch, capsys, *args)
    assert status == 0, err
    _, header, row = out.splitlines()
    row = dict(zip(header.split(), row.split(), strict=True))
    assert (row["mode"], row["batch_size"]) == ("train", "4")
    assert float(row["images_per_second"]) > 0


def test_several_models_against_a_peer(monkeypatch, capsys):
    widths = {"narrow": 1000, "wide": 2000}
    monkeypatch.setattr("tokenvit_jax.models.list_models", lambda: list(widths))
    monkeypatch.setattr(models, "create_model", lambda name, dtype: MeanModel(widths[name]))
    asked = []

    def torch_peer(*args):
        asked.append(args)
        running = torch_peers.Running(lambda: time.sleep(0.001))
        return torch_peers.Peer(lambda: running, int(5e9), None)

    kind = models.CLASSIFICATION._replace(peer=lambda *args: args)
    monkeypatch.setattr(models, "CLASSIFICATION", kind)
    monkeypatch.setattr(torch_peers, "torch_peer", torch_peer)
    monkeypatch.setattr(torch_peers, "environment", lambda package: {package: "1.2.3"})
    args = ("--model=all", "--against=peer", "--mode=both", "--image_size=32", "--batch_size=2")
    status, out, err = run(monkeypatch, capsys, *args, "--format=json")
    assert status == 0, err
    result = json.loads(out)
    assert result["environment"]["timm"] == "1.2.3"
    assert result["environment"]["jax"] == jax.__version__
    assert asked == [
        (("peer", (32, 32), mode), (32, 32), 2, "float32", mode) for mode in ("forward", "train")
    ]
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

    def create(name, dtype=None, token_reducer=None):
        return MeanModel(widths[token_reducer and token_reducer["keep"]])

    monkeypatch.setattr(models, "create_model", create)
    args = ("--model=host", "--keep=3,2", "--method=tome", "--image_size=32", "--batch_size=2")
    status, out, err = run(monkeypatch, capsys, *args, "--format=json")
    assert status == 0, err
    plain, reduced = json.loads(out)["results"]
    assert (plain["model"], reduced["model"]) == ("host", "host tome 3,2")
    assert (plain["speedup"], plain["saved"], plain["speedup_over_saved"]) == (1, 1, 1)
    assert reduced["saved"] == pytest.approx(4)
    assert reduced["speedup"] == pytest.approx(plain["median_ms"] / reduced["median_ms"])
    assert reduced["speedup_over_saved"] == pytest.approx(reduced["speedup"] / 4)


def test_operator_command(monkeypatch, capsys, tmp_path):
    cases = lambda batch, dtype: operators.group_attention_cases(batch, dtype, ((32, 1),))  # noqa: E731
    monkeypatch.setitem(operators.CASES, "group_attention", cases)
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
        yield operators.Case({"length": 3}, (jnp.zeros(3),), 0, {"a": call, "b": call})

    monkeypatch.setitem(operators.CASES, "depthwise_conv", cases)
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


def test_peer_of_a_task_that_is_not_installed(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "torch", None)
    args = ("--task=segmentation", "--against=upernet_swin_t")
    status, out, err = run(monkeypatch, capsys, *args)
    assert (status, out) == (1, "")
    assert "--against needs PyTorch and transformers, but torch is not installed: pip" in err
    assert len(err.splitlines()) == 1


def stand_in(name, **attributes):
    """Returns a module of a package."""
    module = types.ModuleType(name)
    vars(module).update(attributes)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    return module


def no_operators(*_):
    raise RuntimeError("Couldn't load custom C++ ops.\nAnd more.")


def not_loaded(module):
    """Returns `importlib.import_module` where a module does not find a library."""

    def import_module(name, package=None):
        if name == module:
            raise OSError("libcudart.so.13: cannot open shared object file\nand more")
        return imported(name, package)

    imported = importlib.import_module
    return import_module


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (
            "operators",
            "--against needs the compiled operators of torchvision, which do not load on the cpu: "
            "install the torchvision that belongs to torch 9.9",
        ),
        ("torchvision", "but torchvision is not installed: pip install torch torchvision"),
        ("timm", "but timm is not installed: pip install torch timm"),
        (
            "libraries",
            "PyTorch and torchvision, which do not load (libcudart.so.13: cannot open shared "
            "object file): install builds that belong together with pip install torch torchvision",
        ),
    ],
)
def test_detector_of_torchvision_that_does_not_load(monkeypatch, capsys, tmp_path, broken, message):
    """The command ends with a line; the report has no comparison, and says why."""
    nms = no_operators if broken == "operators" else lambda *_: None
    torch = stand_in(
        "torch",
        __version__="9.9",
        zeros=lambda *_, device: None,
        set_num_threads=lambda _: None,
        cuda=types.SimpleNamespace(is_available=lambda: False),
    )
    packages = {
        "torch": torch,
        "torchvision": stand_in("torchvision", ops=types.SimpleNamespace(nms=nms)),
        "timm": stand_in("timm"),
    }
    packages |= {broken: None} if broken in packages else {}
    for name, module in packages.items():
        monkeypatch.setitem(sys.modules, name, module)
    if broken == "libraries":
        monkeypatch.setattr(importlib, "import_module", not_loaded("torchvision"))
    status, out, err = run(
        monkeypatch, capsys, "--task=detection", "--against=mask_rcnn_swin_t", "--image_size=64"
    )
    assert (status, out, len(err.splitlines())) == (1, "", 1)
    assert message in err

    monkeypatch.setattr(
        page, "_parts", lambda plan: [page.Part("Peers", 0, lambda: peers_of(plan))]
    )
    path = tmp_path / "page.md"
    status, out, err = run(monkeypatch, capsys, "--task=detection", f"--report={path}")
    assert (status, err) == (0, "")
    text = " ".join(path.read_text().split())
    assert message in text and "No comparison with torchvision: " in text and "peers: ['']" in text


def peers_of(plan):
    yield [f"peers: {[task.peer for task in plan.tasks]}"]


def test_batches_of_a_report_are_those_of_the_tasks(monkeypatch, capsys, tmp_path):
    plans = []
    monkeypatch.setattr(page, "measure_page", lambda plan, *_: plans.append(plan) or [])
    report = f"--report={tmp_path / 'page.md'}"
    for args in (["--task=detection"], ["--task=detection", "--batch_size=3"],
                 ["--task=detection", "--task=segmentation"]):  # fmt: skip
        status, _, err = run(monkeypatch, capsys, report, *args)
        assert status == 0, err
    found = [[task.batch_size for task in plan.tasks] for plan in plans]
    assert found == [[1], [3], [2, 1]]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for args in ((), ("--dtype=float32",)):
        run(monkeypatch, capsys, report, "--task=detection", *args)
    types = [plan.dtype.name for plan in plans]
    assert types == ["float32", "float32", "float32", "bfloat16", "float32"]


@pytest.mark.parametrize("flag", ["--report", "--report=page.md"])
def test_report(monkeypatch, capsys, tmp_path, flag):
    plans = []

    def measure_page(plan, minutes, command):
        plans.append((plan, minutes, command))
        yield "# cpu\n"
        yield "# cpu\n\n## Forward pass\n"

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(page, "measure_page", measure_page)
    args = (flag, "--report_minutes=5", "--model=deit_s", "--image_size=64x32", "--batch_size=2")
    status, out, err = run(monkeypatch, capsys, *args)
    assert status == 0, err
    name = flag.partition("=")[2] or "cpu.md"
    assert (tmp_path / name).read_text() == "# cpu\n\n## Forward pass\n"
    assert out.splitlines() == [f"{name}: 0 parts", f"{name}: 1 parts"]
    [(plan, minutes, command)] = plans
    assert (plan.image_size, plan.batch_size, plan.dtype.name) == ((64, 32), 2, "float32")
    assert (plan.small, plan.large, minutes) == (["deit_s"], (), 5)
    assert [*plan.insertions["deit_s"]] == ["weighted_kmedoids level3", "tome level3"]
    assert command == " ".join(["tokenvit benchmark", *args])


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        ([], 2, "one of --model=NAME, --task=NAME, --op=NAME and --report is"),
        (
            ["--model=dgt_t", "--op=depthwise_conv"],
            2,
            "one of --model=NAME, --task=NAME, --op=NAME and",
        ),
        (["--report", "--op=kmeans"], 2, "--op does not go with --report"),
        (["--report", "--mode=train"], 2, "--mode does not go with --report"),
        (["--report", "--report_minutes=0"], 2, "--report_minutes=0 is not valid; valid: whole"),
        (["--report=tests"], 1, "--report=tests"),
        (["--model=dgt_t", "--report_minutes=5"], 2, "--report_minutes goes with --report"),
        (["--model=dgt"], 1, "unknown model 'dgt' (did you mean"),
        (["--model=dgt_t", "--image_size=16"], 1, "--image_size=16: both sides must be at least"),
        (["--op=depthwise_conv", "--image_size=64"], 2, "--image_size goes with --model"),
        (["--op=depthwise_conv", "--against=a"], 2, "--against goes with --model"),
        (["--model=dgt_t,dgt"], 1, "unknown model 'dgt' (did you mean"),
        (["--op=depthwise_conv", "--out=a.png"], 2, "--out goes with --op=group_attention"),
        (["--op=kmeans", "--keep=3"], 2, "--keep goes with --model; nothing is inserted"),
        (["--op=conv"], 2, "--op=conv is not valid; valid: group_attention, "),
        (["--op=kmeans", "--carry"], 2, "--carry goes with --model"),
        (["--model=dgt_t", "--batch_size=0"], 2, "--batch_size=0 is not valid; valid: whole"),
        (["--task=segmentation", "--op=kmeans"], 2, "one of --model=NAME, --task=NAME, --op=NAME"),
        (["--task=segmentation", "--model=swin"], 1, "--model=swin is not valid with --task="),
        (["--task=segmentation", "--against=pvt"], 1, "--against=pvt is not valid for this task"),
        (["--task=video"], 2, "--task=video is not valid; valid: "),
        (["--model=dgt_t", "--dtype=float16"], 2, "--dtype=float16 is not valid (did you mean "),
    ],
)
def test_mistakes(monkeypatch, capsys, args, status, message):
    found, out, err = run(monkeypatch, capsys, *args)
    assert (found, out, len(err.splitlines())) == (status, "", 1)
    assert message in err


def test_operators_are_those_that_are_measured():
    assert list(operators.CASES) == list(benchmark.OPERATORS)


def test_tasks_are_those_that_exist():
    assert set(benchmark.MEASURED) <= set(TASKS)
