"""Files that torch.save writes, of about 80 kinds: read with the right numbers, or refused."""

import argparse
import datetime
import enum
import pathlib
import pickle
import random
import sys
import types
from collections import OrderedDict, defaultdict, deque
from functools import partial

import numpy as np
import pytest

from tokenvit_jax.errors import UserError
from tokenvit_jax.weights import read_arrays

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity


def tensors(offset=0):
    """Returns a small state dict."""
    generator = torch.Generator().manual_seed(offset)
    shapes = {"cls_token": (1, 1, 4), "blocks.0.attn.qkv.weight": (6, 2), "norm.bias": (3,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


PLAIN, OTHERS = tensors(), tensors(1)


def named(*prefixes):
    """Returns the state dict with something before every name."""
    return {"".join(prefixes) + name: tensor for name, tensor in PLAIN.items()}


def using(**changes):
    """Returns the state dict with other tensors; "_" in place of "."."""
    return PLAIN | changes


class AttributeDict(dict):
    """Stands for Lightning's class."""


class CfgNode(dict):
    """Stands for yacs' class, a dictionary with attributes."""

    def __init__(self, *args):
        super().__init__(*args)
        self.frozen = True


class HistoryBuffer:
    """Stands for mmengine's class."""

    def __init__(self):
        self.values = np.ones(3)


class Schedule:
    """A class of a program that nobody else has."""

    lr = 0.1


class Colour(enum.Enum):
    """An enumeration is looked up by a call."""

    RED = 1


class Gadget:
    """Runs code when it is unpickled."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def pretend(cls, module):
    """Makes a class look as if another package had defined it."""
    parts = module.split(".")
    for length in range(1, len(parts) + 1):
        name = ".".join(parts[:length])
        sys.modules.setdefault(name, types.ModuleType(name))
    setattr(sys.modules[module], cls.__name__, cls)
    cls.__module__ = module


pretend(AttributeDict, "pytorch_lightning.utilities.parsing")
pretend(CfgNode, "yacs.config")
pretend(HistoryBuffer, "mmengine.logging.history_buffer")


def optimizer():
    parameters = [torch.nn.Parameter(tensor.clone()) for tensor in PLAIN.values()]
    adam = torch.optim.AdamW(parameters)
    sum(parameter.sum() for parameter in parameters).backward()
    adam.step()
    return adam.state_dict()


FLAGS = argparse.Namespace(lr=1e-3, out=pathlib.Path("a"), seeds=[1], metric=np.float64(3.0))
TIMM = {
    "epoch": 3, "arch": "vit", "version": 2, "metric": np.float64(81.0), "args": FLAGS,
    "amp_scaler": {"scale": 65536.0},
}  # fmt: skip
ITSELF = {"model": PLAIN}
ITSELF["again"] = ITSELF

READ = {  # kind -> content, from which the numbers of PLAIN are read
    "plain": PLAIN,
    "ordered": OrderedDict(PLAIN),
    "defaultdict": defaultdict(list, PLAIN),
    "parameters": {name: torch.nn.Parameter(tensor) for name, tensor in PLAIN.items()},
    "buffers": {name: torch.nn.Buffer(tensor) for name, tensor in PLAIN.items()},
    "with gradients": {name: tensor.clone().requires_grad_() for name, tensor in PLAIN.items()},
    "not contiguous": {
        n: t.transpose(0, -1).contiguous().transpose(0, -1) for n, t in PLAIN.items()
    },
    "sparse": using(**{"norm.bias": PLAIN["norm.bias"].to_sparse()}),
    "sparse rows": using(
        **{"blocks.0.attn.qkv.weight": PLAIN["blocks.0.attn.qkv.weight"].to_sparse_csr()}
    ),
    "an epoch among the arrays": PLAIN | {"epoch": 3, 7: torch.ones(2)},
    "a loss among the keys": {"model": PLAIN, "loss": torch.tensor(0.5)},
    "timm's training": {"state_dict": PLAIN, "optimizer": optimizer(), **TIMM},
    "timm's training with an average": {"state_dict": PLAIN, "state_dict_ema": OTHERS, **TIMM},
    "DeiT's training": {
        "model": PLAIN,
        "model_ema": OTHERS,
        "optimizer": optimizer(),
        "args": FLAGS,
    },
    "Swin's training": {
        "model": PLAIN,
        "config": CfgNode({"A": CfgNode({"b": [1]})}),
        "max_accuracy": 81.0,
    },
    "Lightning": {
        "state_dict": named("model."),
        "optimizer_states": [optimizer()],
        "lr_schedulers": [],
        "hyper_parameters": AttributeDict(lr=0.1, sizes=(1, 2)),
        "callbacks": {"a": {"best": OTHERS}},
        "pytorch-lightning_version": "2.0",
        "loops": {"fit_loop": {"state_dict": {}}},
    },
    "mmengine": {
        "state_dict": named("backbone."),
        "meta": {"time": datetime.datetime(2024, 1, 1)},
        "message_hub": {"log_scalars": OrderedDict(loss=HistoryBuffer())},
        "optimizer": optimizer(),
    },
    "DINO": {"student": named("module.backbone."), "teacher": OTHERS, "epoch": 3},
    "numpy beside the arrays": {"model": PLAIN, "history": np.ones(3), "best": np.int64(3)},
    "numpy's and Python's states of random numbers": {
        "model": PLAIN,
        "rng": [np.random.get_state(), random.getstate(), torch.get_rng_state()],
    },
    "other plain objects": {
        "model": PLAIN,
        "names": {"a", "b"},
        "raw": b"x",
        "array": bytearray(b"x"),
        "z": 1 + 2j,
        "types": [int, dict],
        "range": range(3),
        "slice": slice(1),
        "queue": deque([1], 3),
        "size": torch.Size([1]),
        "device": torch.device("cpu"),
        "type": torch.float16,
        "part": partial(int, "3"),
        "version": torch.__version__,
        "none": None,
        "big": 2**100,
    },
    "a dictionary that holds itself": ITSELF,
    "an average alone": {"model_ema": PLAIN},
    "an average inside": {"ema": {"module": PLAIN, "decay": 0.9}},
    "twice inside": {"state_dict": {"model": PLAIN}},
    "thrice inside": {"checkpoint": {"model": {"state_dict": PLAIN}}},
    "under an unusual key": {"weights": PLAIN, "epoch": 1},
    **{
        f"under {key}": {key: PLAIN, "epoch": 1}
        for key in (
            "model",
            "state_dict",
            "model_state_dict",
            "model_ema",
            "state_dict_ema",
            "ema",
            "net",
            "network",
            "teacher",
            "student",
            "module",
            "params",
        )
    },
    **{
        f"names begin with {prefix}": named(prefix)
        for prefix in (
            "module.",
            "model.",
            "backbone.",
            "encoder.",
            "_orig_mod.",
            "net.",
            "teacher.",
            "module.model.",
            "model.module.",
            "_orig_mod.module.model.backbone.",
            "encoder._orig_mod.",
            "model.encoder.",
            "_fsdp_wrapped_module.",
        )
    },
    "compiled blocks": {
        name.replace("blocks.0.", "blocks.0._orig_mod."): tensor for name, tensor in PLAIN.items()
    },
    "an averaged model": named("module.") | {"n_averaged": torch.tensor(3)},
}

FLOATS = ("float64", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")

REFUSED = {  # kind -> content, words of the message
    "a list": ([1], "holds an object of type list; valid: arrays by name"),
    "a list of dictionaries": ([PLAIN], "holds an object of type list; valid: arrays by name"),
    "a tensor": (torch.ones(3), "holds an object of type Tensor; valid: arrays by name"),
    "a number": (3, "holds an object of type int; valid"),
    "nothing": (None, "holds an object of type NoneType; valid"),
    "an empty dictionary": ({}, "holds no arrays with names"),
    "text": ({"model": "x"}, "holds no arrays with names"),
    "numbers as names": ({1: torch.ones(3)}, "holds no arrays with names"),
    "an optimizer alone": ({"optimizer": optimizer()}, "holds no arrays with names"),
    "two of a kind": (
        {"model": PLAIN, "net": OTHERS},
        r"holds \['model'\], \['net'\] with as many",
    ),
    "two unusual ones": ({"a": PLAIN, "b": OTHERS}, r"holds \['a'\], \['b'\] with as many"),
    "quantised": (
        using(w=torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)),
        "w is quantised",
    ),
    "without numbers": (using(w=torch.ones(3, device="meta")), "w has a shape but no numbers"),
    "nested": (
        using(w=torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])),
        "(w is nested|is truncated or damaged)",
    ),
    "repeated": (using(w=torch.ones(1).expand(2**40)), "w repeats its numbers"),
    "sparse and huge": (
        using(w=torch.sparse_coo_tensor([[0]], [1.0], (2**40,))),
        "w is sparse and too large",
    ),
    "sparse with a wrong place": (  # which PyTorch follows, unless it is told to check
        using(w=torch.sparse_coo_tensor([[10**9]], [1.0], (3,), check_invariants=False)),
        "is truncated or damaged",
    ),
    "without elements": (using(w=torch.ones(1, 0, 4)), r"w has no elements: \(1, 0, 4\)"),
    "same names": (
        PLAIN | named("module."),
        "holds both .* and .*, which are the same without the parts",
    ),
    "a whole model": (
        torch.nn.Linear(2, 2),
        r"is refused: .*torch.nn.modules.linear.Linear.*state",
    ),
    "an unknown class": (
        {"model": PLAIN, "s": Schedule()},
        r"is refused: .*Schedule\), and reading",
    ),
    "an enumeration": ({"model": PLAIN, "c": Colour.RED}, r"is refused: .*Colour"),
    "code: eval": ({"model": PLAIN, "x": Gadget(eval, "1/0")}, r"is refused: .*builtins.eval"),
    "code: print": ({"model": PLAIN, "x": Gadget(print, "1")}, r"is refused: .*builtins.print"),
    "code: getattr": (
        {"model": PLAIN, "x": Gadget(getattr, "", "x")},
        r"is refused: .*builtins.getattr",
    ),
    "code: system": (
        {"model": PLAIN, "x": Gadget(__import__("os").system, "exit 1")},
        r"is refused: .*(posix|nt).system",
    ),
    "code: torch": (
        {"model": PLAIN, "x": Gadget(torch.hub.load, "a", "b")},
        r"is refused: .*torch.hub.load",
    ),
}


def check(found, expected=PLAIN):
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, expected[name].detach().to_dense().float().numpy())


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", READ)
def test_files_that_are_read(kind, zipped, tmp_path):
    torch.save(READ[kind], tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    check(read_arrays(tmp_path / "w.pth"))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", REFUSED)
def test_files_that_are_refused(kind, zipped, tmp_path):
    content, message = REFUSED[kind]
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=f"^--source=.*w.pth.? ?{message}") as caught:
        read_arrays(tmp_path / "w.pth")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("name", FLOATS)
def test_floating_point_numbers_of_any_width(name, tmp_path):
    content = {key: tensor.to(getattr(torch, name)) for key, tensor in PLAIN.items()}
    torch.save(content, tmp_path / "w.pth")
    check(read_arrays(tmp_path / "w.pth"), content)


@pytest.mark.parametrize("name", ["int8", "uint8", "int64", "bool", "complex64"])
def test_other_numbers_keep_their_type(name, tmp_path):
    """Which of them the model does not need is known later: see import_weights."""
    torch.save(using(w=torch.ones(3).to(getattr(torch, name))), tmp_path / "w.pth")
    assert read_arrays(tmp_path / "w.pth")["w"].dtype == name


def test_moving_average(tmp_path, caplog):
    for kind in ("timm's training with an average", "DeiT's training", "DINO"):
        torch.save(READ[kind], tmp_path / "w.pth")
        check(read_arrays(tmp_path / "w.pth", ema=True), OTHERS)
        assert not caplog.messages
        read_arrays(tmp_path / "w.pth")
        (message,) = caplog.messages
        assert message.endswith("]: see --ema")
        caplog.clear()
    torch.save(PLAIN, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"^--ema: --source=.*w\.pth holds no moving average"):
        read_arrays(tmp_path / "w.pth", ema=True)


def test_the_largest_of_several_is_read(tmp_path, caplog):
    small = {"a": torch.ones(2), "b": torch.ones(2)}
    torch.save({"one": small, "two": PLAIN}, tmp_path / "w.pth")
    check(read_arrays(tmp_path / "w.pth"))
    (message,) = caplog.messages
    assert message.endswith("holds ['two'], ['one']: the first one is read, which has most arrays")


def test_no_code_runs(tmp_path):
    """Stand-ins are neither imported nor called, also where their packages are known."""
    marker = tmp_path / "marker"
    source = f"open({str(marker)!r}, 'w')"
    for function, args in (
        (exec, (source,)),
        (pathlib.Path.touch, (marker,)),
        (np.save, (marker, 1)),
    ):
        torch.save({"model": PLAIN, "x": Gadget(function, *args)}, tmp_path / "w.pth")
        try:
            check(read_arrays(tmp_path / "w.pth"))
        except UserError as error:
            assert "is refused" in str(error)
    assert not marker.exists()


def test_torchscript_and_other_pickles(tmp_path):
    path = tmp_path / "w.pth"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(UserError, match="is refused: it is a TorchScript program"):
        read_arrays(path)
    path.write_bytes(pickle.dumps({"a": torch.ones(3)}))
    with pytest.raises(UserError, match="is refused: it is a pickle that holds more"):
        read_arrays(path)
    torch.save(PLAIN, path, pickle_protocol=4)
    with pytest.raises(UserError, match="is refused"):
        read_arrays(path)


def test_checksums_may_be_missing(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(PLAIN, tmp_path / "w.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    check(read_arrays(tmp_path / "w.pth"))


TRIALS, SEED = 300, 0


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_damaged_files(tmp_path, zipped):
    """Cut, flipped, zeroed and doubled bytes: one line, or the right numbers.

    A file before PyTorch 1.6 has no checksums, so its numbers may differ.
    """
    torch.save(
        {"state_dict": PLAIN, "args": FLAGS}, tmp_path / "w", _use_new_zipfile_serialization=zipped
    )
    content, rng = (tmp_path / "w").read_bytes(), random.Random(SEED)
    path = tmp_path / "d"
    refused = 0
    for _ in range(TRIALS):
        damaged, place = bytearray(content), rng.randrange(len(content))
        kind = rng.choice(("cut", "flip", "zeros", "extra"))
        if kind == "cut":
            del damaged[place:]
        elif kind == "flip":
            damaged[place] ^= 1 << rng.randrange(8)
        elif kind == "zeros":
            damaged[place : place + rng.randrange(1, 100)] = bytes(min(100, len(content) - place))
        else:
            damaged[place:place] = rng.randbytes(rng.randrange(1, 20))
        path.write_bytes(damaged)
        try:
            found = read_arrays(path)
        except UserError as error:
            assert len(str(error)) < 600
            refused += 1
            continue
        if zipped:
            check(found)
    assert refused > TRIALS / 4
